"""signed: round to nearest with the whole range of codes: s = m / low, m the group's largest in magnitude.

The least value `low`, -2^(bits-1), which `rtn` hardly uses, stands for that largest element exactly, so the scale takes
its sign and is 15/16 of rtn's in INT4. This is the rule of llama.cpp's Q4_0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.levels import Grid
from moec.compiler.quant import QuantizedTensor, rounded_to
from moec.compiler.quantizer import Inputs, Quantizer
from moec.compiler.spec.quantization import WeightScheme


def signed_scales(w_RGg: Tensor, grid: Grid) -> Tensor:
    """[R, G] of groups [R, G, g]."""
    largest = w_RGg.gather(-1, w_RGg.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return largest / grid.low


class Signed(Quantizer):
    by_row = True

    def quantize(self, w_RL: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedTensor:
        grouped = w_RL.to(torch.float32).unflatten(-1, (-1, scheme.group_size))
        return rounded_to(w_RL, signed_scales(grouped, scheme.grid), grid=scheme.grid)


QUANTIZER = Signed()
