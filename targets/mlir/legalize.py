"""This target keeps every rounding that the spec asks for: it is in the text. Levels become the INT8 values that they
are."""

from __future__ import annotations

from moec.compiler.dialect import OWN_OPERATORS, TORCH, Legality, Permitted
from moec.compiler.pipeline import Pass, legal_for
from moec.passes.levels_to_int8 import levels_to_int8

LEGAL = Legality("the target mlir", Permitted(TORCH, OWN_OPERATORS))


def legalize_passes() -> list[Pass]:
    return [levels_to_int8(), legal_for(LEGAL, "mlir_legal")]
