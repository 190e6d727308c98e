"""Text from an artifact: sampling, stop tokens, and decoding that never splits a character.

Works on any `Session`. V is the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.errors import ArtifactError, RunError

if TYPE_CHECKING:
    from moec.compiler.target import Session


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; `top_p` keeps the fewest tokens whose probabilities reach it; a seed repeats them."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise RunError(f"temperature {self.temperature}", remedy="use 0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise RunError(f"top-p {self.top_p}", remedy="use above 0 and at most 1 (1 keeps all tokens)")
        if self.seed < 0:
            raise RunError(f"seed {self.seed}", remedy="use 0 or above")


class Sampler:
    """Draws tokens from logits, float32 [V]. `place` names the artifact in messages."""

    def __init__(self, sampling: Sampling, place: str | None = None) -> None:
        self._sampling = sampling
        self._place = place
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits_V: np.ndarray) -> int:
        """The next token; ArtifactError when the logits hold a NaN or +inf (-inf is a token ruled out)."""
        logits_V = np.asarray(logits_V, dtype=np.float64).reshape(-1)
        top = logits_V.max(initial=-np.inf)
        if not np.isfinite(top):
            remedy = "check the artifact with `moec verify`"
            raise ArtifactError("the logits are not finite", place=self._place, remedy=remedy)
        if self._sampling.temperature == 0.0:
            return int(logits_V.argmax())
        weights_V = np.exp((logits_V - top) / self._sampling.temperature)
        weights_V /= weights_V.sum()
        # descending and stable, so that equal probabilities are cut at the same place everywhere
        order = np.argsort(-weights_V, kind="stable")
        sums = np.cumsum(weights_V[order])
        kept = order[: int(np.searchsorted(sums, self._sampling.top_p * sums[-1], side="left")) + 1]
        kept_sums = np.cumsum(weights_V[kept])
        drawn = int(np.searchsorted(kept_sums, self._random.random() * kept_sums[-1], side="right"))
        return int(kept[min(drawn, len(kept) - 1)])


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


@dataclass
class Stats:
    """Counts in tokens, times in seconds. `stopped` is "stop token", "length" or "context"."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped: str = "length"

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second; the first of them came with the prefill and is not counted."""
        return max(self.new_tokens - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Generation:
    """Iterate to get token ids, stop tokens left out; `stats` is complete once the iteration ended."""

    session: Session
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    stats: Stats = field(default_factory=Stats)
    place: str | None = None  # the artifact, for messages

    def __iter__(self) -> Iterator[int]:
        if not len(self.prompt):
            raise RunError("the prompt has no tokens", remedy="give --prompt some text")
        if self.max_new_tokens < 0:
            raise RunError(f"{self.max_new_tokens} new tokens", remedy="use 0 or above")
        sampler = Sampler(self.sampling, self.place)
        started = time.perf_counter()
        logits = self.session.prefill(list(self.prompt), logits="last")
        self.stats.prompt_tokens = len(self.prompt)
        self.stats.prefill_seconds = time.perf_counter() - started
        while self.stats.new_tokens < self.max_new_tokens:
            token = sampler(logits)
            if token in self.stop:
                self.stats.stopped = "stop token"
                return
            self.stats.new_tokens += 1
            yield token
            if self.stats.new_tokens == self.max_new_tokens:
                return
            if self.session.position >= self.session.context:
                self.stats.stopped = "context"
                return
            started = time.perf_counter()
            logits = self.session.decode(token)
            self.stats.decode_seconds += time.perf_counter() - started
