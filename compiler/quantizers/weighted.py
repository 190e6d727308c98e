"""weighted: `search` with each error weighted by the energy of its input, sum_k e_k (w_k - s q_k)^2.

e_k is the mean square of input k on calibration text: the expected squared error of the product, if inputs were
uncorrelated. Groups along the outputs have one input each, and are searched without weights.
"""

from __future__ import annotations

from torch import Tensor

from moec.compiler.quant import QuantizedTensor, rounded_to
from moec.compiler.quantizer import Inputs, Quantizer
from moec.compiler.scale_search import best_scales, energies
from moec.compiler.spec.quantization import WeightScheme


class Weighted(Quantizer):
    observes = Inputs
    by_row = True

    def quantize(self, w_RL: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedTensor:
        e_L = energies(inputs) if scheme.axis == "in" else None
        return rounded_to(w_RL, best_scales(w_RL, e_L, scheme.grid, scheme.group_size), grid=scheme.grid)


QUANTIZER = Weighted()
