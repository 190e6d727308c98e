"""The scale of each group that makes its rounding error least, plainly or weighted by the energy of the inputs.

R rows, L columns that are grouped, G groups, g elements of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.levels import Grid
from moec.compiler.quantizer import Inputs

_FACTORS = tuple(1.0 - 0.04 * i for i in range(-2, 10))  # 1.08 .. 0.64 of the scale that spans the group
# FP4's levels double towards the ends: the largest weight may well be the last but one, 8 of 12
_FACTORS_OF = {
    "": _FACTORS,
    "nl3": tuple(1.0 - 0.04 * i for i in range(-10, 14)),
    "iq4_nl": tuple(1.0 - 0.04 * i for i in range(-8, 10)),
    "fp4": tuple(1.0 - 0.04 * i for i in range(-15, 10)),
}
_CHUNK = 1 << 17  # elements searched at a time: a dozen temporaries of that size, which stay in the cache


def energies(inputs: Inputs | None) -> Tensor | None:
    """Mean square of each input, float32 [K], no less than a thousandth of their mean; None if nothing was seen."""
    if inputs is None or not inputs.tokens:
        return None
    e_K = (inputs.energy_K / inputs.tokens).to(torch.float32)
    mean = float(e_K.mean())
    return e_K.clamp(min=mean * 1e-3) if mean > 0 else None


def best_scales(w_RL: Tensor, e_L: Tensor | None, grid: Grid, group_size: int) -> Tensor:
    """float32 [R, L/g], of either sign; 0 for groups of zeros. e_L: weight of each column's squared error."""
    step = max(1, _CHUNK // w_RL.shape[-1])
    weights = None if e_L is None else e_L.unflatten(-1, (-1, group_size))
    pieces = [_search(w.to(torch.float32).unflatten(-1, (-1, group_size)), weights, grid) for w in w_RL.split(step)]
    return torch.cat(pieces)


def _search(w_RGg: Tensor, e_Gg: Tensor | None, grid: Grid) -> Tensor:
    low, high = grid.low, grid.high
    largest = w_RGg.gather(-1, w_RGg.abs().argmax(-1, keepdim=True))
    base = largest / low
    safe = torch.where(base == 0, 1.0, base)
    best_error = torch.full(base.shape, torch.inf)
    best = torch.zeros_like(base)
    # a factor f of the signed scale, and the opposite sign, whose range ends at the largest value
    factors = _FACTORS_OF[grid.levels]
    opposite = () if low == -high else tuple(f * low / high for f in factors)
    # rtn's scale is a candidate too: its error can have a minimum between two of the others
    spanning = 2.0 * base.abs() * -low / grid.span
    candidates = (*(safe * factor for factor in (*factors, *opposite)), torch.where(base == 0, 1.0, spanning))
    for scale in candidates:
        q = grid.nearest_(w_RGg / scale)
        error = q.mul_(scale).sub_(w_RGg).square_()
        total = (error if e_Gg is None else error.mul_(e_Gg)).sum(-1, keepdim=True)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        best = torch.where(better, scale, best)
    q = grid.nearest_(w_RGg / best)
    qe = q if e_Gg is None else q * e_Gg
    refined = (qe * w_RGg).sum(-1, keepdim=True) / (qe * q).sum(-1, keepdim=True).clamp(min=1e-30)
    again = grid.nearest_(w_RGg / torch.where(refined == 0, 1.0, refined))
    error = again.mul_(refined).sub_(w_RGg).square_()
    total = (error if e_Gg is None else error.mul_(e_Gg)).sum(-1, keepdim=True)
    best = torch.where(total < best_error, refined, best)
    return torch.where(base == 0, 0.0, best).squeeze(-1)
