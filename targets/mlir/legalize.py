"""This target changes nothing in a quantized program: every rounding that the spec asks for is in the text."""

from __future__ import annotations

from moec.compiler.dialect import OWN_OPERATORS, TORCH, Legality, Permitted
from moec.compiler.pipeline import Pass, legal_for

LEGAL = Legality("the target mlir", Permitted(TORCH, OWN_OPERATORS))


def legalize_passes() -> list[Pass]:
    return [legal_for(LEGAL, "mlir_legal")]
