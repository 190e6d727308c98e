"""moec::cached_attention: causal grouped-query attention over a KV cache that it extends.

T tokens of this call, S cache positions, H query heads, KV key/value heads (H a multiple of KV), d head width, e value
width. Writes k and v at positions start_pos .. start_pos+T-1, then query t (position p = start_pos+t) attends to the
cache positions j with j <= p and, when window > 0, p - j < window. Returns [1, T, H*e].
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ops.define import define, require


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int) -> Tensor:
    """q [1,T,H,d] over whole caches k [1,S,KV,d], v [1,S,KV,e] in fp32; positions [T]."""
    seen = torch.arange(k.shape[1], device=q.device)[None, :]
    mask = seen <= positions[:, None]
    if window > 0:
        mask = mask & (positions[:, None] - seen < window)
    y = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return y.transpose(1, 2).flatten(2)


def write_positions(op: str, start_pos: Tensor, count: int, size: int) -> Tensor:
    """The cache positions of a call; ValueError when they do not fit the cache."""
    start = int(start_pos.reshape(()).item())
    require(
        start >= 0 and start + count <= size, op, f"positions {start}..{start + count - 1} do not fit a cache of {size}"
    )
    return torch.arange(start, start + count, device=start_pos.device)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start_pos: Tensor, scale: float, window: int
) -> Tensor:
    positions = write_positions("cached_attention", start_pos, q.shape[1], k_cache.shape[1])
    k_cache.index_copy_(1, positions, k)
    v_cache.index_copy_(1, positions, v)
    # what lies behind the last written position is masked: leaving it out makes a short context cheap
    end = int(positions[-1]) + 1
    return attend(q, k_cache[:, :end], v_cache[:, :end], positions, scale, window)


def check_operands(op: str, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, window: int) -> None:
    """q [1, T, H, d], k [1, T, KV, d], v [1, T, KV, e], caches [1, S, KV, d or e]; H a multiple of KV."""
    for name, value in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        require(value.dim() == 4, op, f"{name} must have four dimensions")
    require(q.shape[3] == k.shape[3] == k_cache.shape[3], op, "q, k and k_cache must have the same head width")
    require(v.shape[3] == v_cache.shape[3], op, "v and v_cache must have the same head width")
    require(k.shape[2] == v.shape[2] == k_cache.shape[2] == v_cache.shape[2], op, "k, v and caches differ in heads")
    require(q.shape[2] % k.shape[2] == 0, op, "query heads must be a multiple of key/value heads")
    require(k_cache.shape[1] == v_cache.shape[1], op, "the caches differ in length")
    require(window >= 0, op, "window must not be negative")


def _fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start_pos: Tensor, scale: float, window: int
) -> Tensor:
    check_operands("cached_attention", q, k, v, k_cache, v_cache, window)
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * v.shape[3]))


cached_attention = define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor start_pos, "
    "float scale, int window) -> Tensor",
    _eager,
    _fake,
)
