"""The passes from a fused (or quantized) program to what this target lowers."""

from __future__ import annotations

import torch

from moec.compiler.dialect import FLOAT_ACTIVATIONS, OWN_OPERATORS, TORCH, Legality, Permitted
from moec.compiler.ops import linear_q
from moec.compiler.pipeline import Pass
from moec.passes.float_activations import float_activations
from moec.passes.last_token import last_token
from moec.passes.levels_to_int8 import levels_to_int8

LEGAL = Legality("the target metal", Permitted(TORCH, OWN_OPERATORS), (FLOAT_ACTIVATIONS,))
LINEARS = (linear_q, torch.ops.aten.linear.default)  # the head: what comes before it is computed for every token


def legalize_passes() -> list[Pass]:
    return [levels_to_int8(), float_activations(LEGAL), last_token(LINEARS, keep_dim=False)]
