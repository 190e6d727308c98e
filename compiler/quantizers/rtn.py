"""rtn: round to nearest, s = 2 max|w| / (2^bits - 1) per group (MobileMoE Eq. 6; see `compiler/quant.py`)."""

from __future__ import annotations

from torch import Tensor

from moec.compiler.quant import QuantizedTensor, quantize_weight
from moec.compiler.quantizer import Inputs, Quantizer
from moec.compiler.spec.quantization import WeightScheme


class RoundToNearest(Quantizer):
    by_row = True

    def quantize(self, w_RL: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedTensor:
        return quantize_weight(w_RL, bits=scheme.bits, group_size=scheme.group_size, levels=scheme.levels)


QUANTIZER = RoundToNearest()
