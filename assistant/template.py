"""The chat template that a model brings: a conversation as the text that the model was trained on.

What is rendered is, character for character, what transformers' `apply_chat_template` gives. A template is a program
from outside: it runs in jinja2's sandbox in a process of its own (`template_worker`), below limits of time, memory and
length.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.compiler.errors import ArtifactError, RunError, UserError
from moec.compiler.files import read_text
from moec.compiler.source import CHAT_TEMPLATE, TOKENIZER_CONFIG
from moec.compiler.worker import Fault, Worker

SECONDS = 5.0  # of processor time for one conversation; usual templates take a millisecond
MEMORY = 2 << 30  # bytes of address space: room for a template of megabytes and a conversation of megabytes
_MAX_BYTES = 16 << 20
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REMEDY = "take the model's chat_template.jinja, or give another with --chat-template"
#: Keys under which a message may bring its thinking; templates read the first, those of gpt-oss the second.
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """`text` is the jinja source; `tokens` what it may name, such as bos_token. `place` names it in messages."""

    text: str
    tokens: Mapping[str, Any]
    place: str

    @staticmethod
    def of_folder(
        folder: Path, given: Path | None = None, fault: type[UserError] = ArtifactError
    ) -> ChatTemplate | None:
        """The template of a model's folder: chat_template.jinja, else that of tokenizer_config.json; None if none.

        given: a file to take instead. Of several named ones it is `default`. `fault` for one that cannot be read.
        """
        config: dict[str, Any] = {}
        if (folder / TOKENIZER_CONFIG).exists():
            try:
                raw = json.loads(read_text(folder / TOKENIZER_CONFIG, limit=_MAX_BYTES, fault=fault))
            except (ValueError, RecursionError) as error:
                what = f"not JSON: {str(error).splitlines()[0]}"
                raise fault(what, place=str(folder / TOKENIZER_CONFIG)) from None
            config = raw if isinstance(raw, dict) else {}
        file = given or folder / CHAT_TEMPLATE
        if given is not None or file.exists():
            text: Any = read_text(file, limit=_MAX_BYTES, fault=fault)
        else:
            text, file = config.get("chat_template"), folder / TOKENIZER_CONFIG
        if isinstance(text, list):
            text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
        if not isinstance(text, str):
            return None
        tokens: dict[str, Any] = {n: t for n in _TOKENS if (t := _token(config.get(n))) is not None}
        extra = config.get("extra_special_tokens")
        if isinstance(extra, dict):
            tokens = {**{str(n): t for n, v in extra.items() if (t := _token(v)) is not None}, **tokens}
        return ChatTemplate(text, tokens, str(file))

    @property
    def variables(self) -> frozenset[str]:
        """What it reads: `tools` if it can tell a model of tools. ArtifactError if it is no template."""
        return _worker_of(self)[1]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation; with `generation_prompt`, up to where the model's answer begins.

        variables: what else the template may read, such as `enable_thinking`. RunError where the template refuses the
        conversation; ArtifactError where it fails, writes without end or does not end.
        """
        given = {
            **(variables or {}),
            "messages": [_with_thinking(m) for m in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        values = {**self.tokens, **given}
        try:
            json.dumps(given, ensure_ascii=False).encode()  # half a character is no UTF-8
            size = len(json.dumps(values))
        except UnicodeEncodeError:
            remedy = "give it as UTF-8"
            raise RunError("a conversation that holds half a character", place=self.place, remedy=remedy) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise RunError(f"a conversation that is not JSON: {str(error).splitlines()[0]}", place=self.place) from None
        worker, _ = _worker_of(self)
        try:
            found = worker.ask({"values": values, "limit": _MAX_BYTES + 64 * size}, seconds=SECONDS, memory=MEMORY)
        except Fault as fault:
            raise ArtifactError(f"cannot be rendered: {fault}", place=self.place, remedy=_REMEDY) from None
        if "refused" in found:
            raise RunError(f"the chat template refuses it: {found['refused']}", place=self.place)
        if "fault" in found:
            raise ArtifactError(f"cannot be rendered: {found['fault']}", place=self.place, remedy=_REMEDY)
        return str(found["text"])


def _with_thinking(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose thinking stands under the keys that templates read, as transformers does it."""
    thinking = next((message[key] for key in THINKING_KEYS if message.get(key) is not None), None)
    if thinking is None:
        return dict(message)
    return {"thinking": thinking, **message, "reasoning_content": thinking}


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


_workers: dict[str, tuple[Worker, frozenset[str]]] = {}
_starting = threading.Lock()
_MAX_WORKERS = 4  # templates that are in use at once; one process each


def _worker_of(template: ChatTemplate) -> tuple[Worker, frozenset[str]]:
    """The process that has compiled this template, started when it is first needed or has ended, and its variables."""
    with _starting:
        known = _workers.pop(template.text, None)
        if known is not None and known[0].alive:
            _workers[template.text] = known  # the one used last is the last to go
            return known
        while len(_workers) >= _MAX_WORKERS:
            _workers.pop(next(iter(_workers)))[0].close()
        data = template.text.encode("utf-8", "replace")
        worker = Worker("moec.assistant.template_worker", "the chat template", template.place, _REMEDY)
        try:
            found = worker.ask({"load": True}, data, seconds=SECONDS, memory=MEMORY)
        except Fault as fault:
            worker.close()
            raise ArtifactError(f"not a chat template: {fault}", place=template.place, remedy=_REMEDY) from None
        _workers[template.text] = worker, frozenset(map(str, found))
        return _workers[template.text]
