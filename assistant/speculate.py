"""Speculative decoding: several tokens are drafted and checked in one call; those that the model itself takes are kept.

It needs a session on which a token gives the same logits, bit for bit, alone and among others (`Session.exact_calls`).
The text is then the same with and without it, for every way of sampling. Whether it saves time depends on the text and
the machine: it measures that, and pauses while it does not.

V is the vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moec.compiler.errors import LostFileError, RunError

if TYPE_CHECKING:
    from moec.compiler.target import Session

_LENGTHS = (1, 2, 3, 5, 7, 11, 15)  # drafted tokens of one call
_FIRST = 3
_GRAMS = (3, 2)  # so many last tokens must have occurred before
_UNSURE = 2  # tokens of a draft that only the shorter one speaks for


class Drafter(Protocol):
    """Drafts the tokens that follow."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`; empty without a draft."""


class PromptLookup:
    """Prompt lookup decoding: drafts the tokens that followed when the text's last tokens occurred before.

    These are the last three or else the last two, after which few tokens are drafted. One object serves one text that
    grows.
    """

    def __init__(self) -> None:
        self._known = 0  # tokens that `_behind` covers; a text only grows
        # the position behind the latest occurrence of each gram, the last tokens' own aside
        self._behind: dict[tuple[int, ...], int] = {}

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        if len(tokens) < self._known:
            self._known, self._behind = 0, {}
        for end in range(max(self._known, min(_GRAMS)), len(tokens)):
            for gram in _GRAMS:
                if gram <= end:
                    self._behind[tuple(tokens[end - gram : end])] = end
        self._known = len(tokens)
        for gram in _GRAMS:
            begin = self._behind.get(tuple(tokens[-gram:]))
            if begin is not None:
                return list(tokens[begin : begin + (most if gram == _GRAMS[0] else min(most, _UNSURE))])
        return []


class ModelDrafter:
    """Drafts with a small model of the same vocabulary, greedily."""

    def __init__(self, session: Session, of: Session) -> None:
        """RunError unless `session` has the vocabulary of the session `of` and rewinds to any position."""
        if session.vocab_size != of.vocab_size:
            what = f"the draft has a vocabulary of {session.vocab_size} tokens, the model one of {of.vocab_size}"
            raise RunError(what, remedy="draft with a model of the same tokenizer")
        if not getattr(session, "rewinds", False):
            raise RunError("the draft's states do not go back to an earlier position", remedy="take another draft")
        self._session = session

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        held, same = self._session.tokens, 0
        while same < min(len(held), len(tokens) - 1) and held[same] == tokens[same]:
            same += 1
        found: list[int] = []
        if len(tokens) + most > self._session.context:
            return found
        self._session.rewind(same)
        logits = self._session.prefill(list(tokens[same:]))[0]
        while True:
            found.append(int(np.asarray(logits).argmax()))
            if len(found) == most:
                return found
            logits = self._session.decode(found[-1])


