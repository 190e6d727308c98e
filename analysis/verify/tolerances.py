"""Every tolerance of verification, in one place, each with its reason. Nothing else decides what is close.

A tolerance is a limit, the direction, and why it is neither tighter nor wider. Three regimes:

- float: nothing is quantized. The artifact and the reference do the same sums in another order.
- quantized: same codes, same scales, the reference simulates the same rounding of activations and cache, and each layer
  starts from the artifact's own values. What is left is the order of fp32 sums, and the rare activation that this moves
  across a rounding boundary: one INT8 step of one element.
- free runs of quantized models drift apart however right both are (see `reference.py`). Their limit is that of the
  quantized regime plus twice the drift measured, on the same tokens, between the reference and itself perturbed.

What the rounding of activations costs the model is reported, never judged: it is a property of the scheme that the user
chose, not of the compiler.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip


@dataclass(frozen=True)
class Tolerance:
    """`value relation limit` must hold. NaN never holds."""

    relation: str
    limit: float
    unit: str
    reason: str

    def holds(self, value: float) -> bool:
        return _RELATIONS[self.relation](value, self.limit)


# Two routers that see the same input differ by the rounding of one fp32 dot product (some 1e-6 of a score below 1). The
# order of topk is unspecified for equal scores, and for scores this close equality is a matter of rounding.
TIE_GAP = 1e-5

FLOAT_ATOL = 1e-5
FLOAT_RTOL = 1e-4

FLOAT_CLOSE = Tolerance(
    "<=", 1.0, f"of atol {FLOAT_ATOL:g} + rtol {FLOAT_RTOL:g}",
    "natural fp32 distance between two spellings of one model: measured 2e-6 to 6e-6 in logits of small models",
)  # fmt: skip

MEDIAN_COSINE = Tolerance(
    ">", 0.9999, "cosine",
    "one flipped INT8 step changes an element by 1/127 of its row's largest; a row of hundreds of elements turns by "
    "less than 1e-4 in 1 - cosine unless most of them flip, while one wrong scale in a hundred already exceeds it",
)  # fmt: skip

LAYER_MIN_COSINE = Tolerance(
    ">", 0.999, "cosine",
    "one layer that starts from the artifact's own values has no history to accumulate: every token, not only the "
    "median, must agree to within a few flipped INT8 steps",
)  # fmt: skip

LAYER_SQNR = Tolerance(
    ">", 50.0, "dB",
    "INT8 rounding is noise at about 40 dB. An artifact that rounds the same values shares this noise with the "
    "reference and is 65 dB away or more (a few flipped steps); one that rounds otherwise or has wrong weights is not",
)  # fmt: skip

EXPORTED_COSINE = Tolerance(
    ">", 0.99, "cosine",
    "the exported graph of a model that is not ours rounds no activations, the artifact does: this is what INT8 costs, "
    "and a wrong rewrite costs far more",
)  # fmt: skip

ROW_COSINE = Tolerance(
    ">", 0.999, "cosine",
    "a row of a whole run may differ by a few flipped INT8 steps beyond what both runs drift by; a position, a cache "
    "row or a scale that is wrong for this token alone turns it by percents",
)  # fmt: skip

ELEMENTS_MEDIAN = Tolerance(
    "<=", 2e-3, "of the row's largest logit",
    "the same codes without rounding of activations: fp32 sums in another order move a logit by some 1e-6 of the row's "
    "largest, and by up to 1e-3 (measured) once they move one key in the KV cache across an INT8 boundary; a position, "
    "a cache row or a scale that is wrong moves it by percents",
)  # fmt: skip

ELEMENTS_WORST = Tolerance(
    "<=", 2e-2, "of the row's largest logit",
    "a key or value that flips changes by 1/127 of its row, and the logits of a token that attends to little else by "
    "a few times as much",
)  # fmt: skip

TOP1 = Tolerance(
    ">", 0.99, "of tokens",
    "a greedy answer may change only where the two best logits are closer than the noise of flipped INT8 steps",
)  # fmt: skip

ROUTER_SETS = Tolerance(
    ">", 0.995, "of tokens clear of ties",
    f"ties (gap below {TIE_GAP:g}) are left out and counted; flips of INT8 steps upstream move scores by more than "
    "a tie, but rarely past a rank: a bf16 router, the mistake this must catch, changes 2.6% of the selections",
)  # fmt: skip

ROUTER_SAME_INPUT = Tolerance(
    ">=", 1.0, "of tokens clear of ties",
    "given the same input, two fp32 routers differ by fp32 rounding only; selections that rounding can change are ties",
)  # fmt: skip

COMBINE_WEIGHTS = Tolerance(
    "<=", 1.0, f"of atol {FLOAT_ATOL:g} + rtol {FLOAT_RTOL:g}",
    "the router is fp32 in every artifact: its combine weights obey the float tolerance, however experts are quantized",
)  # fmt: skip

# More than half of the rows must take part in a comparison, or it says nothing.
COMPARED = Tolerance(
    ">", 0.5, "of tokens",
    "tokens after an explained flip of a tied selection are left out of the element-wise comparison; most must remain",
)  # fmt: skip

NO_FAULTS = Tolerance(
    "<=", 0.0, "faults",
    "structure is counted, not measured: a weight is read or it is not, a declared shape is right or it is not",
)  # fmt: skip

IDENTICAL = Tolerance(
    "<=", 0.0, "absolute difference",
    "the same program on the same tokens does the same operations in the same order, whatever the threads do",
)  # fmt: skip
SAME_IN_MEMORY = Tolerance(
    "<=", 0.0, "absolute difference",
    "where experts are read from, and when, changes no operation and not the order of any",
)  # fmt: skip

_DRIFT = 2.0
_DEVIATIONS = 2.0


def beyond_drift(tolerance: Tolerance, drift: float, count: int | None = None) -> Tolerance:
    """`tolerance` for a free run: a lower limit, lowered by twice the measured `drift` (1 - agreement with itself).

    Twice, because both drifts are random: that of the artifact is a second sample of the same kind. `count`: the drift
    is a share of that many, and is taken two standard deviations of such a count higher.
    """
    upper = max(drift, 0.0)
    if count:
        upper += _DEVIATIONS * math.sqrt(upper * count + 1) / count
    limit = tolerance.limit - _DRIFT * upper
    reason = f"{tolerance.limit:g}, less twice the {upper:.2e} by which the reference drifts from itself when perturbed"
    return Tolerance(tolerance.relation, limit, tolerance.unit, reason)


def least_share(share: float, count: int) -> float:
    """Two standard deviations below a `share` of `count` cases; 0 at least."""
    return max(share - _DEVIATIONS * math.sqrt(share * (1 - share) / max(count, 1)), 0.0)


def or_drift(tolerance: Tolerance, drift: float) -> Tolerance:
    """`tolerance`, an upper limit on a distance, or four times the measured `drift` where that is more.

    As in `beyond_drift`, and twice that: 1 - cosine grows with the square of a distance, and of the rare flips that
    make such a distance one run may have several times as many as another.
    """
    limit = max(tolerance.limit, 2 * _DRIFT * drift)
    reason = f"{tolerance.reason}; the reference drifts {drift:.2e} from itself when perturbed"
    return Tolerance(tolerance.relation, limit, tolerance.unit, reason)


def deep_float(drift_ratio: float) -> Tolerance:
    """`FLOAT_CLOSE` for a whole float model: no tighter than the reference perturbed in its last places stays to
    itself.

    `drift_ratio`: that distance, in units of the tolerance. Depth adds up rounding: 4 layers stay within, 20 may not.
    """
    limit = max(FLOAT_CLOSE.limit, drift_ratio)
    reason = f"{FLOAT_CLOSE.reason}; the reference drifts {drift_ratio:.3g} x that from itself when perturbed"
    return Tolerance(FLOAT_CLOSE.relation, limit, FLOAT_CLOSE.unit, reason)


def of_sample(tolerance: Tolerance, count: int) -> Tolerance:
    """`tolerance` for a share measured on `count` cases: lowered by two standard deviations of such a share.

    A rate that meets the limit exactly would fail every other time; a rate that is worse fails on enough cases.
    """
    limit = least_share(tolerance.limit, count)
    reason = f"{tolerance.reason}; {tolerance.limit:g} less two standard deviations of a share of {count}"
    return Tolerance(tolerance.relation, limit, tolerance.unit, reason)
