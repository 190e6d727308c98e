"""The chat template that a model brings: a conversation as its own text, and which parts of it are responses.

Rendered as transformers does (jinja2, sandboxed, blocks trimmed; `raise_exception` and `strftime_now` are known to
templates), with the tokens of `tokenizer_config.json`. A template is data from outside: it runs in jinja's sandbox,
below a limit of time and of length.
"""

from __future__ import annotations

import datetime
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from moec.compiler.errors import MissingExtra
from moec.compiler.files import read_text
from moec.training.data.document import ASSISTANT, Turns
from moec.training.data.shards import DataError

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
_MAX_BYTES = 16 << 20
_SECONDS = 5.0  # for one conversation; usual templates take a millisecond
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class ChatTemplate:
    """`text` is the jinja source; `tokens` what it may name, such as bos_token. `place` names it in messages."""

    text: str
    tokens: Mapping[str, str]
    place: str

    @staticmethod
    def beside(tokenizer: Path) -> ChatTemplate | None:
        """The template in a tokenizer's folder: chat_template.jinja, else that of tokenizer_config.json; None if none.

        DataError for one that cannot be read. Of several named ones it is `default`.
        """
        folder = tokenizer.parent
        config: dict[str, Any] = {}
        if (folder / CONFIG).exists():
            try:
                raw = json.loads(read_text(folder / CONFIG, limit=_MAX_BYTES, fault=DataError))
            except (ValueError, RecursionError) as error:
                what = f"not JSON: {str(error).splitlines()[0]}"
                raise DataError(what, place=str(folder / CONFIG)) from None
            config = raw if isinstance(raw, dict) else {}
        if (folder / TEMPLATE).exists():
            text: Any = read_text(folder / TEMPLATE, limit=_MAX_BYTES, fault=DataError)
            place = folder / TEMPLATE
        else:
            text, place = config.get("chat_template"), folder / CONFIG
        if isinstance(text, list):
            named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
            text = named.get("default")
        if not isinstance(text, str):
            return None
        return ChatTemplate(text, {n: t for n in _TOKENS if (t := _token(config.get(n))) is not None}, str(place))

    def render(self, turns: Sequence[tuple[str, str]], *, generation_prompt: bool = False) -> str:
        """The text of a conversation. DataError where the template refuses it or fails."""
        messages = [{"role": role, "content": text} for role, text in turns]
        limit = _MAX_BYTES + 64 * sum(len(text) for _, text in turns)
        pieces, length = [], 0
        try:
            with _within(_SECONDS, self.place):
                values = {**self.tokens, "messages": messages, "add_generation_prompt": generation_prompt}
                for piece in self._compiled().generate(**values):
                    length += len(piece)
                    if length > limit:
                        raise DataError("the chat template writes without end", place=self.place)
                    pieces.append(piece)
        except (DataError, MissingExtra):
            raise
        except Exception as error:  # jinja's own faults, and whatever an expression of the template raises
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise DataError(f"the chat template cannot be rendered: {reason}", place=self.place) from None
        return "".join(pieces)

    def render_responses(self, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
        """(text, [begin, end) in it of every response, with what ends its turn).

        A response begins where generating it would. DataError where the template tells a conversation otherwise as it
        goes on, so that no part of the text is the response.
        """
        whole = self.render(turns)
        spans = []
        for index, (role, _) in enumerate(turns):
            if role != ASSISTANT:
                continue
            before = self.render(turns[:index], generation_prompt=True)
            after = whole if index + 1 == len(turns) else self.render(turns[: index + 1])
            if not after.startswith(before) or not whole.startswith(after):
                raise DataError(
                    "the chat template tells earlier turns otherwise as a conversation goes on: which tokens are the "
                    "response is not known",
                    place=self.place,
                    remedy="give conversations of one response, or another template",
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _compiled(self) -> Any:
        if self.text not in _COMPILED:
            _COMPILED[self.text] = _environment().from_string(self.text)
        return _COMPILED[self.text]


_COMPILED: dict[str, Any] = {}


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _environment() -> Any:
    try:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtra("chat templates need jinja2", remedy="pip install 'moec[report]'") from None

    def refuse(message: str) -> None:
        raise DataError(f"the chat template refuses it: {message}")

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


@contextmanager
def _within(seconds: float, place: str) -> Iterator[None]:
    """DataError when the block takes longer, since a template can loop without writing; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise DataError(f"the chat template does not end within {seconds:.0f} seconds", place=place)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
