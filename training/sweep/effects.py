"""What the losses of a sweep say of each factor: differences within seeds, with intervals.

Every point is trained with the same seeds, and a seed decides the order of the data and the initial weights that shapes
have in common. So the losses of one seed are a block of a randomised block design:

    loss = point + block + noise

fitted by least squares, with the noise's variance from all residuals together, n - rank degrees of freedom (with P
points and S seeds of one size and one number of tokens, (P - 1)(S - 1)). With two points this is the paired t-test. A
block is a seed at one size and number of tokens. It assumes that the noise is as large at every point. Beside it
stands the paired t-test over the seeds' own differences, which assumes nothing of the kind and needs more seeds.

An effect of a factor between two of its values is the mean of the differences over the pairs of points that differ in
nothing else; the dense point (E = 1) is paired with every shape of the other value. Intervals are Student's t, those of
one factor together at the confidence that is stated (Bonferroni over its pairs of values). They speak of other seeds,
not of other text: all points are evaluated on the same held-out documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.compiler.extras import require
from moec.training.sweep.grid import Point

CONFIDENCE = 0.95
COMPARED = ("experts", "granularity", "shared")  # sizes and tokens are there for the scaling law


@dataclass(frozen=True)
class Observation:
    """The loss of a point under one seed, nats per predicted token."""

    point: str
    seed: int
    block: str
    loss: float


@dataclass(frozen=True)
class Effect:
    """loss(after) - loss(before) of a factor, in the mean of `pairs` pairs of points. low, high: the interval, None
    where nothing is left to estimate the noise from. by_seed: the same for each seed that has every pair; low_alone,
    high_alone: the interval of these alone."""

    factor: str
    before: Any
    after: Any
    pairs: int
    difference: float
    low: float | None
    high: float | None
    by_seed: dict[int, float]
    low_alone: float | None
    high_alone: float | None

    @property
    def separable(self) -> bool:
        """Whether the interval excludes zero."""
        return _excludes_zero(self.low, self.high)

    @property
    def separable_alone(self) -> bool:
        """Whether that of the seeds alone does."""
        return _excludes_zero(self.low_alone, self.high_alone)


def _excludes_zero(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and (low > 0 or high < 0)


class Blocks:
    """The least-squares fit. deviation: of the noise, None without degrees of freedom."""

    def __init__(self, observations: Sequence[Observation]) -> None:
        self.points = sorted({o.point for o in observations})
        blocks = sorted({o.block for o in observations})
        design = np.zeros((len(observations), len(self.points) + len(blocks)))
        for row, o in enumerate(observations):
            design[row, self.points.index(o.point)] = 1
            design[row, len(self.points) + blocks.index(o.block)] = 1
        losses = np.array([o.loss for o in observations], np.float64)
        inverse = np.linalg.pinv(design)
        self._means = inverse @ losses
        self._known = inverse @ design  # what of a combination of the coefficients the observations determine
        self._covariance = inverse @ inverse.T
        self.degrees = len(observations) - int(np.linalg.matrix_rank(design)) if observations else 0
        squares = float(np.square(losses - design @ self._means).sum())
        self.deviation = (squares / self.degrees) ** 0.5 if self.degrees > 0 else None

    def contrast(self, weights: Mapping[str, float]) -> tuple[float, float | None] | None:
        """(sum of weights * points, its standard error) for weights that sum to 0; None if no block connects them."""
        c = np.zeros(len(self._means))
        for point, weight in weights.items():
            c[self.points.index(point)] += weight
        if not np.allclose(c @ self._known, c, atol=1e-8):
            return None
        error = None if self.deviation is None else self.deviation * float(c @ self._covariance @ c) ** 0.5
        return float(c @ self._means), error


def effects(
    points: Sequence[Point], observations: Sequence[Observation], confidence: float = CONFIDENCE
) -> tuple[Effect, ...]:
    """Every pair of values of every factor that has two among the points with a loss. MissingExtra without scipy."""
    require("scipy", "plan", "an interval")
    from scipy.stats import t as student

    seen = {o.point for o in observations}
    trained = [point for point in points if point.name in seen]
    fitted = Blocks(observations)
    found = []
    for factor in COMPARED:
        values = list(dict.fromkeys(getattr(p, factor) for p in trained if factor == "experts" or p.experts > 1))
        weighed = [
            (before, after, pairs, known)
            for before, after in itertools.combinations(values, 2)
            if (pairs := _pairs(trained, factor, before, after))
            and (known := fitted.contrast(_weights(pairs))) is not None
        ]
        for before, after, pairs, (difference, error) in weighed:
            tail = (1 - confidence) / (2 * len(weighed))  # Bonferroni over the factor's pairs of values
            reach = None if error is None else error * float(student.isf(tail, fitted.degrees))
            by_seed = _by_seed(pairs, observations)
            alone, center = None, float(np.mean(list(by_seed.values()))) if by_seed else 0.0
            if len(by_seed) > 1:
                spread = float(np.std(list(by_seed.values()), ddof=1)) / len(by_seed) ** 0.5
                alone = spread * float(student.isf(tail, len(by_seed) - 1))
            found.append(
                Effect(
                    factor,
                    before,
                    after,
                    len(pairs),
                    difference,
                    None if reach is None else difference - reach,
                    None if reach is None else difference + reach,
                    by_seed,
                    None if alone is None else center - alone,
                    None if alone is None else center + alone,
                )
            )
    return tuple(found)


_Pairs = list[tuple[Point, Point]]


def _pairs(points: Sequence[Point], factor: str, before: Any, after: Any) -> _Pairs:
    """Points that differ in `factor` alone."""
    rest = [name for name in ("experts", "granularity", "shared", "d_model", "tokens") if name != factor]

    def alike(a: Point, b: Point) -> bool:
        if factor == "experts" and 1 in (a.experts, b.experts):  # a dense block has neither g nor a shared expert
            return a.cell == b.cell
        return all(getattr(a, name) == getattr(b, name) for name in rest)

    firsts = [p for p in points if getattr(p, factor) == before and (factor == "experts" or p.experts > 1)]
    seconds = [p for p in points if getattr(p, factor) == after and (factor == "experts" or p.experts > 1)]
    return [(a, b) for a in firsts for b in seconds if alike(a, b)]


def _weights(pairs: _Pairs) -> dict[str, float]:
    weights: dict[str, float] = {}
    for before, after in pairs:
        weights[before.name] = weights.get(before.name, 0.0) - 1 / len(pairs)
        weights[after.name] = weights.get(after.name, 0.0) + 1 / len(pairs)
    return weights


def _by_seed(pairs: _Pairs, observations: Sequence[Observation]) -> dict[int, float]:
    losses = {(o.point, o.seed): o.loss for o in observations}
    found = {}
    for seed in sorted({o.seed for o in observations}):
        each = [
            losses[b.name, seed] - losses[a.name, seed]
            for a, b in pairs
            if (a.name, seed) in losses and (b.name, seed) in losses
        ]
        if len(each) == len(pairs):
            found[seed] = float(np.mean(each))
    return found
