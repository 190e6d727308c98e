"""Tokens from a session, and text from tokens, that never splits a character.

Works on any `Session`. V is the vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moec.assistant.sampling import Sampler, Sampling, TokenScore, score
from moec.assistant.speculate import Drafter, PromptLookup, Steps
from moec.assistant.stops import StopStrings
from moec.compiler.errors import RunError

if TYPE_CHECKING:
    from moec.assistant.prefixes import PrefixCache
    from moec.compiler.target import Session

log = logging.getLogger("moec.prefixes")


class TextStream:
    """Turns ids into text as they come; the pieces joined are the decoding of all ids.

    Decoding one id alone loses leading spaces and breaks characters that span ids, so each piece is the difference of
    two decodings that begin at the same earlier id, held back while it ends in an unfinished character.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the context of the next piece, then the ids not yet shown in full
        self._context = 0
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that became certain with this id; may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # every one at the end: SentencePiece's byte fallback gives one for each byte of an unfinished character
        certain = text.rstrip("�")
        unfinished = len(certain) < len(text)
        piece = certain[len(self._shown) :]
        self._shown = certain if len(certain) > len(self._shown) else self._shown
        if not unfinished and len(self._ids) > self._context:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._shown = self._decode(self._ids)
        return piece

    def finish(self) -> str:
        """What was held back: an unfinished character comes out as U+FFFD."""
        piece = self._decode(self._ids)[len(self._shown) :]
        self._ids, self._context, self._shown = [], 0, ""
        return piece


