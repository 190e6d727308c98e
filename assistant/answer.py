"""An answer while it is generated: its text, its thinking, the tools that it calls, and why it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from moec.assistant.generate import Stats, Text
from moec.assistant.sampling import MAX_TOP, Sampling, TokenScore
from moec.assistant.segments import Piece
from moec.assistant.stops import StopStrings
from moec.assistant.tool_formats import ToolCall
from moec.compiler.errors import RunError

if TYPE_CHECKING:
    from moec.compiler.target import Session

ContextFull = Literal["error", "drop_oldest"]


@dataclass(frozen=True)
class Limits:
    """How an answer is drawn and where it ends. max_new_tokens None: at the end of the context.

    top_scores: None, or the number of likeliest tokens whose log-probabilities are reported beside each taken one.
    draft: a session of a small model with the same tokenizer that drafts tokens, where that changes no bit; None:
    drafts are looked up in the text so far (`assistant/speculate.py`).
    context_full: what happens where the context is full. "error": a prompt that is too long is a RunError, and an
    answer ends. "drop_oldest": the first `keep_first` tokens stay, the older half of the others is dropped, and the
    answer goes on (`Generation`); max_new_tokens None is then as many as the context holds. keep_first None: of a
    conversation, the system prompt with its tools; of a text, 0. RunError for values out of range.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    top_scores: int | None = None
    draft: Session | None = None
    context_full: ContextFull = "error"
    keep_first: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise RunError(f"{self.max_new_tokens} new tokens", remedy="use 0 or above")
        if self.top_scores is not None and not 0 <= self.top_scores <= MAX_TOP:
            raise RunError(f"log-probabilities of {self.top_scores} tokens", remedy=f"use 0 to {MAX_TOP}")
        if self.context_full not in get_args(ContextFull):
            raise RunError(f"context_full {self.context_full!r}"[:60], remedy="use error or drop_oldest")
        if self.keep_first is not None and self.context_full == "error":
            raise RunError("nothing is dropped", place="keep_first", remedy="say context_full drop_oldest, too")
        if self.keep_first is not None and self.keep_first < 0:
            raise RunError(f"{self.keep_first} tokens", place="keep_first", remedy="keep 0 or more")
        StopStrings(self.stop)

    @property
    def drops(self) -> bool:
        return self.context_full == "drop_oldest"

    def kept(self, shared: int) -> int:
        """How many of the first tokens are never dropped; `shared` if nothing else was said."""
        return shared if self.keep_first is None else self.keep_first


@dataclass(frozen=True)
class Step:
    """The result of one token: parts of the answer that became certain, and its log-probability if requested."""

    pieces: Sequence[Piece]
    scores: Sequence[TokenScore] = ()


class Splitter(Protocol):
    """Splits text into answer, thinking and calls (`assistant/segments.py`)."""

    def push(self, piece: str) -> list[Piece]: ...
    def finish(self) -> list[Piece]: ...


class Answer(Iterator[str]):
    """Iterate over it for the pieces of its text, or over `steps()` for everything; once.

    text, thinking, calls, scores, stats: the state so far. one_call: it ends behind its first call of a tool. RunError
    at the end if a format was requested and the answer ended before it was complete; `text` then holds what was
    generated.
    """

    def __init__(self, source: Text, splitter: Splitter, *, one_call: bool = False) -> None:
        self._source, self._splitter, self._one_call = source, splitter, one_call
        self.text = ""
        self.thinking = ""
        self.calls: list[ToolCall] = []
        self._pieces = self._texts()

    @property
    def stats(self) -> Stats:
        return self._source.generation.stats

    @property
    def ids(self) -> list[int]:
        """The tokens taken so far."""
        return self._source.ids

    @property
    def scores(self) -> list[TokenScore]:
        return self._source.generation.scores

    @property
    def unfinished(self) -> bool:
        """Whether a format was requested and is not complete."""
        constraint = self._source.generation.constraint
        return constraint is not None and not constraint.accepting

    def cancel(self) -> None:
        """End it before the next token; from any thread."""
        self._source.generation.cancelled.set()

    def __next__(self) -> str:
        return next(self._pieces)

    def _texts(self) -> Iterator[str]:
        for step in self.steps():
            for piece in step.pieces:
                if piece.kind == "text":
                    yield piece.text
        self.check_finished()

    def check_finished(self) -> None:
        """RunError, once the answer has ended, if a requested format is not complete; the message says what ended
        it."""
        if self.unfinished:
            raise RunError(
                f"the answer ended before its format was whole: stopped by {self.stats.stopped} "
                f"behind {self.stats.new_tokens} tokens",
                remedy="allow more tokens, or ask for less",
            )

    def steps(self) -> Iterator[Step]:
        """Everything, token by token; an incomplete format raises nothing (see `unfinished`)."""
        told = 0
        for text in self._source:
            pieces = self._taken(self._splitter.push(text))
            yield Step(pieces, self.scores[told:])
            told = len(self.scores)
            if self._called:
                self.stats.stopped = "complete"
                return
        if pieces := self._taken(self._splitter.finish()):
            yield Step(pieces)

    @property
    def _called(self) -> bool:
        """Whether the only call was made."""
        return self._one_call and bool(self.calls)

    def _taken(self, pieces: list[Piece]) -> list[Piece]:
        taken: list[Piece] = []
        for piece in pieces:
            if self._called:
                break
            taken.append(piece)
            if piece.kind == "text":
                self.text += piece.text
            elif piece.kind == "thinking":
                self.thinking += piece.text
            elif piece.call is not None:
                self.calls.append(piece.call)
        return taken
