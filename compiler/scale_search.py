"""The scale of each group that makes its rounding error least, plainly or weighted by the energy of the inputs.

R rows, L columns that are grouped, G groups, g elements of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.levels import Grid
from moec.compiler.quantizer import Inputs


def _factors(most: float, least: float, step: float) -> tuple[float, ...]:
    return tuple(most - step * i for i in range(round((most - least) / step) + 1))


# Of the scale that spans the group. Candidates this far apart, each with the least scale of its codes, come within 0.2%
# of the squared error that 600 candidates find. A wider range (0.48 for whole numbers) has less error on inputs that
# were seen; small models with few of them then did worse on others. Levels of tables double towards the ends: the
# largest weight may be the last but one, 8 of 12 in FP4.
_FACTORS_OF = {
    "": _factors(1.08, 0.64, 0.04),
    "nl3": _factors(1.4, 0.52, 0.08),
    "iq4_nl": _factors(1.32, 0.66, 0.06),
    "fp4": _factors(1.6, 0.64, 0.06),
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
    """Of the codes q that a candidate gives, the scale of least error is <w, q> / <q, q>, and that error is
    <w, w> - <w, q>^2 / <q, q>: the largest of the latter wins. Products are weighted by e."""
    low, high = grid.low, grid.high
    largest = w_RGg.gather(-1, w_RGg.abs().argmax(-1, keepdim=True))
    base = largest / low
    safe = torch.where(base == 0, 1.0, base)
    # a factor f of the signed scale, and the opposite sign, whose range ends at the largest value
    factors = _FACTORS_OF[grid.levels]
    opposite = () if low == -high else tuple(f * low / high for f in factors)
    # and the scales of `signed` and `rtn`, so that it is never worse than these
    spanning = 2.0 * safe.abs() * -low / grid.span
    ew_RGg = w_RGg if e_Gg is None else w_RGg * e_Gg
    best_gain, best = torch.zeros_like(base), torch.zeros_like(base)
    for scale in (*(safe * factor for factor in (*factors, *opposite)), safe, spanning):
        q = grid.nearest_(w_RGg / scale)
        wq = (q * ew_RGg).sum(-1, keepdim=True)
        q.square_()
        qq = (q if e_Gg is None else q.mul_(e_Gg)).sum(-1, keepdim=True)
        least = wq / qq.clamp(min=1e-30)
        gain = least * wq
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, least, best)
    return torch.where(base == 0, 0.0, best).squeeze(-1)