class Text:
    """The text of a generation in pieces, one for each token and one at the end; iterate once. `ids`: those so far.

    The pieces joined are `text`: the decoding of all ids, cut where a stop string begins. A piece may be empty.
    """

    def __init__(self, generation: Generation, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.generation = generation
        self.ids: list[int] = []
        self.text = ""
        self._stream = TextStream(decode)
        self._stops = StopStrings(stops)

    def __iter__(self) -> Iterator[str]:
        for token in self.generation:
            self.ids.append(token)
            yield self._shown(self._stops.push(self._stream.push(token)))
            if self._stops.found is not None:
                self.generation.stats.stopped = "stop string"
                return
        yield self._shown(self._stops.push(self._stream.finish()) + self._stops.finish())
        if self._stops.found is not None:
            self.generation.stats.stopped = "stop string"

    def _shown(self, piece: str) -> str:
        self.text += piece
        return piece


class Constraint(Protocol):
    """What may follow: structured output (`assistant/structured.py`)."""

    @property
    def accepting(self) -> bool:
        """Whether the text so far is whole."""

    @property
    def complete(self) -> bool:
        """Whether it is whole and nothing can follow."""

    def allowed(self) -> np.ndarray | None:
        """The tokens that may come next, bool [V]; None for all. RunError where the constraint gives up."""

    def take(self, token: int) -> None:
        """The next token, one of those allowed."""


class AfterThinking:
    """A `Constraint` that begins behind `</think>`: until then everything may come."""

    def __init__(self, inner: Constraint, decode: Callable[[list[int]], str]) -> None:
        self._inner, self._decode = inner, decode
        self._begun = False
        self._ids: list[int] = []  # the last ones; a marker of several tokens fits in

    @property
    def accepting(self) -> bool:
        return self._begun and self._inner.accepting

    @property
    def complete(self) -> bool:
        return self._begun and self._inner.complete

    def allowed(self) -> np.ndarray | None:
        return self._inner.allowed() if self._begun else None

    def take(self, token: int) -> None:
        if self._begun:
            return self._inner.take(token)
        self._ids = [*self._ids[-15:], token]
        self._begun = self._decode(self._ids).rstrip().endswith("</think>")
        return None


@dataclass
class Stats:
    """Counts in tokens, times in seconds.

    stopped: "stop token", "stop string", "length", "context", "cancelled", or "complete" where a constraint lets
    nothing follow, or the only call of a tool was made. reused_tokens: those of the prompt that the session already
    held. drafted_tokens: guesses that were checked (`assistant/speculate.py`), accepted_tokens: those of them that the
    model said itself. dropped_tokens: of prompt and answer, where the context was full; prompt_tokens counts the whole
    prompt, with those of it that were dropped before anything was computed (cut_tokens). dropped_messages: the oldest
    ones of a conversation, which its prompt does not contain.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped: str = "length"
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    dropped_tokens: int = 0
    cut_tokens: int = 0
    dropped_messages: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, without those that were there."""
        computed = self.prompt_tokens - self.cut_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second; the first of them came with the prefill and is not counted."""
        return max(self.new_tokens - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0


def bring(
    session: Session,
    ids: Sequence[int],
    cancelled: threading.Event,
    place: str | None = None,
    prefixes: PrefixCache | None = None,
    shared: int = 0,
    name: str | None = None,
) -> tuple[np.ndarray | None, int]:
    """Make a session hold exactly `ids`: logits behind the last, float32 [V], and how many of them were there.

    prefixes: where beginnings of prompts are found, and the first `shared` ids of this one are kept, under a name if
    one is given.
    What the session holds is computed again from where it differs only. None where `cancelled` was set meanwhile.
    RunError at `place` as `Session.prefill`; then the session is as it was.
    """
    if len(ids) > session.context:
        what = f"{len(ids)} tokens do not fit: the context holds {session.context}"
        raise RunError(what, place=place, remedy="shorten the prompt")
    if wrong := [i for i in ids if not 0 <= i < session.vocab_size]:
        what = f"token id {wrong[0]} is not in the vocabulary"
        raise RunError(what, place=place, remedy=f"ids are 0 to {session.vocab_size - 1}")
    held = session.tokens
    same = 0
    while same < min(len(held), len(ids) - 1) and held[same] == ids[same]:
        same += 1
    if same < len(held) and not getattr(session, "rewinds", False):
        same = 0
    if prefixes is not None:
        same = prefixes.restore(session, ids, same)
        held = session.tokens
    keep = prefixes is not None and 0 < shared < len(ids)
    if keep and prefixes is not None and same >= shared:
        keep = name is not None and not prefixes.has(name, ids[:shared])
        if keep:
            same = shared if same == len(held) == shared or getattr(session, "rewinds", False) else 0
    if same < len(held):
        session.rewind(same)
    if keep and prefixes is not None and same == shared:
        _keep(prefixes, session, name, place)
        keep = False
    logits = None
    step = getattr(session, "max_tokens", len(ids))  # a call takes no more, and is not interrupted
    for first, last in ((same, shared), (shared, len(ids))) if keep else ((same, len(ids)),):
        for begin in range(first, last, step):
            if cancelled.is_set():
                return None, same
            logits = session.prefill(list(ids[begin : min(begin + step, last)]), logits="last")
        if prefixes is not None and keep and last == shared:
            _keep(prefixes, session, name, place)
    return np.asarray(logits).reshape(-1), same


def _keep(prefixes: PrefixCache, session: Session, name: str | None, place: str | None) -> None:
    """RunError where the session lost its tokens with a file that it used, which `PrefixCache.keep` only warns of."""
    count = session.position
    prefixes.keep(session, name)
    if session.position != count:
        raise RunError("the session has lost its tokens", place=place, remedy="ask again")


@dataclass
class Generation:
    """Iterate to get token ids, stop tokens left out; `stats` is complete once the iteration ended.

    RunError where another answer was begun on the session, or it was changed, before this one has ended.

    drop_oldest: where the context is full the first `keep_first` tokens stay, and of the other context - keep_first the
    oldest half, rounded up, is dropped; those that stay are computed anew, and the answer goes on. A prompt that is
    longer than the context is cut in the same way, as often as needed. Penalties count dropped tokens, too. Without it
    such a prompt is a RunError, and the answer ends.

    drafter: guesses tokens where that changes no bit (`assistant/speculate.py`); None: nobody does.
    top_scores: None, or how many of the likeliest tokens are told beside each taken one, in `scores`. cancelled: set it
    from another thread, and the iteration ends before the next token.
    """

    session: Session
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    stats: Stats = field(default_factory=Stats)
    place: str | None = None  # the artifact, for messages
    constraint: Constraint | None = None
    top_scores: int | None = None
    scores: list[TokenScore] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    drafter: Drafter | None = field(default_factory=PromptLookup)
    prefixes: PrefixCache | None = None
    shared: int = 0  # ids of the prompt that others begin with as well
    prefix_name: str | None = None  # under which these are kept
    drop_oldest: bool = False
    keep_first: int = 0

    def __post_init__(self) -> None:
        if self.drop_oldest and not 0 <= self.keep_first < self.session.context:
            what = f"{self.keep_first} tokens leave nothing to drop: the context holds {self.session.context}"
            raise RunError(what, place="keep_first", remedy=f"keep 0 to {self.session.context - 1}")

    def __iter__(self) -> Iterator[int]:
        if not len(self.prompt):
            raise RunError("the prompt has no tokens", remedy="give --prompt some text")
        if self.max_new_tokens < 0:
            raise RunError(f"{self.max_new_tokens} new tokens", remedy="use 0 or above")
        sampler = Sampler(self.sampling, self.place, self.prompt)
        prompt, shared = list(self.prompt), self.shared
        over = len(prompt) - self.session.context
        if self.drop_oldest and over > 0:
            dropped = -(-over // self._half) * self._half
            del prompt[self.keep_first : self.keep_first + dropped]
            self.stats.dropped_tokens += dropped
            shared = min(shared, self.keep_first)
        name = self.prefix_name if shared == self.shared else None  # what was cut is not what the name stands for
        self.stats.cut_tokens = self.stats.dropped_tokens
        self.session.turn += 1  # an earlier answer that is not at its end cannot go on
        started = time.perf_counter()
        logits, self.stats.reused_tokens = bring(
            self.session, prompt, self.cancelled, self.place, self.prefixes, shared, name
        )
        if self.prefix_name is not None and (name is None or not 0 < shared < len(prompt)):
            why = "the prompt does not fit the context" if name is None else "prompts have no beginning in common"
            log.warning("nothing is kept as prefix %s: %s", self.prefix_name, why)
        self.stats.prompt_tokens = len(self.prompt)
        self.stats.prefill_seconds = time.perf_counter() - started
        steps = Steps(self.session, self.drafter)
        try:
            yield from self._tokens(sampler, steps, logits)
        finally:
            self.stats.drafted_tokens, self.stats.accepted_tokens = steps.speculation.tried, steps.speculation.kept
            if not getattr(self.session, "closed", False):
                steps.close()

    def _tokens(self, sampler: Sampler, steps: Steps, logits: np.ndarray | None) -> Iterator[int]:
        while self.stats.new_tokens < self.max_new_tokens:
            if logits is None or self.cancelled.is_set():
                self.stats.stopped = "cancelled"
                return
            token = sampler(logits, None if self.constraint is None else self.constraint.allowed())
            if token in self.stop:
                self.stats.stopped = "stop token"
                return
            self.stats.new_tokens += 1
            if self.top_scores is not None:
                self.scores.append(score(logits, token, self.top_scores))
            if self.constraint is not None:
                self.constraint.take(token)
            yield token
            if self.constraint is not None and self.constraint.complete:
                self.stats.stopped = "complete"
                return
            if self.stats.new_tokens == self.max_new_tokens:
                return
            full = steps.position >= self.session.context
            if full and not self.drop_oldest:
                self.stats.stopped = "context"
                return
            started = time.perf_counter()
            if full and not steps.drop(self.keep_first, self._half, self.cancelled):
                self.stats.stopped = "cancelled"
                return
            self.stats.dropped_tokens += self._half if full else 0
            logits = steps.next(token)
            self.stats.decode_seconds += time.perf_counter() - started

    @property
    def _half(self) -> int:
        """How many tokens of a full context are dropped."""
        return -(-(self.session.context - self.keep_first) // 2)
