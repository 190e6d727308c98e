"""gptq: scales by weighted search, then codes with error feedback (GPTQ, arXiv 2210.17323, Algorithm 1).

The inputs k are rounded in order. The error of one is spread over the columns not yet rounded, so that the product
changes least on what the inputs were: with H = sum x x^T and U the upper Cholesky factor of its inverse,

    e_N = (w_N,k - s q_N,k) / U_kk,     W_N,j -= e_N U_kj   for j > k.

Scales are those of the weights before any feedback. A diagonal is added to H, the larger the fewer tokens there were;
without any token this is `search`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moec.compiler.quant import QuantizedTensor, packed_codes, stored_scales
from moec.compiler.quantizer import Inputs, Moments, Quantizer
from moec.compiler.scale_search import best_scales, energies
from moec.compiler.spec.quantization import WeightScheme

_BLOCK = 64  # columns whose feedback is gathered before it reaches the rest: one product instead of many
_DAMPING = 0.01  # of the mean diagonal of H, as in the paper
_SHRINK = 0.1  # more of it, for as many tokens as there are inputs: fewer say little about how inputs go together


class Gptq(Quantizer):
    observes = Moments
    by_row = True

    def quantize(self, w_RL: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedTensor:
        along_in = scheme.axis == "in"
        scales = best_scales(w_RL, energies(inputs) if along_in else None, scheme.bits, scheme.group_size)
        scales = stored_scales(w_RL, scales)
        s_RL = scales.to(torch.float32).repeat_interleave(scheme.group_size, -1)
        w_NK, s_NK = (w_RL, s_RL) if along_in else (w_RL.t(), s_RL.t())
        q_NK = with_feedback(w_NK.to(torch.float32), s_NK, scheme.bits, inverse_factor(inputs, w_NK.shape[-1]))
        q_RL = q_NK if along_in else q_NK.t().contiguous()
        return QuantizedTensor(packed_codes(q_RL, scheme.bits), scales, scheme.bits, scheme.group_size)


def inverse_factor(inputs: Inputs | None, width: int) -> Tensor:
    """U [K, K], upper triangular with H^-1 = U^T U; the identity where nothing was seen. It is not to be changed."""
    if not isinstance(inputs, Moments) or not inputs.tokens:
        return torch.eye(width)
    return inputs.derived("inverse factor", lambda: _inverse_factor(inputs, width))


def _inverse_factor(inputs: Moments, width: int) -> Tensor:
    h_KK = inputs.moments_KK / inputs.tokens
    mean = float(h_KK.diagonal().mean())
    if not mean > 0:
        return torch.eye(width)
    damping = (_DAMPING + _SHRINK * min(1.0, width / inputs.tokens)) * mean
    h_KK.diagonal().add_(damping)
    while True:  # rounding can leave H not quite positive: more of the diagonal mends it
        # with the order of inputs reversed, H = V V^T for an upper V, and H^-1 = V^-T V^-1
        factor, failed = torch.linalg.cholesky_ex(h_KK.flip(0, 1))
        if not int(failed):
            break
        h_KK.diagonal().add_(damping)
    return torch.linalg.solve_triangular(factor.flip(0, 1), torch.eye(width), upper=True)


def with_feedback(w_NK: Tensor, s_NK: Tensor, bits: int, u_KK: Tensor) -> Tensor:
    """int8 codes [N, K]. A scale of 0 gives codes of 0."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # columns are worked on one by one: rows of the transpose, which lie together
    w_KN, s_KN = w_NK.t().contiguous(), s_NK.t().contiguous()
    inverse_KN = torch.where(s_KN == 0, 0.0, 1.0 / torch.where(s_KN == 0, 1.0, s_KN))
    diagonal = u_KK.diagonal().tolist()
    k = w_KN.shape[0]
    errors_KN = torch.empty(min(_BLOCK, k), w_KN.shape[1])
    for a in range(0, k, _BLOCK):
        b = min(a + _BLOCK, k)
        with one_thread():  # operations of a column are shorter than what threads wait for each other
            for i in range(a, b):
                column, error = w_KN[i], errors_KN[i - a]
                q = (column * inverse_KN[i]).round_().clamp_(low, high)
                torch.addcmul(column, q, s_KN[i], value=-1, out=error)
                error /= diagonal[i]
                w_KN[i] = q  # nobody reads the float again
                w_KN[i + 1 : b].addr_(u_KK[i, i + 1 : b], error, alpha=-1)
        w_KN[b:].addmm_(u_KK[a:b, b:].t(), errors_KN[: b - a], alpha=-1)
    return w_KN.to(torch.int8).t()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


QUANTIZER = Gptq()
