"""moec::cached_attention: causal grouped-query attention over a KV cache that it extends.

T tokens of this call, S cache positions, H query heads, KV key/value heads (H a multiple of KV), d head width, e value
width. q [1, T, H, d], k [1, T, KV, d], v [1, T, KV, e], caches [1, S, KV, d or e], start_pos int64 [1]. Writes k and v
at positions start_pos .. start_pos+T-1, then query t (position p = start_pos+t) attends to the cache positions j with
j <= p and, when window > 0, p - j < window. Returns [1, T, H*e].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.call import Call, V, Written, register, require


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


@dataclass(frozen=True)
class AttentionCall(Call[V]):
    """What every form of attention over a cache begins with."""

    q: V
    k: V
    v: V
    k_cache: Written[V]
    v_cache: Written[V]

    def check(self: AttentionCall[Tensor], op: str, window: int) -> None:
        """ValueError for shapes that are not those of the module's docstring."""
        q, k, v, k_cache, v_cache = self.q, self.k, self.v, self.k_cache, self.v_cache
        for name, value in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
            require(value.dim() == 4, op, f"{name} must have four dimensions")
        require(q.shape[3] == k.shape[3] == k_cache.shape[3], op, "q, k and k_cache must have the same head width")
        require(v.shape[3] == v_cache.shape[3], op, "v and v_cache must have the same head width")
        require(k.shape[2] == v.shape[2] == k_cache.shape[2] == v_cache.shape[2], op, "k, v and caches differ in heads")
        require(q.shape[2] % k.shape[2] == 0, op, "query heads must be a multiple of key/value heads")
        require(k_cache.shape[1] == v_cache.shape[1], op, "the caches differ in length")
        require(window >= 0, op, "window must not be negative")

    def result(self: AttentionCall[Tensor]) -> Tensor:
        """[1, T, H*e] without values."""
        return self.q.new_empty((self.q.shape[0], self.q.shape[1], self.q.shape[2] * self.v.shape[3]))


@dataclass(frozen=True)
class CachedAttention(AttentionCall[V]):
    start_pos: V
    scale: float
    window: int

    def eager(self: CachedAttention[Tensor]) -> Tensor:
        positions = write_positions("cached_attention", self.start_pos, self.q.shape[1], self.k_cache.shape[1])
        self.k_cache.index_copy_(1, positions, self.k)
        self.v_cache.index_copy_(1, positions, self.v)
        # what lies behind the last written position is masked: leaving it out makes a short context cheap
        end = int(positions[-1]) + 1
        return attend(self.q, self.k_cache[:, :end], self.v_cache[:, :end], positions, self.scale, self.window)

    def fake(self: CachedAttention[Tensor]) -> Tensor:
        self.check("cached_attention", self.window)
        return self.result()


cached_attention = register("cached_attention", CachedAttention)
