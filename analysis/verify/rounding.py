"""Comparing a quantized graph with a float one: the same weights on both sides, and rounding switched off or shaken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moec.analysis.verify.interpret import Override
from moec.analysis.verify.reference import SHAKE
from moec.compiler import ops
from moec.compiler.program import LazyWeight, Program
from moec.compiler.weights import QuantizedWeight


def with_weights_of(before: Program, after: Program) -> Program:
    """`before` with the dequantized codes of `after` in the place of each weight that `after` quantized.

    Where a calibration scaled channels and `before` is the model as it was before that, the scaling is undone.
    """
    replaced = dict(before.weights)
    for name, weight in before.weights.items():
        held = after.quantized.get(name)
        if held is None or name in after.weights or held.codes not in after.weights:
            continue
        replaced[name] = LazyWeight(weight.shape, weight.dtype, _dequantizer(held, after, weight))
    return replace(before, weights=replaced)


def _dequantizer(held: QuantizedWeight, program: Program, weight: LazyWeight) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        value = held.dequantize(program.weights, weight.dtype)
        scaled = weight.stored is not None  # a calibrated weight: its float value is scaled as its codes are
        return value if scaled or held.unscaled is None else held.unscaled(value)

    return load


def unrounded_operators() -> dict[Any, Override]:
    """The quantized operators with the same codes, in fp32 arithmetic: no rounding of activations or of the cache."""
    caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = ops.CachedAttentionQ8[torch.Tensor](*args, **kwargs)

        def empty(cache: torch.Tensor) -> torch.Tensor:
            return torch.zeros(cache.shape, dtype=torch.float32)

        place = id(call.k_cache)
        if int(call.start_pos) == 0 or place not in caches:
            caches[place] = (empty(call.k_cache), empty(call.v_cache))
        exact: ops.CachedAttention[torch.Tensor] = ops.CachedAttention(
            q=call.q,
            k=call.k,
            v=call.v,
            k_cache=caches[place][0],
            v_cache=caches[place][1],
            start_pos=call.start_pos,
            scale=call.scale,
            window=call.window,
        )
        return exact.eager()

    return {ops.cached_attention_q8: attention, **float_products()}


def float_products() -> dict[Any, Override]:
    """The quantized products with the same codes, in fp32 arithmetic: activations are not rounded, the cache is."""

    def unrounded(call: type[ops.FusedMoeQ[Any]] | type[ops.LinearQ[Any]]) -> Override:
        def product(*args: Any, **kwargs: Any) -> torch.Tensor:
            return replace(call(*args, **kwargs), int8_activations=False, activation_block=0).eager()

        return product

    return {call.op: unrounded(call) for call in (ops.FusedMoeQ, ops.LinearQ)}


def shaken_operators(shake: float = SHAKE) -> dict[Any, Override]:
    """Norms with noise in the last places: how far a rounding program drifts from itself. See `reference.py`."""
    noise = torch.Generator().manual_seed(0)

    def norm(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = ops.RmsNorm[torch.Tensor](*args, **kwargs).eager()
        return y * (1 + shake * torch.randn(y.shape, generator=noise))

    def plain(
        x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
    ) -> torch.Tensor:
        y = torch.ops.aten.rms_norm.default(x, shape, weight, eps)
        return y * (1 + shake * torch.randn(y.shape, generator=noise))

    return {ops.rms_norm: norm, torch.ops.aten.rms_norm.default: plain}
