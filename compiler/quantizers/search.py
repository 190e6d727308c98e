"""search: for each group the scale of least squared error, sum_i (w_i - s q_i)^2, of either sign.

Candidates are the signed scale (see `signed.py`) and its opposite, each times factors around one; the best is refined
once by least squares for its codes: s = sum w q / sum q^2. The values of a group are independent of those of another,
so this is the least error that rounding to the nearest code can have, up to the grid of factors.
"""

from __future__ import annotations

from torch import Tensor

from moec.compiler.quant import QuantizedTensor, rounded_to
from moec.compiler.quantizer import Inputs, Quantizer
from moec.compiler.scale_search import best_scales
from moec.compiler.spec.quantization import WeightScheme


class Search(Quantizer):
    by_row = True

    def quantize(self, w_RL: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedTensor:
        return rounded_to(w_RL, best_scales(w_RL, None, scheme.grid, scheme.group_size), grid=scheme.grid)


QUANTIZER = Search()
