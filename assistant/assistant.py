"""What an artifact knows of text: its tokenizer, its chat template and what it recommends; prompts become ids here."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moec.assistant.answer import Answer, ContextFull, Limits
from moec.assistant.beginnings import Beginnings
from moec.assistant.conversation import fitting
from moec.assistant.generate import AfterThinking, Constraint, Generation, Text, bring
from moec.assistant.messages import calls_as_content, checked_messages, checked_tools, first_rendered
from moec.assistant.prefixes import PrefixCache, checked_name, shared_length
from moec.assistant.sampling import Sampling, recommended
from moec.assistant.segments import (
    CHANNEL_MARKERS,
    THINK_MARKERS,
    Channels,
    Segments,
    has_channels,
    has_thinking,
    opens_thinking,
)
from moec.assistant.speculate import ModelDrafter, PromptLookup
from moec.assistant.structured import Format, Formats
from moec.assistant.template import ChatTemplate
from moec.assistant.tool_choice import call_format
from moec.assistant.tool_formats import call_markers, tool_format
from moec.compiler.artifact import Artifact
from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.files import read_text
from moec.compiler.source import GENERATION, TOKENIZER
from moec.compiler.target import Session
from moec.compiler.tokenizer import MAX_BYTES, TextTokenizer, encode_prompt, load_tokenizer

_STAND_IN = "\U000f4d45{}\U000f4d46"  # private characters; a text that holds them is encoded as it is


@dataclass(frozen=True)
class Prompt:
    """Ids of a prompt, and how its answer is taken apart. `messages`: None for a text to go on from."""

    ids: list[int]
    messages: list[dict[str, Any]] | None = None
    thinking: bool = False  # whether the answer begins inside a thinking segment
    tools: list[dict[str, Any]] | None = None  # that may be called
    shared: int = 0  # ids that other prompts are likely to begin with: what a `PrefixCache` keeps
    one_call: bool = False  # whether the answer ends behind its first call of a tool
    dropped: int = 0  # messages that it does not contain, since there was no room


@dataclass
class Assistant:
    """`template` is None for a model without one. `eos_ids` end an answer. place: the artifact, for messages."""

    tokenizer: TextTokenizer
    template: ChatTemplate | None
    sampling: Sampling
    eos_ids: frozenset[int]
    place: str
    tokenizer_file: Path
    prefixes: PrefixCache | None = None  # beginnings of prompts that were computed before
    _special: dict[int, str] = field(default_factory=dict)
    _formats: Formats | None = None
    _beginnings: Beginnings = field(default_factory=Beginnings)

    @staticmethod
    def of(artifact: Artifact, *, tokenizer: Path | None = None, chat_template: Path | None = None) -> Assistant:
        """What lies in the artifact's folder, or in the files given; ArtifactError for damaged ones or no tokenizer."""
        file = tokenizer or artifact.folder / TOKENIZER
        words = load_tokenizer(file)
        return Assistant(
            words,
            ChatTemplate.of_folder(artifact.folder, chat_template),
            recommended(artifact.folder / GENERATION),
            frozenset(artifact.manifest.model.eos_ids),
            str(artifact.folder),
            file,
            _special=words.special_tokens(),
        )

    # --- prompts ------------------------------------------------------------------------------------------------------

    def text_prompt(self, text: str, place: str = "--prompt") -> Prompt:
        """A text to go on from, with the special tokens that the tokenizer itself adds."""
        ids = encode_prompt(self.tokenizer, text, place)
        return Prompt(ids, shared=len(ids) - 1)

    def chat_prompt(
        self,
        messages: Any,
        *,
        tools: Any = None,
        variables: Mapping[str, Any] | None = None,
        shared: bool = False,
    ) -> Prompt:
        """A conversation in the model's own form, up to where its answer begins.

        shared: tell how many ids all conversations with its system prompt and tools begin with, which a prefix cache
        asks for anyway.

        The ids are those of transformers' `apply_chat_template`, except that special tokens that are written in a
        message are text. RunError: no template, what `checked_messages` refuses, tools where the template reads none.
        """
        template = self._template()
        messages = checked_messages(messages)
        if any(m["role"] == "developer" for m in messages) and "developer" not in template.text:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        tools = None if tools is None else checked_tools(tools) or None
        if tools and "tools" not in template.variables:
            raise RunError("the chat template reads no tools", place=template.place, remedy="leave them out")
        text, ids = self._encoded(template, messages, tools, variables)
        count = 0
        if shared or self.prefixes is not None:
            count = self._shared(ids, template, messages, tools, variables)
        return Prompt(ids, messages, opens_thinking(text), tools, shared=count)

    def fitting_prompt(
        self, messages: Any, context: int, *, tools: Any = None, variables: Mapping[str, Any] | None = None
    ) -> Prompt:
        """As `chat_prompt`, of a conversation without its oldest questions where it does not fit (`fitting`)."""

        def render(given: Any) -> Prompt:
            return self.chat_prompt(given, tools=tools, variables=variables, shared=True)

        prompt, kept = fitting(render, messages, context, drop_oldest=True)
        return replace(prompt, dropped=len(messages) - len(kept))

    def reads(self, variable: str) -> bool:
        """Whether the chat template reads a variable, such as `reasoning_effort`. RunError without a template."""
        return variable in self._template().variables

    def _shared(self, ids: list[int], template: ChatTemplate, messages: Any, tools: Any, variables: Any) -> int:
        """How many ids every conversation begins with that has the same system prompt and tools."""
        first = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), None)
        if first is None:
            return 0
        begin = messages[:first]

        def asked(question: str) -> list[int]:
            return self._encoded(template, [*begin, {"role": "user", "content": question}], tools, variables)[1]

        return shared_length(ids, self._beginnings.of((template.text, begin, tools, variables), asked))

    def _template(self) -> ChatTemplate:
        if self.template is None:
            what = "the model brings no chat template"
            raise RunError(what, place=self.place, remedy="give one with --chat-template, or a text instead")
        return self.template

    def _encoded(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> tuple[str, list[int]]:
        form = tool_format(template.text)
        silent = form is not None and form.name == "lfm2" and "tool_calls" not in template.text

        def rendered(messages: Any, tools: Any) -> str:
            if silent and form is not None and form.end is not None:
                messages = calls_as_content(messages, form.begin, form.end)
            return template.render(messages, tools=tools, generation_prompt=True, variables=variables)

        text, messages = first_rendered(lambda given: rendered(given, tools), messages)
        markers = [marker for marker in self._special.values() if marker]
        found: list[str] = []

        def hide(value: str) -> str:
            for marker in sorted(markers, key=len, reverse=True):
                if marker in value:
                    found.append(marker)
                    value = value.replace(marker, _STAND_IN.format(len(found) - 1))
            return value

        hidden = _mapped(messages, hide), _mapped(tools, hide)
        if not found:
            return text, self.tokenizer.encode(text, special_tokens=False)
        masked = rendered(*hidden)
        parts = re.split(_STAND_IN.format("([0-9]+)"), masked)
        parts[1::2] = [found[int(index)] for index in parts[1::2]]
        if "".join(parts) != text:
            raise RunError(
                f"a message holds the special token {found[0]}, and the chat template does not keep it as it is",
                place="messages",
                remedy="leave it out",
            )
        ids: list[int] = []
        for index, part in enumerate(parts):
            ids += self._part(part, markers_as_text=index % 2 == 1, first=not ids)
        return text, ids

    def _part(self, text: str, *, markers_as_text: bool, first: bool) -> list[int]:
        """Ids of a part of a text: behind a line end, since tokenizers of SentencePiece add a space to a beginning."""
        if not text:
            return []
        if not first:
            line = self.tokenizer.encode("\n", special_tokens=False)
            ids = self.tokenizer.encode("\n" + text, special_tokens=False, markers_as_text=markers_as_text)
            if ids[: len(line)] == line:
                return ids[len(line) :]
        return self.tokenizer.encode(text, special_tokens=False, markers_as_text=markers_as_text)

    # --- answers ------------------------------------------------------------------------------------------------------

    def answer(
        self,
        session: Session,
        prompt: Prompt,
        limits: Limits,
        format: Format | None = None,
        cancelled: threading.Event | None = None,
        prefix: str | None = None,
    ) -> Answer:
        """The answer to a prompt, which is computed as it is iterated.

        prefix: the name under which the prefix cache keeps what the prompt shares with others.

        RunError for a format that cannot be met, and for tools where it is not known how the model writes calls.
        """
        if prompt.tools and self.template is not None:
            text = self.template.text
            if tool_format(text) is None and not has_channels(text):
                what = "moec does not know how a model of this chat template writes calls of tools"
                raise RunError(what, place=self.template.place, remedy="leave the tools out")
        constraint = None if format is None else self._constraint(session, prompt, format)
        most = limits.max_new_tokens
        if most is None:  # an answer that may go on behind the end of the context has no end of its own
            most = session.context if limits.drops else sys.maxsize
        generation = Generation(
            session,
            prompt.ids,
            most,
            limits.sampling,
            self.eos_ids,
            place=self.place,
            constraint=constraint,
            top_scores=limits.top_scores,
            cancelled=cancelled or threading.Event(),
            drafter=PromptLookup() if limits.draft is None else ModelDrafter(limits.draft, session),
            prefixes=self.prefixes,
            shared=prompt.shared,
            prefix_name=self._named(prefix),
            drop_oldest=limits.drops,
            keep_first=limits.kept(prompt.shared if prompt.messages is not None else 0),
        )
        generation.stats.dropped_messages = prompt.dropped
        if prompt.messages is None or self.template is None:
            return Answer(Text(generation, self.tokenizer.decode, limits.stop), Segments())
        text = self.template.text
        tools = tool_format(text) if prompt.tools else None
        if has_channels(text):
            source = Text(generation, self._decode_with(CHANNEL_MARKERS), limits.stop)
            return Answer(source, Channels(), one_call=prompt.one_call)
        kept = (*THINK_MARKERS, *call_markers(tools))
        segments = Segments(tools, thinks=has_thinking(text), thinking=prompt.thinking)
        return Answer(Text(generation, self._decode_with(kept), limits.stop), segments, one_call=prompt.one_call)

    def _constraint(self, session: Session, prompt: Prompt, format: Format) -> Constraint:
        if self._formats is None:
            text = read_text(self.tokenizer_file, limit=MAX_BYTES, fault=ArtifactError)
            self._formats = Formats(text, session.vocab_size, self.eos_ids, self.place)
        matcher = self._formats.matcher(format)
        if prompt.messages is None or self.template is None:
            return matcher
        if has_channels(self.template.text):
            what = "answers in channels cannot be held to a format"
            raise RunError(what, place=self.template.place, remedy="give a text instead of a conversation")
        return matcher if not prompt.thinking else AfterThinking(matcher, self._decode_with(THINK_MARKERS))

    def generate(
        self,
        session: Session,
        prompt: str | Sequence[Mapping[str, Any]] | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        top_scores: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        variables: Mapping[str, Any] | None = None,
        context_full: ContextFull = "error",
        keep_first: int | None = None,
        prefix: str | None = None,
    ) -> Answer:
        """The answer to a text, a conversation or ids, computed as it is iterated (`moec.assistant.answer.Answer`).

        What is None is what the model's generation_config.json recommends, else greedy. Numbers are those of
        `Sampling`, stop and top_scores those of `Limits`; max_new_tokens None: to the end of the context. tools: of a
        conversation, in OpenAI's form; calls are in the answer's `calls`. tool_choice: auto, none (as without tools),
        required (the answer is a call), or the name of the tool that it calls. json_schema, regex, grammar: what the
        answer must be. variables: what the chat template may read, such as `enable_thinking`. context_full, keep_first:
        whether a full context is an error, or the oldest tokens are dropped (`Limits`), and of a conversation that is
        too long the oldest questions before its answer begins (`fitting`). prefix: the name under which the beginning
        is kept in the folder that `moec.load(..., prefix_cache=DIR)` named: of a conversation the system prompt with
        its tools, of a text all but its last token. RunError for what is wrong, UserError for what is no name.
        """
        sampling = self.sampling.given(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            seed=seed,
        )
        stops = (stop,) if isinstance(stop, str) else stop
        limits = Limits(sampling, max_new_tokens, stops, top_scores, context_full=context_full, keep_first=keep_first)
        format = Format.of(json_schema=json_schema, regex=regex, grammar=grammar)
        called = None if tool_choice == "none" else tools
        given = self._prompt(prompt, called, variables, session.context if limits.drops else None)
        if tool_choice not in ("auto", "none"):
            if format is not None:
                raise RunError("a tool's call and another format at once", place="tool_choice", remedy="give one")
            format = self.must_call(given, None if tool_choice == "required" else tool_choice)
        return self.answer(session, given, limits, format, prefix=prefix)

    def keep_prefix(self, session: Session, name: str) -> None:
        """Keep what a session holds under a name (`SessionBase.keep_prefix`)."""
        self._named(name)
        assert self.prefixes is not None
        if not session.position:
            raise RunError("the session holds no tokens", place="prefix", remedy="prefill them first")
        try:
            self.prefixes.save(session, name)
        except OSError as error:
            raise RunError(f"cannot be kept: {error.strerror}", place="prefix", remedy="free the folder") from None

    def keep_beginning(
        self, session: Session, name: str, *, system: str | None = None, tools: Any = None
    ) -> tuple[int, int]:
        """Keep what conversations with a system prompt and tools begin with, computed or restored now.

        Returns its number of tokens, and how many of them were known. RunError where the template begins conversations
        in no common way, and as `keep_prefix`; the session then holds that beginning, or that of a question.
        """
        name = self._named(name) or name
        asked = [{"role": "user", "content": "?"}]
        begin = [] if system is None else [{"role": "system", "content": system}]
        prompt = self.chat_prompt([*begin, *asked], tools=tools, shared=True)
        if not prompt.shared:
            what = "conversations do not begin alike with this chat template"
            raise RunError(what, place="prefix", remedy="leave the name out")
        _, known = bring(session, prompt.ids, threading.Event(), self.place, self.prefixes, prompt.shared, name)
        assert self.prefixes is not None
        if not self.prefixes.has(name, prompt.ids[: prompt.shared]):  # a warning says why
            raise RunError(
                "the prefix was not kept", place="prefix", remedy="name a folder with room that can be written"
            )
        if getattr(session, "rewinds", False):
            session.rewind(prompt.shared)
        return prompt.shared, min(known, prompt.shared)

    def _named(self, name: str | None) -> str | None:
        """A checked name; RunError where there is no folder for it."""
        if name is None:
            return None
        if self.prefixes is None:
            what = "no folder was named in which prefixes are kept"
            raise RunError(what, place="prefix", remedy="load the artifact with prefix_cache=DIR")
        return checked_name(name)

    def _prompt(self, prompt: Any, tools: Any, variables: Any, within: int | None) -> Prompt:
        """within: the tokens that a conversation must fit in, by leaving out its oldest questions."""
        chat = not isinstance(prompt, str) and any(isinstance(part, Mapping) for part in prompt)
        if (tools or variables) and not chat:
            raise RunError("tools and variables are for conversations", remedy="give messages")
        if chat and within is not None:
            return self.fitting_prompt(list(prompt), within, tools=tools, variables=variables)
        if chat:
            return self.chat_prompt(prompt, tools=tools, variables=variables)
        return self.text_prompt(prompt, "the prompt") if isinstance(prompt, str) else Prompt(list(prompt))

    def must_call(self, prompt: Prompt, only: str | None = None, *, several: bool = True) -> Format:
        """The format of an answer to a conversation that calls a tool, the one named `only` if it is given.

        RunError where no tools were given with the conversation, or where the model's form of calls cannot be forced.
        """
        if not prompt.tools:
            raise RunError("there are no tools to call", place="tool_choice", remedy="give tools")
        text = self._template().text
        return call_format(tool_format(text), text, prompt.tools, only=only, several=several, special=self._special)

    def _decode_with(self, kept: Sequence[str]) -> Callable[[list[int]], str]:
        """Decoding without special tokens, `kept` apart."""
        left_out = {i for i, text in self._special.items() if text not in kept}
        if len(left_out) == len(self._special):
            return self.tokenizer.decode
        return lambda ids: self.tokenizer.decode([i for i in ids if i not in left_out], skip_special_tokens=False)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return value
