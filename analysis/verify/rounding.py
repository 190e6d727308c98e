"""Comparing a quantized graph with a float one: the same weights on both sides, and rounding switched off or shaken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moec.analysis.verify.interpret import Override
from moec.analysis.verify.reference import SHAKE
from moec.compiler import ops
from moec.compiler.ops.cached_attention import cached_attention
from moec.compiler.program import LazyWeight, Program
from moec.compiler.weights import QuantizedWeight


def with_weights_of(before: Program, after: Program) -> Program:
    """`before` with the dequantized codes of `after` in the place of each weight that `after` quantized."""
    replaced = dict(before.weights)
    for name, weight in before.weights.items():
        held = after.quantized.get(name)
        if held is None or name in after.weights or held.codes not in after.weights:
            continue
        replaced[name] = LazyWeight(weight.shape, weight.dtype, _dequantizer(held, after, weight.dtype))
    return replace(before, weights=replaced)


def _dequantizer(held: QuantizedWeight, program: Program, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: held.dequantize(program.weights, dtype)


def unrounded_operators() -> dict[Any, Override]:
    """The quantized operators with the same codes, in fp32 arithmetic: no rounding of activations or of the cache."""
    caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
        k_scale: torch.Tensor, v_scale: torch.Tensor, start_pos: torch.Tensor, scale: float, window: int,
    ) -> torch.Tensor:  # fmt: skip
        def empty(cache: torch.Tensor) -> torch.Tensor:
            return torch.zeros(cache.shape, dtype=torch.float32)

        if int(start_pos) == 0 or id(k_cache) not in caches:
            caches[id(k_cache)] = (empty(k_cache), empty(v_cache))
        keys, values = caches[id(k_cache)]
        return cached_attention(q, k, v, keys, values, start_pos, scale, window)

    return {ops.cached_attention_q8: attention, **float_products()}


def float_products() -> dict[Any, Override]:
    """The quantized products with the same codes, in fp32 arithmetic: activations are not rounded, the cache is."""

    def moe(*args: Any, **kwargs: Any) -> torch.Tensor:
        return ops.fused_moe_q(*args[:-1], False, **kwargs)

    def linear(*args: Any, **kwargs: Any) -> torch.Tensor:
        return ops.linear_q(*args[:-1], False, **kwargs)

    return {ops.fused_moe_q: moe, ops.linear_q: linear}


def shaken_operators(shake: float = SHAKE) -> dict[Any, Override]:
    """Norms with noise in the last places: how far a rounding program drifts from itself. See `reference.py`."""
    noise = torch.Generator().manual_seed(0)

    def norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        y = ops.rms_norm(x, weight, eps)
        return y * (1 + shake * torch.randn(y.shape, generator=noise))

    def plain(
        x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
    ) -> torch.Tensor:
        y = torch.ops.aten.rms_norm.default(x, shape, weight, eps)
        return y * (1 + shake * torch.randn(y.shape, generator=noise))

    return {ops.rms_norm: norm, torch.ops.aten.rms_norm.default: plain}
