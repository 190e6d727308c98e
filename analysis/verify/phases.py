"""Prefill and single decode steps, judged apart, by the middle and by the tail of their rows.

A few decode steps among hundreds of prefilled rows move no median: a kernel that is wrong for one token at a time, or a
cache that is read one position off, would pass. And a median over few rows says nothing of the one that is wrong.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moec.analysis.verify import metrics, tolerances
from moec.analysis.verify.report import Check
from moec.analysis.verify.tolerances import Tolerance, beyond_drift, least_share, or_drift

Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]  # by prompt: what the reference computes, and what is judged

TAIL = 0.05  # the share of rows that is the tail


@dataclass(frozen=True)
class Drift:
    """The reference with itself perturbed, row by row, all prompts together; zero where nothing rounds.

    rows: 1 - cosine. errors: `metrics.row_errors`.
    """

    rows: np.ndarray
    errors: np.ndarray

    @staticmethod
    def of(reference: Mapping[str, np.ndarray], perturbed: Mapping[str, np.ndarray]) -> Drift:
        """From the logits of both, by prompt."""
        pairs = [(reference[name], perturbed[name]) for name in reference]
        return Drift(
            np.concatenate([1 - metrics.row_cosines(r, s) for r, s in pairs]),
            np.concatenate([metrics.row_errors(r, s) for r, s in pairs]),
        )

    @staticmethod
    def none() -> Drift:
        """Of a run that rounds nothing."""
        return Drift(np.zeros(1), np.zeros(1))

    @property
    def median(self) -> float:
        return float(np.median(self.rows))

    @property
    def tail(self) -> float:
        """What all but the worst 5% stay below. A row whose experts change is a hundred times as far off as others, and
        where about 5% are such rows, a few of them decide: so it is the least share that chance makes of these 5%, and
        half of them where rows are few, so that a single one does not decide."""
        return float(np.quantile(self.rows, 1 - max(least_share(TAIL, len(self.rows)), TAIL / 2)))

    @property
    def worst(self) -> float:
        return float(self.rows.max())

    def median_of(self, count: int) -> float:
        """The largest median of any `count` rows in a row: what so short a run may drift by, rightly."""
        return _largest_median(self.rows, count)

    def error_median_of(self, count: int) -> float:
        """The same of `errors`."""
        return _largest_median(self.errors, count)


def _largest_median(rows: np.ndarray, count: int) -> float:
    if count >= len(rows):
        return float(np.median(rows))
    return float(np.median(np.lib.stride_tricks.sliding_window_view(rows, count), -1).max())


def tail_cosine(cosines_T: np.ndarray) -> float:
    """The cosine that all but the worst 5% of rows exceed."""
    return float(np.quantile(cosines_T, TAIL))


def judge_steps(
    prefix: str, reference_TV: np.ndarray, actual_TV: np.ndarray, steps: int, drift: Drift, where: str
) -> list[Check]:
    """The last `steps` rows, which were decoded one at a time, and those before them, which were prefilled in chunks.

    Both runs round alike. A median may be lower by twice the largest median that as many rows of the perturbed
    reference have; a single row by twice what its worst row has.
    """
    cosines_T = metrics.row_cosines(reference_TV, actual_TV)
    checks = []
    for name, rows in (("odd chunks", cosines_T[: len(cosines_T) - steps]), ("decode steps", cosines_T[-steps:])):
        if not len(rows):
            continue
        middle = beyond_drift(tolerances.MEDIAN_COSINE, drift.median_of(len(rows)))
        worst = beyond_drift(tolerances.ROW_COSINE, drift.worst)
        checks.append(Check(f"{prefix}{name}, median cosine", float(np.median(rows)), middle, where))
        checks.append(Check(f"{prefix}{name}, worst cosine", float(rows.min()), worst, where))
    return checks


def judge_elements(prefix: str, phase: str, pairs: Pairs, drift: Drift) -> list[Check]:
    """Every element of runs that round no activations, by prompt: (reference, actual), float32 [T, V].

    The error of a row is its largest difference over its largest logit. The median row is held to the distance of fp32
    sums behind one flipped INT8 step of the KV cache, the worst row to that of a few; either to four times what the
    perturbed reference shows, where that is more.
    """
    errors_T = np.concatenate([metrics.row_errors(reference, actual) for reference, actual in pairs.values()])
    if not len(errors_T):
        return []
    where = max(pairs, key=lambda name: metrics.row_error(*pairs[name]))
    middle = or_drift(tolerances.ELEMENTS_MEDIAN, drift.error_median_of(len(errors_T)))
    worst = or_drift(tolerances.ELEMENTS_WORST, float(drift.errors.max()))
    return [
        Check(f"{prefix}{phase}, elements of the median row", float(np.median(errors_T)), middle),
        Check(f"{prefix}{phase}, elements of the worst row", float(errors_T.max()), worst, where),
    ]


def tail_limit(drift: Drift) -> Tolerance:
    """What `tail_cosine` of a free run must exceed."""
    return beyond_drift(tolerances.ROW_COSINE, drift.tail)
