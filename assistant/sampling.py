"""From logits to a token: penalties, bias, a mask, temperature, top-k, top-p, min-p, and a seed that repeats.

V is the vocabulary, N the tokens that are kept. Order and definitions are those of transformers' generation (bias,
repetition penalty, temperature, top-k, top-p, min-p); presence and frequency penalty are OpenAI's, over the new tokens.
Everything is float64 and serial, so that a text depends on the logits and the seed alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.files import read_bytes

MAX_BIASED = 100_000  # tokens with a bias of their own
LEAST_REPEAT_PENALTY, MAX_BIAS = 1e-3, 1e6  # beyond these, scores would leave the range of numbers
MAX_TOP = 100  # likeliest tokens whose log-probabilities are reported
_MAX_CONFIG = 1 << 20  # bytes of a generation_config.json; usual ones have 300
_FIRST_SORTED = 1024  # tokens that top-p sorts before it looks at more; more than it keeps of most distributions


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. Tokens are kept in this order: the `top_k` likeliest (0: all); of these the fewest whose
    probabilities sum to `top_p`; of these those with at least `min_p` times the probability of the likeliest.

    repeat_penalty: logits of tokens that occurred, in the prompt or since, are divided by it (multiplied where they are
    negative). presence_penalty, frequency_penalty: subtracted from the logits of tokens already generated, once or per
    occurrence. logit_bias: added to the logits of token ids, within +-1e6; -inf rules one out. RunError for values out
    of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0, "0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise RunError(f"top-p {self.top_p}", remedy="use above 0 and at most 1 (1 keeps all tokens)")
        _within("top-k", self.top_k, 0, 1 << 31, "0 (all tokens) or above")
        _within("min-p", self.min_p, 0.0, 1.0, "0 (all tokens) to 1")
        _within("repeat penalty", self.repeat_penalty, LEAST_REPEAT_PENALTY, 100.0, "0.001 to 100 (1: none)")
        _within("presence penalty", self.presence_penalty, -100.0, 100.0, "-100 to 100 (0: none)")
        _within("frequency penalty", self.frequency_penalty, -100.0, 100.0, "-100 to 100 (0: none)")
        _within("seed", self.seed, 0, (1 << 64) - 1, "0 or above")
        if len(self.logit_bias) > MAX_BIASED:
            raise RunError(f"a logit bias for {len(self.logit_bias)} tokens", remedy=f"give at most {MAX_BIASED}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not (abs(bias) <= MAX_BIAS or bias == -math.inf):  # NaN is in no range
                remedy = f"ids are 0 or above, biases -{MAX_BIAS:.0f} to {MAX_BIAS:.0f}, or -inf"
                raise RunError(f"logit bias {bias} for token {token}", remedy=remedy)

    def words(self) -> str:
        """What differs from greedy, for people: `temperature 0.7, top-p 0.9, seed 3`."""
        if self.temperature == 0.0:
            parts = ["greedy"]
        else:
            parts = [f"temperature {self.temperature:g}"]
            parts += [f"top-k {self.top_k}"] if self.top_k else []
            parts += [f"top-p {self.top_p:g}"] if self.top_p < 1.0 else []
            parts += [f"min-p {self.min_p:g}"] if self.min_p else []
            parts += [f"seed {self.seed}"]
        for name in ("repeat_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            parts += [f"{name.replace('_', ' ')} {value:g}"] if value != getattr(Sampling, name) else []
        return ", ".join(parts)

    def given(self, **values: Any) -> Sampling:
        """With those of `values` that are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


def _within(name: str, value: float, low: float, high: float, remedy: str) -> None:
    if not low <= value <= high:  # NaN is in no range
        raise RunError(f"{name} {value}", remedy=f"use {remedy}")


def recommended(file: Path) -> Sampling:
    """What a `generation_config.json` recommends, in transformers' keys; greedy without one or without `do_sample`.

    Where it samples and leaves temperature or top-k out they are transformers' defaults, 1.0 and 50. ArtifactError for
    a damaged file.
    """
    if not file.exists():
        return Sampling()
    try:
        raw = json.loads(read_bytes(file, limit=_MAX_CONFIG, fault=ArtifactError))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"not JSON: {str(error).splitlines()[0]}", place=str(file)) from None
    if not isinstance(raw, dict):
        raise ArtifactError("not a JSON object", place=str(file))

    def number(key: str, default: float) -> float:
        value = raw.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArtifactError(f"{key} is not a number", place=str(file))
        return value

    try:
        always = Sampling(repeat_penalty=number("repetition_penalty", 1.0))
        if raw.get("do_sample") is not True:
            return always
        return replace(
            always,
            temperature=number("temperature", 1.0),
            top_k=int(number("top_k", 50)),
            top_p=number("top_p", 1.0),
            min_p=number("min_p", 0.0),
        )
    except (RunError, ValueError, OverflowError) as error:
        raise ArtifactError(str(error).splitlines()[0], place=str(file)) from None


