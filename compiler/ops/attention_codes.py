"""Attention over INT8 caches as the kernels compute it: products of codes, whose sums are exact.

    query   c = rint(q * m / max|q|) per token and head, m = min(32512, (2^31 - 1) / (128 d)); its step is max|q| / m
    score   s = (sum of c * key codes) * scale * key scale * step; of keys in parts, the sum of that over the parts
    weight  w = exp(s - largest s of the chunk) * value scale, rounded to rint(w * 32512 / max w), step max w / 32512
    chunk   y = (sum of rounded w * value codes) * step, with the sum of exp beside it

A chunk is 256 positions of the cache, counted from 0. Chunks are folded in order, as in FlashAttention (arXiv
2205.14135). The errors of rounding are 2^-16 of the largest element, where the cache's own are 2^-8.
`runtime/kernels/attention/attention_scalar.cpp` is the same in C++.

T tokens, S positions, C positions of a chunk, H query heads, G key/value heads, P = H / G, d head width, e value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.quant import quotient

_CHUNK = 256
_MOST = 127 * 256  # two signed bytes
_TINY = 1e-30

Coded = tuple[Tensor, Tensor]  # codes int8 [1, S, G, width] and their scales float32 [1, S, G]
Keys = tuple[Coded, ...]  # one part after the other along the head width, each with scales of its own


def attend_codes(
    q_1THd: Tensor,
    keys: Keys,
    values: Coded,
    positions_T: Tensor,
    scale: float,
    window: int,
    sinks_H: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """[1, T, H * e] float32. keys, values: up to the last position that a token sees; positions int64 [T]. window,
    sinks, softcap: as in `cached_attention`."""
    _, tokens, heads, width = q_1THd.shape
    groups, e = values[0].shape[2:]
    widths = [codes.shape[3] for codes, _ in keys]
    q_GTPd = q_1THd[0].float().unflatten(1, (groups, heads // groups)).transpose(0, 1)
    codes_GTPd, step_GTP1 = _rounded(q_GTPd, max(1, min(_MOST, 0x7FFFFFFF // (128 * width))))
    top = q_GTPd.new_full(step_GTP1.shape, -torch.inf)
    total, acc = torch.zeros_like(top), q_GTPd.new_zeros((*top.shape[:-1], e))
    first = int(positions_T[0]) - window + 1 if window > 0 else 0
    for begin in range(max(first, 0) // _CHUNK * _CHUNK, values[0].shape[1], _CHUNK):
        part = slice(begin, begin + _CHUNK)
        v_GCe, v_G11C = _part(*values, part)
        at_C = torch.arange(begin, begin + v_GCe.shape[1], device=q_1THd.device)
        seen_TC = at_C <= positions_T[:, None]
        if window > 0:
            seen_TC &= positions_T[:, None] - at_C < window
        s_GTPC = torch.zeros((), device=q_1THd.device)
        for c_GTPd, (k_GCd, k_G11C) in zip(codes_GTPd.split(widths, -1), (_part(*k, part) for k in keys), strict=True):
            # sums below 2^31 are exact in float64
            dot_GTPC = torch.einsum("gtpd,gcd->gtpc", c_GTPd, k_GCd.double()).float()
            s_GTPC = s_GTPC + dot_GTPC * (scale * k_G11C)
        s_GTPC = s_GTPC * step_GTP1
        if softcap > 0:
            s_GTPC = softcap * torch.tanh(s_GTPC / softcap)
        s_GTPC = s_GTPC.masked_fill(~seen_TC[None, :, None], -torch.inf)
        highest = s_GTPC.amax(-1, keepdim=True)
        p_GTPC = torch.exp(s_GTPC - highest.clamp(min=torch.finfo(torch.float32).min))
        # a value of a position that is not seen has weight 0, whatever its scale
        weights, step = _rounded(torch.where(p_GTPC == 0, 0.0, p_GTPC * v_G11C), _MOST)
        y_GTPe = torch.einsum("gtpc,gce->gtpe", weights, v_GCe.double()).float() * step
        top, total, acc = _folded((top, total, acc), (highest, p_GTPC.sum(-1, keepdim=True), y_GTPe))
    if sinks_H is not None:
        sink = sinks_H.view(groups, 1, -1, 1).expand_as(top)
        top, total, acc = _folded((top, total, acc), (sink, torch.ones_like(total), torch.zeros_like(acc)))
    return (acc / total).transpose(0, 1).reshape(1, tokens, heads * e)


def _part(codes: Tensor, scales: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    return codes[0, part].transpose(0, 1), scales[0, part].T[:, None, None]


def _rounded(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Codes in [-most, most] as float64 and the step [..., 1], by the largest of a row. NaN spoils the step."""
    highest = x.abs().amax(-1, keepdim=True)
    usable = highest > _TINY
    codes = torch.round(x * torch.where(usable, quotient(most, highest), 0.0)).clamp(-most, most)
    step = torch.where(usable | highest.isnan(), highest / most, 1.0)
    return codes.double(), torch.where(highest.isinf(), torch.nan, step)


def _folded(old: tuple[Tensor, Tensor, Tensor], fresh: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(largest score, sum of exp, weighted values), all in units of exp(largest score), of two sets of positions."""
    top = torch.maximum(old[0], fresh[0])
    safe = top.clamp(min=torch.finfo(torch.float32).min)  # nothing seen on either side: factors of 0
    before, now = torch.exp(old[0] - safe), torch.exp(fresh[0] - safe)
    return top, old[1] * before + fresh[1] * now, old[2] * before + fresh[2] * now
