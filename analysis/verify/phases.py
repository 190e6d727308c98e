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
from moec.analysis.verify.tolerances import Tolerance, beyond_drift

TAIL = 0.05  # the share of rows that is the tail


@dataclass(frozen=True)
class Drift:
    """1 - cosine of the reference with itself shaken, row by row, all prompts together; empty where nothing rounds."""

    rows: np.ndarray

    @staticmethod
    def of(reference: Mapping[str, np.ndarray], shaken: Mapping[str, np.ndarray]) -> Drift:
        """From the logits of both, by prompt."""
        return Drift(np.concatenate([1 - metrics.row_cosines(reference[name], shaken[name]) for name in reference]))

    @staticmethod
    def none() -> Drift:
        """Of a run that rounds nothing."""
        return Drift(np.zeros(1))

    @property
    def median(self) -> float:
        return float(np.median(self.rows))

    @property
    def tail(self) -> float:
        return float(np.quantile(self.rows, 1 - TAIL))

    @property
    def worst(self) -> float:
        return float(self.rows.max())

    def median_of(self, count: int) -> float:
        """The largest median of any `count` rows in a row: what so short a run may drift by, rightly."""
        if count >= len(self.rows):
            return self.median
        windows = np.lib.stride_tricks.sliding_window_view(self.rows, count)
        return float(np.median(windows, -1).max())


def tail_cosine(cosines_T: np.ndarray) -> float:
    """The cosine that all but the worst 5% of rows exceed."""
    return float(np.quantile(cosines_T, TAIL))


def judge_steps(
    prefix: str, reference_TV: np.ndarray, actual_TV: np.ndarray, steps: int, drift: Drift, where: str
) -> list[Check]:
    """The last `steps` rows, which were decoded one at a time, and those before them, which were prefilled in chunks.

    Both runs round alike. A median may be lower by twice the largest median that as many rows of the shaken reference
    have; a single row by twice what its worst row has.
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


def tail_limit(drift: Drift) -> Tolerance:
    """What `tail_cosine` of a free run must exceed."""
    return beyond_drift(tolerances.ROW_COSINE, drift.tail)
