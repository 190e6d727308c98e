"""gptq: scales by weighted search, then codes with error feedback (GPTQ, arXiv 2210.17323).

The inputs k are rounded in order, and the error of one is spread over the columns not yet rounded. Then, in turn, the
scales are fitted to the codes, each column's codes are chosen anew beside all others, and the scales are fitted again:
an eighth less error for as much work again (`compiler/error_feedback.py`). Groups along the outputs keep the scales of
the search. A diagonal is added to H, the larger the fewer tokens there were; without any token this is `search`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.error_feedback import damped, descended, has_seen, inverse_factor, refitted, with_feedback
from moec.compiler.quant import QuantizedTensor, packed_codes, rounded_to, stored_scales
from moec.compiler.quantizer import Inputs, Moments, Quantizer
from moec.compiler.scale_search import best_scales, energies
from moec.compiler.spec.quantization import WeightScheme


class Gptq(Quantizer):
    observes = Moments
    by_row = True

    def quantize(self, w_RL: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedTensor:
        along_in, size, grid = scheme.axis == "in", scheme.group_size, scheme.grid
        scales = best_scales(w_RL, energies(inputs) if along_in else None, grid, size)
        if not has_seen(inputs):
            return rounded_to(w_RL, scales, grid=grid)
        assert isinstance(inputs, Moments)
        scales = stored_scales(w_RL, scales)
        w_NK = (w_RL if along_in else w_RL.t()).to(torch.float32)
        h_KK = damped(inputs)

        def spread() -> Tensor:
            s_RL = scales.to(torch.float32).repeat_interleave(size, -1)
            return s_RL if along_in else s_RL.t()

        def fitted(q_NK: Tensor) -> Tensor:
            return stored_scales(w_RL, refitted(w_NK, q_NK, scales, h_KK)) if along_in else scales

        q_NK = with_feedback(w_NK, spread(), grid, inverse_factor(inputs))
        scales = fitted(q_NK)
        q_NK = descended(w_NK, q_NK, spread(), grid, h_KK)
        scales = fitted(q_NK)
        q_RL = (q_NK if along_in else q_NK.t()).contiguous()
        return QuantizedTensor(packed_codes(q_RL, grid), scales, grid.bits, size, levels=grid.levels)


QUANTIZER = Gptq()
