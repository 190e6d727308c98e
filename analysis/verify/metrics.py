"""How far two sets of numbers are apart. Every metric takes the reference first and the numbers under test second.

Shape suffixes: T rows (tokens), V columns (vocabulary or features), E experts, K experts selected per token.

All metrics accumulate in float64. A NaN or infinity under test is never averaged away: it makes SQNR minus infinity,
the row's cosine -1, the row's top-1 wrong, and every error infinite, so that no comparison against a tolerance can
pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Rows handled at a time, so that the float64 copies of [T, vocabulary] logits stay small.
_ROWS = 64


def sqnr_db(reference: np.ndarray, actual: np.ndarray) -> float:
    """Signal to quantization noise ratio in decibels, 10 log10(sum r^2 / sum (r - a)^2), over all elements.

    Equal arrays give +inf (also when both are zero); a zero reference with any error gives -inf, so does a non-finite
    value.
    """
    _same_shape(reference, actual)
    signal = noise = 0.0
    for r, a in _blocks(reference, actual):
        with np.errstate(invalid="ignore", over="ignore"):
            signal += float(np.sum(r * r))
            noise += float(np.sum((r - a) ** 2))
    if not np.isfinite(signal) or not np.isfinite(noise):
        return -np.inf
    if noise == 0.0:
        return np.inf
    return float(10.0 * np.log10(signal / noise)) if signal > 0.0 else -np.inf


def row_cosines(reference_TV: np.ndarray, actual_TV: np.ndarray) -> np.ndarray:
    """Cosine of the angle between each pair of rows, float64 [T]. Two zero rows: 1. One zero row: 0. Not finite: -1."""
    _same_shape(reference_TV, actual_TV)
    parts = []
    for r, a in _blocks(reference_TV, actual_TV):
        with np.errstate(invalid="ignore", over="ignore"):
            norms = np.sqrt(np.sum(r * r, -1)) * np.sqrt(np.sum(a * a, -1))
            dots = np.sum(r * a, -1)
        cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=(norms > 0) & np.isfinite(norms))
        cosines[(~r.any(-1)) & (~a.any(-1))] = 1.0
        cosines[~np.isfinite(r).all(-1) | ~np.isfinite(a).all(-1) | ~np.isfinite(norms)] = -1.0
        parts.append(np.clip(cosines, -1.0, 1.0))
    return np.concatenate(parts) if parts else np.zeros(0)


@dataclass(frozen=True)
class Cosine:
    """Median and minimum over rows of the cosine of reference and actual. No rows: both NaN, which passes nothing."""

    median: float
    minimum: float

    @staticmethod
    def of(reference_TV: np.ndarray, actual_TV: np.ndarray) -> Cosine:
        cosines = row_cosines(reference_TV, actual_TV)
        if not len(cosines):
            return Cosine(float("nan"), float("nan"))
        return Cosine(float(np.median(cosines)), float(cosines.min()))


def top1_matches(reference_TV: np.ndarray, actual_TV: np.ndarray) -> np.ndarray:
    """Whether each pair of rows has its largest element at the same place, bool [T]. A non-finite row never matches."""
    _same_shape(reference_TV, actual_TV)
    finite = np.isfinite(reference_TV).all(-1) & np.isfinite(actual_TV).all(-1)
    return (np.argmax(reference_TV, -1) == np.argmax(actual_TV, -1)) & finite


def max_abs_error(reference: np.ndarray, actual: np.ndarray) -> float:
    """Largest |r - a| over all elements, in the unit of the values; inf if one is not finite; 0 for no elements."""
    _same_shape(reference, actual)
    worst = 0.0
    for r, a in _blocks(reference, actual):
        with np.errstate(invalid="ignore"):
            errors = np.abs(r - a)
        if not np.isfinite(errors).all():
            return np.inf
        worst = max(worst, float(errors.max(initial=0.0)))
    return worst


def row_errors(reference_TV: np.ndarray, actual_TV: np.ndarray) -> np.ndarray:
    """Largest |r - a| of each row over that row's largest |r|, float64 [T]; 1e-7 is one fp32 rounding.

    inf where a value is not finite or a row of zeros is not met exactly.
    """
    _same_shape(reference_TV, actual_TV)
    parts = []
    for r, a in _blocks(reference_TV, actual_TV):
        with np.errstate(invalid="ignore", divide="ignore"):
            error, size = np.abs(r - a).max(-1, initial=0.0), np.abs(r).max(-1, initial=0.0)
            ratio = np.where(error == 0, 0.0, error / size)
        parts.append(np.where(np.isfinite(ratio), ratio, np.inf))
    return np.concatenate(parts) if parts else np.zeros(0)


def row_error(reference_TV: np.ndarray, actual_TV: np.ndarray) -> float:
    """The worst of `row_errors`; 0 for no rows."""
    return float(row_errors(reference_TV, actual_TV).max(initial=0.0))


def tolerance_ratio(reference: np.ndarray, actual: np.ndarray, *, atol: float, rtol: float) -> float:
    """Largest |r - a| / (atol + rtol |r|) over all elements: at most 1 exactly when `allclose` holds. inf if not
    finite.
    """
    _same_shape(reference, actual)
    worst = 0.0
    for r, a in _blocks(reference, actual):
        with np.errstate(invalid="ignore"):
            ratio = np.abs(r - a) / (atol + rtol * np.abs(r))
        if not np.isfinite(ratio).all():
            return np.inf
        worst = max(worst, float(ratio.max(initial=0.0)))
    return worst


@dataclass(frozen=True)
class RouterAgreement:
    """Tokens whose selected experts, as a set, are the same. `ties` tokens are left out of `compared`, and counted.

    The order within a selection is not compared: torch leaves it open for equal scores, and the sum over experts does
    not depend on it.
    """

    tokens: int
    ties: int
    equal: int

    @property
    def compared(self) -> int:
        return self.tokens - self.ties

    @property
    def fraction(self) -> float:
        """Share of compared tokens with equal sets. NaN when nothing could be compared, which passes no tolerance."""
        return self.equal / self.compared if self.compared else float("nan")

    def __add__(self, other: RouterAgreement) -> RouterAgreement:
        return RouterAgreement(self.tokens + other.tokens, self.ties + other.ties, self.equal + other.equal)


def selection_gaps(scores_TE: np.ndarray, top_k: int) -> np.ndarray:
    """How much the score at rank k exceeds the one at rank k + 1, [T] in the unit of the scores; inf when k == E."""
    tokens, experts = scores_TE.shape
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k {top_k} of {experts} experts")
    if top_k == experts:
        return np.full(tokens, np.inf)
    ranked = np.sort(scores_TE.astype(np.float64), -1)
    return ranked[:, experts - top_k] - ranked[:, experts - top_k - 1]


def router_agreement(
    reference_TK: np.ndarray, actual_TK: np.ndarray, scores_TE: np.ndarray, *, tie_gap: float
) -> RouterAgreement:
    """Compare selections as sets.

    `scores_TE` are the reference's *selection* scores (after the selection bias). A token is a tie, and left out, when
    its gap between rank k and k + 1 is below `tie_gap`. A selection that names an expert twice equals no reference.
    """
    _same_shape(reference_TK, actual_TK)
    ties = selection_gaps(scores_TE, reference_TK.shape[-1]) < tie_gap
    same = (np.sort(reference_TK, -1) == np.sort(actual_TK, -1)).all(-1)
    return RouterAgreement(tokens=len(ties), ties=int(ties.sum()), equal=int((same & ~ties).sum()))


def _same_shape(reference: np.ndarray, actual: np.ndarray) -> None:
    if reference.shape != actual.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, actual {actual.shape}")


def _blocks(reference: np.ndarray, actual: np.ndarray):  # type: ignore[no-untyped-def]
    """Pairs of float64 blocks [rows, columns]; scalars and vectors count as one row."""
    r = reference.reshape(-1, reference.shape[-1]) if reference.ndim > 1 else reference.reshape(1, -1)
    a = actual.reshape(r.shape)
    for start in range(0, len(r), _ROWS):
        yield r[start : start + _ROWS].astype(np.float64), a[start : start + _ROWS].astype(np.float64)