@dataclass
class Speculation:
    """Counts. tried: drafted tokens that were checked; kept: those that the model itself took; calls: checks."""

    tried: int = 0
    kept: int = 0
    calls: int = 0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were kept, 0 to 1."""
        return self.kept / self.tried if self.tried else 0.0


class Pays:
    """Whether drafting is faster than single steps, by measured time.

    The gain of a call is the time that its tokens would have taken one by one over the time that it took. When the mean
    of the last calls falls below 1, drafting pauses for 16 steps, then for twice as many each time.
    """

    def __init__(self) -> None:
        self._step: float | None = None  # seconds of a single token
        self._worth = 1.3
        self._rest, self._resting = 16, 0

    def now(self) -> bool:
        if self._step is None:  # nothing to compare with yet
            return False
        if self._resting:
            self._resting -= 1
            return False
        return True

    def stepped(self, seconds: float) -> None:
        self._step = seconds if self._step is None else 0.8 * self._step + 0.2 * seconds

    def steps(self, seconds: float) -> float:
        """How many single tokens take as long."""
        assert self._step is not None
        return seconds / max(self._step, 1e-9)

    def checked(self, tokens: int, seconds: float) -> None:
        """Record a call of which the first `tokens` tokens were kept."""
        assert self._step is not None
        self._worth = 0.6 * self._worth + 0.4 * tokens * self._step / max(seconds, 1e-9)
        if self._worth >= 1.0:
            self._rest = 16
            return
        self._resting, self._rest, self._worth = self._rest, min(2 * self._rest, 1024), 1.0


class DraftLength:
    """How many tokens the next draft has: those that promise the most tokens for their time.

    Known are how often drafted tokens were kept and, in times of a single step, what checks of other lengths took.
    Lengths between two of these lie on the line between them, longer ones on the line beyond, so that an untried one is
    tried where the last one paid. What is known grows old: a measurement that came out badly once does not stand for
    ever.
    """

    def __init__(self) -> None:
        self._cost = {1: 1.0}  # tokens of a call -> single steps that take as long
        self._kept, self._missed = 1.4, 0.6

    def value(self) -> int:
        if len(self._cost) == 1:
            return _FIRST
        share = (self._kept + 0.35) / (self._kept + self._missed + 0.5)
        best, most = 1, 0.0
        for length in _LENGTHS:
            tokens, likely = 1.0, 1.0
            for _ in range(length):
                likely *= share
                tokens += likely
            if tokens / self._at(length + 1) > most:
                best, most = length, tokens / self._at(length + 1)
        return best

    def checked(self, tokens: int, drafted: int, steps: float) -> None:
        """Record a call of 1 + `drafted` tokens that took as long as `steps` single ones and gave `tokens`."""
        self._kept = 0.8 * self._kept + (tokens - 1)
        self._missed = 0.8 * self._missed + (tokens <= drafted)
        for size in self._cost:
            self._cost[size] = max(1.0, 0.99 * self._cost[size])
        size = 1 + drafted
        self._cost[size] = steps if size not in self._cost else 0.7 * self._cost[size] + 0.3 * steps

    def _at(self, size: int) -> float:
        below = max(n for n in self._cost if n <= size)
        above = min((n for n in self._cost if n > size), default=None)
        if below == size:
            return self._cost[below]
        if above is None:
            below, above = sorted(self._cost)[-2:]
        slope = (self._cost[above] - self._cost[below]) / (above - below)
        return self._cost[below] + max(slope, 0.0) * (size - below)


class Steps:
    """Logits after one token after the other, by single steps or by checked drafts; the same bits either way."""

    def __init__(
        self, session: Session, drafter: Drafter | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`session` holds the prompt. The drafter is not used on sessions where drafts could change a bit."""
        able = getattr(session, "exact_calls", False) and getattr(session, "rewinds", False)
        self._session, self._drafter, self._clock = session, drafter if able else None, clock
        self._tokens, self._turn = session.tokens, session.turn
        self._ahead: list[
            tuple[int, np.ndarray]
        ] = []  # drafted tokens that the session holds, and the logits after each
        # of the last check: tokens that counted so far, drafted tokens, seconds
        self._checked: tuple[int, int, float] | None = None
        self._pays, self._length = Pays(), DraftLength()
        self.speculation = Speculation()

    @property
    def position(self) -> int:
        """Number of tokens that were taken, among those that the session holds."""
        return len(self._tokens)

    def next(self, token: int) -> np.ndarray:
        """Append a token; the logits after it, float32 [V]. RunError as `Session.decode`, and where the session holds
        something else than these steps have appended."""
        self._check_ours()
        if self._ahead and self._ahead[0][0] == token:
            self._tokens.append(token)
            self.speculation.kept += 1
            assert self._checked is not None
            self._checked = self._checked[0] + 1, *self._checked[1:]
            return self._ahead.pop(0)[1]
        self._settle()
        logits = self._with_guesses(token)
        if logits is None:
            started = self._clock()
            logits = self._session.decode(token)
            self._pays.stepped(self._clock() - started)
        self._tokens.append(token)
        return np.asarray(logits)

    def _with_guesses(self, token: int) -> np.ndarray | None:
        """The logits after a token by a call that checks guesses, too; None without any.

        A guess may be a token that the model fails on, or the drafter itself may fail: then there are no more guesses.
        """
        started = self._clock()
        try:
            guesses = self._guesses(token)
            if not guesses:
                return None
            rows = self._session.prefill([token, *guesses], "all")
        except LostFileError:
            raise
        except RunError:
            if not self._ours():
                raise
            self._drafter = None
            return None
        self._checked = 1, len(guesses), self._clock() - started
        self._ahead = list(zip(guesses, rows[1:], strict=True))
        self.speculation.tried += len(guesses)
        self.speculation.calls += 1
        return np.asarray(rows[0])

    def _check_ours(self) -> None:
        if not self._ours():
            what = "another answer has begun on this session, or it was changed, since the last token"
            raise RunError(what, remedy="end an answer before the next, or give each a session with fork()")

    def _ours(self) -> bool:
        """Whether the session holds the tokens that were taken and those ahead, and no other answer has begun."""
        held = len(self._tokens) + len(self._ahead)
        return self._session.turn == self._turn and self._session.position == held

    def drop(self, first: int, count: int, cancelled: threading.Event) -> bool:
        """Drop `count` tokens behind the first `first`, and compute those that stay anew, with the bits that they have
        in a session that never held others. False where `cancelled` was set meanwhile; RunError as `next`.
        """
        self._check_ours()
        self._settle()
        session = self._session
        tokens = self._tokens[:first] + self._tokens[first + count :]
        able = getattr(session, "exact_calls", False) and getattr(session, "rewinds", False)
        held = first if able else 0  # of calls that are cut otherwise the last bits may differ
        session.rewind(held)
        self._tokens = tokens[:held]
        if isinstance(self._drafter, PromptLookup):  # what it knows are positions of the former text
            self._drafter = PromptLookup()
        step = getattr(session, "max_tokens", len(tokens))
        for begin in range(held, len(tokens), step):
            if cancelled.is_set():
                return False
            session.prefill(tokens[begin : min(begin + step, len(tokens))], logits="last")
            self._tokens = tokens[: begin + step]
        return True

    def close(self) -> None:
        """Leave the session with the tokens that were taken; one that went on with something else, as it is."""
        if self._ours() and self._ahead:
            self._session.rewind(len(self._tokens))
        self._ahead, self._checked = [], None

    def _settle(self) -> None:
        """End the last check: record its gain, and set the length of the next draft."""
        if self._checked is not None:
            tokens, drafted, seconds = self._checked
            self._length.checked(tokens, drafted, self._pays.steps(seconds))
            self._pays.checked(tokens, seconds)
        self.close()

    def _guesses(self, token: int) -> list[int]:
        if self._drafter is None or not self._pays.now():
            return []
        session = self._session
        room = min(session.context - len(self._tokens), getattr(session, "max_tokens", _LENGTHS[-1] + 1)) - 1
        if room < 1:
            return []
        return self._drafter.draft([*self._tokens, token], min(self._length.value(), room))
