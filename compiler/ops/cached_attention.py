"""moec::cached_attention: causal grouped-query attention over a KV cache that it extends.

T tokens of this call, S cache positions, H query heads, KV key/value heads (H a multiple of KV), d head width, e value
width. q [1, T, H, d], k [1, T, KV, d], v [1, T, KV, e], caches [1, S, KV, d or e], start_pos int64 [1]. Writes k and v
at positions start_pos .. start_pos+T-1, then query t (position p = start_pos+t) attends to the cache positions j with
j <= p and, when window > 0, p - j < window. Returns [1, T, H*e].

sinks float32 [H]: one more score of each head, which adds to the sum of the softmax and has no value (GPT-OSS).
softcap > 0: a score s becomes softcap * tanh(s / softcap) before the mask (Gemma 2); a sink is not capped.

A cache holds float32 or, with scales beside it, INT8 codes: k_scale and v_scale float32 [1, S, KV], one per position
and head. k and v are then rounded by `quant.quantize_rows` over their head width; scores and sums are fp32 over
dequantized values. An engine may multiply the codes instead (`Target.integer_attention`): `in_integers` computes that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.attention_codes import attend_codes
from moec.compiler.ops.call import Call, V, Written, register, require
from moec.compiler.quant import quantize_rows

_OP = "cached_attention"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """q [1,T,H,d] over whole caches k [1,S,KV,d], v [1,S,KV,e] in fp32; positions [T], sinks [H]."""
    seen = torch.arange(k.shape[1], device=q.device)[None, :]
    mask = seen <= positions[:, None]
    if window > 0:
        mask = mask & (positions[:, None] - seen < window)
    if sinks is not None or softcap > 0:
        return _attend_in_products(q, k, v, mask, scale, sinks, softcap)
    y = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return y.transpose(1, 2).flatten(2)


def _attend_in_products(
    q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor, scale: float, sinks: Tensor | None, softcap: float
) -> Tensor:
    per = q.shape[2] // k.shape[2]
    k_1SHd, v_1SHe = k.repeat_interleave(per, 2), v.repeat_interleave(per, 2)
    scores = torch.einsum("bthd,bshd->bhts", q * scale, k_1SHd)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask_TS, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        beside = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat((scores, beside), -1), -1)[..., :-1]
    return torch.einsum("bhts,bshe->bthe", weights, v_1SHe).flatten(2)


def write_positions(op: str, start_pos: Tensor, count: int, size: int) -> Tensor:
    """The cache positions of a call; ValueError when they do not fit the cache."""
    start = int(start_pos.reshape(()).item())
    require(
        start >= 0 and start + count <= size, op, f"positions {start}..{start + count - 1} do not fit a cache of {size}"
    )
    return torch.arange(start, start + count, device=start_pos.device)


@dataclass(frozen=True)
class CachedAttention(Call[V]):
    q: V
    k: V
    v: V
    k_cache: Written[V]
    v_cache: Written[V]
    start_pos: V
    scale: float
    window: int
    k_scale: Written[V] | None = None
    v_scale: Written[V] | None = None
    sinks: V | None = None
    softcap: float = 0.0

    def parts(self) -> tuple[tuple[V, V, V | None], tuple[V, V, V | None]]:
        """Keys and values: (the rows of this call, their cache, the cache's scales)."""
        return (self.k, self.k_cache, self.k_scale), (self.v, self.v_cache, self.v_scale)

    @property
    def coded(self) -> bool:
        """Whether the caches hold codes."""
        return self.k_scale is not None

    def eager(self: CachedAttention[Tensor]) -> Tensor:
        positions = write_positions(_OP, self.start_pos, self.q.shape[1], self.k_cache.shape[1])
        # what lies behind the last written position is masked: leaving it out makes a short context cheap
        end = int(positions[-1]) + 1
        keys, values = (dequantized(*extended(*part, positions, end)) for part in self.parts())
        return attend(self.q, keys, values, positions, self.scale, self.window, self.sinks, self.softcap)

    def in_integers(self: CachedAttention[Tensor]) -> Tensor:
        """`eager` as engines compute it that multiply codes of caches as they are: queries and weights are rounded to
        16 bits (`attention_codes.py`). The same as `eager` over float caches."""
        if not self.coded:
            return self.eager()
        positions = write_positions(_OP, self.start_pos, self.q.shape[1], self.k_cache.shape[1])
        end = int(positions[-1]) + 1
        (k, k_scale), (v, v_scale) = (extended(*part, positions, end) for part in self.parts())
        assert k_scale is not None
        assert v_scale is not None
        rest = positions, self.scale, self.window, self.sinks, self.softcap
        return attend_codes(self.q, ((k, k_scale),), (v, v_scale), *rest)

    def fake(self: CachedAttention[Tensor]) -> Tensor:
        """[1, T, H*e] without values; ValueError for shapes that are not those of the module's docstring."""
        q, k, v, k_cache, v_cache = self.q, self.k, self.v, self.k_cache, self.v_cache
        for name, value in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
            require(value.dim() == 4, _OP, f"{name} must have four dimensions")
        require(q.shape[3] == k.shape[3] == k_cache.shape[3], _OP, "q, k and k_cache must have the same head width")
        require(v.shape[3] == v_cache.shape[3], _OP, "v and v_cache must have the same head width")
        require(
            k.shape[2] == v.shape[2] == k_cache.shape[2] == v_cache.shape[2], _OP, "k, v and caches differ in heads"
        )
        require(q.shape[2] % k.shape[2] == 0, _OP, "query heads must be a multiple of key/value heads")
        require(k_cache.shape[1] == v_cache.shape[1], _OP, "the caches differ in length")
        require(self.window >= 0, _OP, "window must not be negative")
        require(0 <= self.softcap < math.inf, _OP, "softcap must be finite and not negative")
        require((self.k_scale is None) == (self.v_scale is None), _OP, "keys and values must be stored alike")
        for _, cache, scales in self.parts():
            if scales is None:
                require(cache.dtype.is_floating_point, _OP, "caches of codes need their scales")
                continue
            require(cache.dtype == torch.int8, _OP, "caches with scales must be int8")
            require(tuple(scales.shape) == tuple(cache.shape[:3]), _OP, "scales must be [1, S, KV]")
        if self.sinks is not None:
            require(self.sinks.dtype == torch.float32, _OP, "sinks must be float32")
            require(tuple(self.sinks.shape) == (q.shape[2],), _OP, "sinks must be [H]")
        return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * v.shape[3]))


def extended(
    rows: Tensor, cache: Tensor, scales: Tensor | None, positions: Tensor, end: int
) -> tuple[Tensor, Tensor | None]:
    """Write `rows` [1, T, KV, d] at `positions`; the first `end` positions of the cache and of its scales."""
    if scales is None:
        cache.index_copy_(1, positions, rows)
        return cache[:, :end], None
    codes, scale = quantize_rows(rows)
    cache.index_copy_(1, positions, codes.to(torch.int8))
    scales.index_copy_(1, positions, scale.squeeze(-1))
    return cache[:, :end], scales[:, :end]


def dequantized(cache: Tensor, scales: Tensor | None) -> Tensor:
    """The values of a cache that `extended` returned."""
    return cache if scales is None else cache.to(torch.float32) * scales[..., None]


cached_attention = register(_OP, CachedAttention)