@dataclass(frozen=True)
class TokenScore:
    """log p of a token under the model, before anything is changed by `Sampling`; `top`: the likeliest, best first."""

    token: int
    log_probability: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws tokens from logits, float32 [V]. `prompt`: ids that the repeat penalty counts. `place` is for messages."""

    def __init__(self, sampling: Sampling, place: str | None = None, prompt: Sequence[int] = ()) -> None:
        self._sampling = sampling
        self._place = place
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(prompt) if sampling.repeat_penalty != 1.0 else set()
        self._counts: dict[int, int] = {}

    def __call__(self, logits_V: np.ndarray, allowed_V: np.ndarray | None = None) -> int:
        """The next token, which counts as taken. ArtifactError when the logits hold a NaN or +inf (-inf is a token
        ruled out); RunError when bias and `allowed_V`, bool [V], leave no token."""
        kept_N, weights_N = self.distribution(logits_V, allowed_V)
        if len(kept_N) == 1:
            token = int(kept_N[0])
        else:
            sums_N = np.cumsum(weights_N)
            drawn = int(np.searchsorted(sums_N, self._random.random() * sums_N[-1], side="right"))
            token = int(kept_N[min(drawn, len(kept_N) - 1)])
        if self._sampling.repeat_penalty != 1.0:
            self._seen.add(token)
        if self._sampling.presence_penalty or self._sampling.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def distribution(self, logits_V: np.ndarray, allowed_V: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The ids that can be drawn, int64 [N] ascending, and their weights, float64 [N], the likeliest 1."""
        scores_V = np.asarray(logits_V, dtype=np.float64).reshape(-1)
        if not np.isfinite(scores_V.max(initial=-np.inf)):
            remedy = "check the artifact with `moec verify`"
            raise ArtifactError("the logits are not finite", place=self._place, remedy=remedy)
        scores_V = self._penalized(scores_V)
        if allowed_V is not None:
            scores_V = np.where(allowed_V, scores_V, -np.inf)
        top = scores_V.max()
        if top == -np.inf:
            raise RunError(
                "no token is left to take", place=self._place, remedy="ask for less in logit bias and format"
            )
        if not np.isfinite(top):
            raise RunError("penalties and biases leave no finite scores", place=self._place, remedy="ask for less")
        given = self._sampling
        if given.temperature == 0.0:
            return np.array([scores_V.argmax()]), np.ones(1)
        if 0 < given.top_k < len(scores_V):
            least = np.partition(scores_V, -given.top_k)[-given.top_k]  # as transformers': ties with the last are kept
            kept_N = np.flatnonzero((scores_V >= least) & (scores_V > -np.inf))
        else:
            kept_N = np.flatnonzero(scores_V > -np.inf)
        weights_N = np.exp((scores_V[kept_N] - top) / given.temperature)
        if given.top_p < 1.0:
            inside = _reaching(weights_N, given.top_p)
            kept_N, weights_N = kept_N[inside], weights_N[inside]
        if given.min_p > 0.0:
            likely = weights_N >= given.min_p  # the likeliest has weight 1
            kept_N, weights_N = kept_N[likely], weights_N[likely]
        return kept_N, weights_N

    def _penalized(self, scores_V: np.ndarray) -> np.ndarray:
        given = self._sampling
        penalties = given.presence_penalty or given.frequency_penalty
        if not (given.logit_bias or penalties or given.repeat_penalty != 1.0):
            return scores_V
        scores_V = scores_V.copy()
        if given.logit_bias:
            ids = np.fromiter(given.logit_bias, np.int64)
            if wrong := [int(i) for i in ids if i >= len(scores_V)]:
                what = f"logit bias for token {wrong[0]}, which is not in the vocabulary"
                raise RunError(what, place=self._place, remedy=f"ids are 0 to {len(scores_V) - 1}")
            scores_V[ids] += np.fromiter(given.logit_bias.values(), np.float64)
        if given.repeat_penalty != 1.0 and self._seen:
            ids = np.fromiter(self._seen, np.int64)
            seen = scores_V[ids]
            scores_V[ids] = np.where(seen < 0, seen * given.repeat_penalty, seen / given.repeat_penalty)
        if penalties and self._counts:
            ids = np.fromiter(self._counts, np.int64)
            counts = np.fromiter(self._counts.values(), np.float64)
            scores_V[ids] -= given.presence_penalty + given.frequency_penalty * counts
        return scores_V


def _reaching(weights_N: np.ndarray, share: float) -> np.ndarray:
    """Places of the fewest weights, the largest first, that reach `share` of the sum; ascending, at least one.

    Of equal weights those of lower index are taken first.
    """
    wanted = share * weights_N.sum()
    count = _FIRST_SORTED
    while True:
        if count < len(weights_N):
            least = np.partition(weights_N, -count)[-count]
            large = np.flatnonzero(weights_N >= least)
        else:
            large = np.arange(len(weights_N))
        order = large[np.argsort(-weights_N[large], kind="stable")]
        sums = np.cumsum(weights_N[order])
        if sums[-1] >= wanted or len(large) == len(weights_N):
            return np.sort(order[: int(np.searchsorted(sums, wanted, side="left")) + 1])
        count *= 8


def log_probabilities(logits_V: np.ndarray) -> np.ndarray:
    """log softmax, float64 [V]."""
    wide_V = np.asarray(logits_V, np.float64).reshape(-1)
    top = wide_V.max()
    return np.asarray(wide_V - (top + math.log(np.exp(wide_V - top).sum())))


def score(logits_V: np.ndarray, token: int, top: int = 0) -> TokenScore:
    """The log-probability of `token`, with those of the `top` likeliest tokens (ties: the lower id first)."""
    values_V = log_probabilities(logits_V)
    best: tuple[tuple[int, float], ...] = ()
    if top:
        count = min(top, len(values_V))
        least = np.partition(values_V, -count)[-count]
        ids = np.flatnonzero(values_V >= least)
        ids = ids[np.argsort(-values_V[ids], kind="stable")][:count]
        best = tuple((int(i), float(values_V[i])) for i in ids)
    return TokenScore(token, float(values_V[token]), best)
