"""Every tolerance of verification, in one place, each with its reason. Nothing else decides what is close.

A tolerance is a limit, the direction, and why it is neither tighter nor wider. Three regimes:

- `FLOAT`: nothing is quantized. The artifact and the reference do the same sums in another order.
- `QUANTIZED`: same codes, same scales, and the reference simulates the same rounding of activations and cache. What is
  left is the order of fp32 sums, and the rare activation that this moves across a rounding boundary: one INT8 step of
  one element.
- against float activations: what the rounding of activations costs the model. It is reported, never judged here; it is
  a property of the scheme that the user chose, not of the compiler.
"""

from __future__ import annotations

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
    "natural fp32 distance between two spellings of one model at logits level: measured 2e-6 to 6e-6 on small models",
)  # fmt: skip

MEDIAN_COSINE = Tolerance(
    ">", 0.9999, "cosine",
    "one flipped INT8 step changes an element by 1/127 of its row's largest; a row of hundreds of elements turns by "
    "less than 1e-4 in 1 - cosine unless most of them flip, while one wrong scale in a hundred already exceeds it",
)  # fmt: skip

LAYER_MIN_COSINE = Tolerance(
    ">", 0.999, "cosine",
    "one layer fed with the artifact's own input and routing has no history to accumulate: every token, not only the "
    "median, must agree to within a few flipped INT8 steps",
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
