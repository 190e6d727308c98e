"""moec::cached_attention_q8: cached_attention over an INT8 cache, one scale per (token, key/value head).

k and v are rounded by `quant.quantize_rows` over their head width; scores and sums are fp32 over dequantized values.
Shapes as in cached_attention; caches int8 [1, S, KV, d], scales float32 [1, S, KV].
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ops.cached_attention import attend, check_operands, write_positions
from moec.compiler.ops.define import define, require
from moec.compiler.quant import quantize_rows


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    start_pos: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    positions = write_positions("cached_attention_q8", start_pos, q.shape[1], k_cache.shape[1])
    for value, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        codes, s = quantize_rows(value)
        cache.index_copy_(1, positions, codes.to(torch.int8))
        scales.index_copy_(1, positions, s.squeeze(-1))
    end = int(positions[-1]) + 1
    keys = k_cache[:, :end].to(torch.float32) * k_scale[:, :end, :, None]
    values = v_cache[:, :end].to(torch.float32) * v_scale[:, :end, :, None]
    return attend(q, keys, values, positions, scale, window)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    start_pos: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    check_operands("cached_attention_q8", q, k, v, k_cache, v_cache, window)
    require(k_cache.dtype == v_cache.dtype == torch.int8, "cached_attention_q8", "caches must be int8")
    for value in (k_scale, v_scale):
        require(tuple(value.shape) == tuple(k_cache.shape[:3]), "cached_attention_q8", "scales must be [1, S, KV]")
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * v.shape[3]))


cached_attention_q8 = define(
    "cached_attention_q8(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scale, "
    "Tensor(d!) v_scale, Tensor start_pos, float scale, int window) -> Tensor",
    _eager,
    _fake,
)
