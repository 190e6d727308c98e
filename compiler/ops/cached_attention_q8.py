"""moec::cached_attention_q8: cached_attention over an INT8 cache, one scale per (token, key/value head).

k and v are rounded by `quant.quantize_rows` over their head width; scores and sums are fp32 over dequantized values.
Shapes as in cached_attention; caches int8 [1, S, KV, d], scales float32 [1, S, KV].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.cached_attention import AttentionCall, attend, write_positions
from moec.compiler.ops.call import V, Written, register, require
from moec.compiler.quant import quantize_rows


@dataclass(frozen=True)
class CachedAttentionQ8(AttentionCall[V]):
    k_scale: Written[V]
    v_scale: Written[V]
    start_pos: V
    scale: float
    window: int

    def eager(self: CachedAttentionQ8[Tensor]) -> Tensor:
        k_cache, v_cache, k_scale, v_scale = self.k_cache, self.v_cache, self.k_scale, self.v_scale
        positions = write_positions("cached_attention_q8", self.start_pos, self.q.shape[1], k_cache.shape[1])
        for value, cache, scales in ((self.k, k_cache, k_scale), (self.v, v_cache, v_scale)):
            codes, s = quantize_rows(value)
            cache.index_copy_(1, positions, codes.to(torch.int8))
            scales.index_copy_(1, positions, s.squeeze(-1))
        end = int(positions[-1]) + 1
        keys = k_cache[:, :end].to(torch.float32) * k_scale[:, :end, :, None]
        values = v_cache[:, :end].to(torch.float32) * v_scale[:, :end, :, None]
        return attend(self.q, keys, values, positions, self.scale, self.window)

    def fake(self: CachedAttentionQ8[Tensor]) -> Tensor:
        op = "cached_attention_q8"
        self.check(op, self.window)
        require(self.k_cache.dtype == self.v_cache.dtype == torch.int8, op, "caches must be int8")
        for value in (self.k_scale, self.v_scale):
            require(tuple(value.shape) == tuple(self.k_cache.shape[:3]), op, "scales must be [1, S, KV]")
        return self.result()


cached_attention_q8 = register("cached_attention_q8", CachedAttentionQ8)
