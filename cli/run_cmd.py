"""`moec run`: continue a text or ids with an artifact, or answer one question."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.asking import (
    ChatTemplateFile,
    ContextFullOption,
    Draft,
    Grammar,
    JsonSchema,
    KeepFirst,
    PrefixFolder,
    PrefixName,
    Regex,
    Threads,
    context_full_of,
    format_of,
    prefixes_in,
    show,
    told_of_dropping,
    tools_in,
)
from moec.cli.memory import CacheAware, MemoryMb, warn_of_preference
from moec.cli.sampling import (
    LogitBias,
    MinP,
    PresencePenalty,
    RepeatPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    sampling_of,
)
from moec.cli.trust import Trust
from moec.compiler.errors import RunError, UserError

if TYPE_CHECKING:
    from moec.assistant.answer import Answer, Limits
    from moec.assistant.generate import Stats
    from moec.compiler.artifact import Artifact

_MAX_PIPED = 64 << 20  # characters of a prompt on stdin: more than the longest context holds


def register(app: typer.Typer) -> None:
    app.command("run")(run_artifact)


def run_artifact(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that `moec compile` wrote.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - reads it from stdin.")] = None,
    ids: Annotated[str | None, typer.Option(help="The prompt as token ids, such as 1,2,3; prints ids.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a question, in the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system prompt.")] = None,
    tools: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --chat: tools that may be called, as OpenAI's JSON.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Stop after this many tokens.")] = 128,
    context_full: ContextFullOption = "error",
    keep_first: KeepFirst = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    presence_penalty: PresencePenalty = None,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0, max=100, help="With --json: log-probabilities of each token and of this many likeliest ones."
        ),
    ] = None,
    threads: Threads = None,
    memory_mb: MemoryMb = None,
    cache_aware: CacheAware = None,
    draft: Draft = None,
    prefix_cache: PrefixFolder = None,
    prefix: PrefixName = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; default: the artifact's.")] = None,
    chat_template: ChatTemplateFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print ids, text and rates as JSON at the end.")] = False,
    trust: Trust = False,
) -> None:
    """Continue a prompt, or answer it; the text streams to stdout, thinking and tokens per second go to stderr.

    Examples:

    [bold]moec run build/s --prompt "The capital of France is" --max-new-tokens 32[/bold]

    [bold]moec run build/s --chat --prompt "Name a city" --json-schema city.json[/bold]
    """
    from moec.assistant.answer import Limits
    from moec.compiler.artifact import Artifact

    if (prompt is None) == (ids is None):
        raise UserError("give either --prompt TEXT or --ids 1,2,3")
    for name, given in (
        ("--stop", stop),
        ("--json-schema", json_schema),
        ("--regex", regex),
        ("--grammar", grammar),
        ("--draft", draft),
        ("--prefix-cache", prefix_cache),
        ("--prefix", prefix),
    ):
        if ids is not None and (given or chat):
            raise UserError(f"{'--chat' if chat else name} is for text", remedy="give --prompt instead of --ids")
    for name, value in (("--system", system), ("--tools", tools), ("--chat-template", chat_template)):
        if value is not None and not chat:
            raise UserError(f"{name} is for conversations", remedy="add --chat")
    if logprobs is not None and not as_json:
        raise UserError("--logprobs are told in JSON", remedy="add --json")
    prompt_ids = [] if ids is None else _parse_ids(ids)
    sampling = sampling_of(
        artifact,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        presence_penalty=presence_penalty,
        logit_bias=logit_bias,
        seed=seed,
    )
    policy = context_full_of(context_full, keep_first)
    limits = Limits(sampling, max_new_tokens, stop or (), logprobs, context_full=policy, keep_first=keep_first)
    format = format_of(json_schema, regex, grammar)
    opened = Artifact.open(artifact).with_threads(threads).within(memory_mb, cache_aware)
    warn_of_preference(opened)
    if ids is not None:
        return _run_ids(opened, prompt_ids, limits, as_json=as_json)

    from moec.assistant.assistant import Assistant
    from moec.assistant.load import load_draft, load_session

    text = _piped() if prompt == "-" else prompt
    assert text is not None
    assistant = Assistant.of(opened, tokenizer=tokenizer, chat_template=chat_template)
    assistant.prefixes = prefixes_in(prefix_cache, opened, prefix)
    if chat:
        question = [{"role": "user", "content": text}]
        messages = question if system is None else [{"role": "system", "content": system}, *question]
        given_tools = None if tools is None else tools_in(tools)
        if limits.drops:  # the question stays whole: what does not fit beside it is an error
            context = opened.manifest.model.context
            given_prompt = assistant.fitting_prompt(messages, context, tools=given_tools)
        else:
            given_prompt = assistant.chat_prompt(messages, tools=given_tools)
    else:
        given_prompt = assistant.text_prompt(text)
    session = load_session(opened)
    helper = None
    try:
        if draft is not None:
            helper = load_draft(draft, opened, session, trust=trust)
            limits = replace(limits, draft=helper)
        answer = assistant.answer(session, given_prompt, limits, format, prefix=prefix)
        _print_answer(answer, show_text=not as_json)
    finally:
        session.close()
        if helper is not None:
            helper.close()
    if as_json:
        more = {"thinking": answer.thinking, "tool_calls": [vars(call) for call in answer.calls]} if chat else {}
        _print_json(given_prompt.ids, answer.ids, answer.text, answer, logprobs, more)
    _print_stats(answer.stats, limits)
    answer.check_finished()


def _print_answer(answer: Answer, *, show_text: bool) -> None:
    thought = False
    for step in answer.steps():
        for piece in step.pieces:
            if not show_text:
                continue
            if piece.kind == "thinking":
                show(piece.text, sys.stderr)
                thought = True
            elif piece.call is not None:
                show(json.dumps({"name": piece.call.name, "arguments": json.loads(piece.call.arguments)}) + "\n")
            else:
                if thought:
                    print(file=sys.stderr)
                    thought = False
                show(piece.text)
    if show_text:
        print(flush=True)


def _run_ids(opened: Artifact, prompt_ids: list[int], limits: Limits, *, as_json: bool) -> None:
    from moec.assistant.generate import Generation
    from moec.assistant.load import load_session

    session = load_session(opened)
    new: list[int] = []
    try:
        assert limits.max_new_tokens is not None
        stops = frozenset(opened.manifest.model.eos_ids)
        generation = Generation(
            session,
            prompt_ids,
            limits.max_new_tokens,
            limits.sampling,
            stops,
            place=str(opened.folder),
            top_scores=limits.top_scores,
            drop_oldest=limits.drops,
            keep_first=limits.kept(0),
        )
        for token in generation:
            if not as_json:
                show(f"{',' if new else ''}{token}")
            new.append(token)
    finally:
        session.close()
    if as_json:
        _print_json(prompt_ids, new, None, generation, limits.top_scores, {})
    else:
        print(flush=True)
    _print_stats(generation.stats, limits)


def _print_json(
    prompt_ids: list[int], new: list[int], text: str | None, source: Any, logprobs: int | None, more: dict[str, Any]
) -> None:
    from moec.cli.output import emit_json

    found = {"prompt_ids": prompt_ids, "ids": new, "text": text, **more, **vars(source.stats)}
    emit_json(found if logprobs is None else {**found, "logprobs": [vars(score) for score in source.scores]})


def _print_stats(stats: Stats, limits: Limits) -> None:
    if told := told_of_dropping(stats):
        print(told, file=sys.stderr)
    print(
        f"prefill {stats.prompt_tokens} tokens, {stats.prefill_rate:.1f} tok/s; "
        f"decode {stats.new_tokens} tokens, {stats.decode_rate:.1f} tok/s{_guesses(stats)}; {limits.sampling.words()}; "
        f"stopped by {stats.stopped}",
        file=sys.stderr,
    )


def _guesses(stats: Stats) -> str:
    if not stats.drafted_tokens:
        return ""
    return f", {stats.accepted_tokens} of {stats.drafted_tokens} guesses right"


def _piped() -> str:
    """The prompt on stdin."""
    text = sys.stdin.read(_MAX_PIPED + 1)
    if len(text) > _MAX_PIPED:
        raise RunError(f"a prompt of more than {_MAX_PIPED} characters", place="stdin")
    return text


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise RunError(f"--ids {text[:40]!r} is not a list of token ids", remedy="write them as 1,2,3") from None
    if any(abs(i) >= 1 << 63 for i in ids):
        raise RunError("a token id is out of range", remedy="ids are below the vocabulary size")
    return ids
