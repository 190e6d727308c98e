"""An answer taken apart as it comes: what is said, what is thought, which tools are called.

The text of a model comes in pieces; a marker may lie across them. Nothing is lost: what looks like a call and is none,
or is cut off, is said as text.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from moec.assistant.tool_formats import ToolCall, ToolFormat, call_of

Kind = Literal["text", "thinking", "call"]
_THINK, _THOUGHT = "<think>", "</think>"
_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
#: Texts that a format is told by, and which are kept when ids are decoded even where they are special tokens.
CHANNEL_MARKERS = (_CHANNEL, _MESSAGE, "<|constrain|>", *_ENDS)
THINK_MARKERS = (_THINK, _THOUGHT)


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text or thinking as it is to be shown, or a call."""

    kind: Kind
    text: str = ""
    call: ToolCall | None = None


class _Pieces(ABC):
    """`_text`: what has come and is not decided yet."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, piece: str) -> list[Piece]:
        """What is certain now."""
        self._text += piece
        found: list[Piece] = []
        while self._step(found):
            pass
        return found

    @abstractmethod
    def _step(self, found: list[Piece]) -> bool:
        """Decide up to the next marker; False when more text is needed."""


class Segments(_Pieces):
    """Takes the pieces of an answer's text, gives it apart. `thinking`: it begins inside a thinking segment."""

    def __init__(self, tools: ToolFormat | None = None, *, thinks: bool = False, thinking: bool = False) -> None:
        super().__init__()
        self._tools, self._thinks = tools, thinks or thinking
        self._state: Kind = "thinking" if thinking else "text"
        self._opened = ""  # the marker that began the call
        self._begun = False  # whether anything but white space was said
        self._skip_space = thinking

    def finish(self) -> list[Piece]:
        """What was held back, once the answer has ended."""
        found: list[Piece] = []
        if self._state == "call":
            self._end_call(found, self._text)
        else:
            self._say(found, self._text)
        self._text = ""
        return found

    def _step(self, found: list[Piece]) -> bool:
        if self._state == "call":
            end = None if self._tools is None else self._tools.end
            at = -1 if end is None else self._text.find(end)
            if at < 0 or end is None:
                return False
            body, self._text = self._text[:at], self._text[at + len(end) :]
            self._end_call(found, body, end)
            return True
        marks = self._marks()
        at, mark = min(((at, m) for m in marks if (at := self._at(m)) >= 0), default=(-1, ""))
        if self._opens(self._text):
            space = len(self._text) - len(self._text.lstrip())
            self._say(found, self._text[:space])
            self._state, self._opened, self._text = "call", "", self._text[space:]
            return True
        if at < 0:
            keep = _held(self._text, marks)
            said, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
            self._say(found, said)
            return False
        self._say(found, self._text[:at])
        self._text = self._text[at + len(mark) :]
        if mark == _THINK:
            self._state, self._skip_space = "thinking", True
        elif mark == _THOUGHT:
            self._state, self._skip_space = "text", True
        else:
            self._state, self._opened = "call", mark
        return True

    def _marks(self) -> list[str]:
        if self._state == "thinking":
            return [_THOUGHT]
        marks = [self._tools.begin] if self._tools is not None else []
        return [*marks, _THINK] if self._thinks and not self._begun else marks

    def _at(self, mark: str) -> int:
        """Where a marker stands, -1 for nowhere; thinking begins an answer, and is a text in the middle of one."""
        at = self._text.find(mark)
        return -1 if mark == _THINK and self._text[: max(at, 0)].strip() else at

    def _opens(self, text: str) -> bool:
        """Whether the answer begins as a call without a marker does."""
        opens = None if self._tools is None else self._tools.opens
        return opens is not None and not self._begun and text.lstrip().startswith(opens)

    def _say(self, found: list[Piece], text: str) -> None:
        if self._skip_space:  # line ends around a thinking segment belong to its markers
            text = text.lstrip("\n")
            self._skip_space = not text
        if not text:
            return
        if self._state == "text" and text.strip():
            self._begun = True
        found.append(Piece(self._state, text))

    def _end_call(self, found: list[Piece], body: str, end: str = "") -> None:
        assert self._tools is not None
        calls = self._tools.parse(body.strip())
        self._state, self._begun = "text", True
        if calls is None:
            found.append(Piece("text", f"{self._opened}{body}{end}"))
        else:
            found.extend(Piece("call", call=call) for call in calls)
            self._skip_space = True  # a line end between calls


class Channels(_Pieces):
    """As `Segments`, for GPT-OSS's form: messages with a channel each, `analysis`, `commentary` or `final`.

    A message to `functions.NAME` is a call of that tool.
    """

    def __init__(self) -> None:
        super().__init__()
        self._header: str | None = ""  # of the message that begins; None inside one
        self._kind: Kind = "text"
        self._to: str | None = None

    def finish(self) -> list[Piece]:
        """What was held back, once the answer has ended."""
        found: list[Piece] = []
        if self._header is None:
            self._end(found, self._text)
        elif not self._text.strip().startswith(("<|", "assistant")):  # a model that does not keep to the form
            found += [Piece("text", self._text)] if self._text.strip() else []
        self._text, self._header = "", ""
        return found

    def _step(self, found: list[Piece]) -> bool:
        if self._header is not None:
            at = self._text.find(_MESSAGE)
            if at < 0:
                return False
            self._begin(self._text[:at])
            self._text = self._text[at + len(_MESSAGE) :]
            return True
        at, end = min(((at, m) for m in _ENDS if (at := self._text.find(m)) >= 0), default=(-1, ""))
        if at >= 0:
            body, self._text = self._text[:at], self._text[at + len(end) :]
            self._end(found, body)
            self._header = ""
            return True
        if self._to is None:
            keep = _held(self._text, _ENDS)
            said, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
            found += [Piece(self._kind, said)] if said else []
        return False

    def _begin(self, header: str) -> None:
        self._header = None
        to = re.search(r"to=functions\.([\w.-]+)", header)
        channel = re.search(r"<\|channel\|>\s*(\w+)", header)
        self._to = to[1] if to else None
        self._kind = "thinking" if channel is not None and channel[1] == "analysis" and to is None else "text"

    def _end(self, found: list[Piece], body: str) -> None:
        if self._to is None:
            found += [Piece(self._kind, body)] if body else []
            return
        call = call_of({"name": self._to, "arguments": body.strip() or "{}"})
        found.append(Piece("text", body) if call is None else Piece("call", call=call))
        self._to = None


def has_channels(template: str) -> bool:
    """Whether a chat template writes GPT-OSS's channels."""
    return _CHANNEL in template


def has_thinking(template: str) -> bool:
    """Whether a chat template knows `<think>`."""
    return _THOUGHT in template


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thinking segment, so that the answer begins there."""
    return prompt.rstrip().endswith(_THINK)


def _held(text: str, marks: list[str] | tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a marker."""
    longest = max((len(mark) for mark in marks), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
