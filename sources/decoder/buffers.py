"""The buffers of a decoder's graph, KV caches and rotary tables; and the role of every parameter and buffer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moec.compiler.program import LazyWeight, Role
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import weight_layout
from moec.sources.decoder.rope import rope_tables


def cache_names(config: DecoderConfig) -> list[str]:
    """The KV cache buffers, float32 [1, context, kv_heads, head_dim] each."""
    return [f"model.layers.{n}.self_attn.{part}" for n in range(config.layers) for part in ("k_cache", "v_cache")]


def constant_tensors(config: DecoderConfig) -> dict[str, LazyWeight]:
    """Tables that no checkpoint holds: `model.rope_cos` and `model.rope_sin`, float32 [context, head_dim / 2]."""

    def table(index: int) -> Callable[[], torch.Tensor]:
        return lambda: rope_tables(config.rope, config.context, config.head_dim)[index]

    shape = (config.context, config.head_dim // 2)
    names = ("model.rope_cos", "model.rope_sin")
    return {name: LazyWeight(shape, torch.float32, table(i)) for i, name in enumerate(names)}


def roles(config: DecoderConfig) -> dict[str, Role]:
    """The role of every parameter and buffer of `Decoder`."""
    return {
        **{name: info.role for name, info in weight_layout(config).items()},
        **dict.fromkeys(cache_names(config), Role.CACHE),
        **dict.fromkeys(constant_tensors(config), Role.CONSTANT),
    }
