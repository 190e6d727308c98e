"""Comparing a quantized graph with a float one: the same weights on both sides, rounding switched off or perturbed, and
the routing of another run forced (`routed_as`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moec.analysis.verify.interpret import Override
from moec.compiler import ops
from moec.compiler.ops.moe_math import combine_weights
from moec.compiler.program import LazyWeight, Program
from moec.compiler.reference import NOISE
from moec.compiler.target import Target
from moec.compiler.weights import Origin, QuantizedWeight


def with_weights_of(before: Program, after: Program) -> Program:
    """`before` with the dequantized codes of `after` in the place of each weight that `after` quantized.

    Weights that were joined or stacked in between get their parts of the codes. Where a calibration scaled channels and
    `before` is the model as it was before that, the scaling is undone.
    """
    values = _Values(before, after)
    replaced = dict(before.weights)
    for name, parts in _held_parts(before, after).items():
        weight = before.weights[name]
        replaced[name] = LazyWeight(weight.shape, weight.dtype, _loader(weight, parts, values))
    return replace(before, weights=replaced)


def untraced(before: Program, after: Program) -> list[str]:
    """Weights that `after` quantized and that cannot be found in `before`: `with_weights_of` leaves these in float."""
    found = {held.name for parts in _held_parts(before, after).values() for held, _ in parts}
    names = (n for n, held in after.quantized.items() if held.codes in after.weights and n not in after.weights)
    lost = {n for n in names if n not in found}
    for name, held in after.quantized.items():
        if name not in before.weights and any(o.name not in before.weights for o in held.origins):
            lost.add(name)
    return sorted(lost)


_Part = tuple[QuantizedWeight, Origin]


def _held_parts(before: Program, after: Program) -> dict[str, list[_Part]]:
    """Weights of `before` that `after` holds as codes, and where they lie in these."""
    parts: dict[str, list[_Part]] = {}
    for name, held in after.quantized.items():
        if held.codes not in after.weights or name in after.weights:
            continue
        origins = (Origin(name, None, lambda value: value),) if name in before.weights else held.origins
        for origin in origins:
            if origin.name in before.weights:
                parts.setdefault(origin.name, []).append((held, origin))
    return parts


def _loader(weight: LazyWeight, parts: Sequence[_Part], values: _Values) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        if parts[0][1].index is None:
            held, origin = parts[0]
            return origin.take(values.of(held, weight)).contiguous()
        made = weight.load().clone()  # matrices that no part covers keep their floats
        for held, origin in parts:
            made[origin.index] = origin.take(values.of(held, weight))
        return made

    return load


class _Values:
    """Dequantized weights of a program. The last one is kept, since the parts of a stack are read one after another."""

    def __init__(self, before: Program, after: Program) -> None:
        self._weights, self._scaled = after.weights, {n for n, w in before.weights.items() if w.stored is not None}
        self._last: tuple[str, torch.dtype, torch.Tensor] | None = None

    def of(self, held: QuantizedWeight, like: LazyWeight) -> torch.Tensor:
        if self._last is not None and self._last[:2] == (held.name, like.dtype):
            return self._last[2]
        value = held.dequantize(self._weights, like.dtype)
        # a calibrated weight: its float value is scaled as its codes are
        if held.unscaled is not None and held.name not in self._scaled:
            value = held.unscaled(value)
        self._last = (held.name, like.dtype, value)
        return value


def unrounded_operators() -> dict[Any, Override]:
    """The quantized operators with the same codes, in fp32 arithmetic: no rounding of activations or of the cache."""
    caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def float_caches(start_pos: torch.Tensor, *coded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The float caches in the place of two of codes."""
        place = id(coded[0])
        if int(start_pos) == 0 or place not in caches:
            first, second = (torch.zeros(cache.shape, dtype=torch.float32) for cache in coded)
            caches[place] = (first, second)
        return caches[place]

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = ops.CachedAttention[torch.Tensor](*args, **kwargs)
        if not call.coded:
            return call.eager()
        keys, values = float_caches(call.start_pos, call.k_cache, call.v_cache)
        return replace(call, k_cache=keys, v_cache=values, k_scale=None, v_scale=None).eager()

    def latent(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = ops.LatentAttention[torch.Tensor](*args, **kwargs)
        if not call.coded:
            return call.eager()
        latents, rope = float_caches(call.start_pos, call.latent_cache, call.rope_cache)
        return replace(call, latent_cache=latents, rope_cache=rope, latent_scale=None, rope_scale=None).eager()

    return {ops.cached_attention: attention, ops.latent_attention: latent, **float_products()}


def attention_of(target: Target) -> dict[Any, Override]:
    """Attention as `target` computes it; empty where that is what the operator says."""
    if not target.integer_attention:
        return {}
    return {form.op: _IntegerAttention(form) for form in (ops.CachedAttention, ops.LatentAttention)}


class _IntegerAttention:
    def __init__(self, form: type[ops.CachedAttention[Any]] | type[ops.LatentAttention[Any]]) -> None:
        self._form = form

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._form(*args, **kwargs).in_integers()


def float_products() -> dict[Any, Override]:
    """The quantized products with the same codes, in fp32 arithmetic: activations are not rounded, the cache is."""
    return {form.op: _FloatProduct(form) for form in (ops.FusedMoeQ, ops.LinearQ, ops.HeadLinear)}


class _FloatProduct:
    def __init__(self, form: type[ops.FusedMoeQ[Any]] | type[ops.LinearQ[Any]] | type[ops.HeadLinear[Any]]) -> None:
        self._form = form

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return replace(self._form(*args, **kwargs), int8_activations=False, activation_block=0)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.call(*args, **kwargs).eager()


def routed_as(selections: Sequence[np.ndarray], overrides: Mapping[Any, Override]) -> dict[Any, Override]:
    """`overrides` with the experts of every token given: `selections` are int [T, K] of each fused node, in the order
    they run. Successive calls take successive tokens. The weights of the selected experts are the node's own."""
    given = [torch.from_numpy(np.asarray(indices_TK, dtype=np.int64)) for indices_TK in selections]
    taken = [0] * len(given)
    calls = 0

    def routed(form: type[ops.FusedMoe[Any]] | type[ops.FusedMoeQ[Any]]) -> Override:
        plain = overrides.get(form.op)

        def moe(*args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal calls
            layer, calls = calls % len(given), calls + 1
            call = plain.call(*args, **kwargs) if isinstance(plain, _FloatProduct) else form(*args, **kwargs)
            start, taken[layer] = taken[layer], taken[layer] + len(call.x)
            indices_TK = given[layer][start : taken[layer]]
            _, scores_TE = call.scores(call.router_input)
            return call.output(call.x, indices_TK, combine_weights(scores_TE, indices_TK, call.selection))

        return moe

    return {**overrides, **{form.op: routed(form) for form in (ops.FusedMoe, ops.FusedMoeQ)}}


def perturbed_operators(relative: float = NOISE, seed: int = 0) -> dict[Any, Override]:
    """Norms with noise in the last places: how far a rounding program drifts from itself. See `reference.py`."""
    noise = torch.Generator().manual_seed(seed)

    def norm(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = ops.RmsNorm[torch.Tensor](*args, **kwargs).eager()
        return y * (1 + relative * torch.randn(y.shape, generator=noise))

    def plain(
        x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
    ) -> torch.Tensor:
        y = torch.ops.aten.rms_norm.default(x, shape, weight, eps)
        return y * (1 + relative * torch.randn(y.shape, generator=noise))

    return {ops.rms_norm: norm, torch.ops.aten.rms_norm.default: plain}
