"""The passes from a fused (or quantized) program to what this target lowers."""

from __future__ import annotations

from moec.compiler.dialect import FLOAT_ACTIVATIONS, OWN_OPERATORS, TORCH, Legality, Permitted
from moec.compiler.pipeline import Pass
from moec.passes.float_activations import float_activations
from moec.passes.levels_to_int8 import levels_to_int8

LEGAL = Legality("the target onnx", Permitted(TORCH, OWN_OPERATORS), (FLOAT_ACTIVATIONS,))


def legalize_passes() -> list[Pass]:
    return [levels_to_int8(), float_activations(LEGAL)]
