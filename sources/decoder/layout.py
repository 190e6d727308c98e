"""The weights of a decoder: names (those of the released checkpoints), shapes and roles, without building a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moec.compiler.program import LazyWeight, Role
from moec.compiler.spec.model import DecoderConfig
from moec.sources.decoder.rope import rope_tables


@dataclass(frozen=True)
class WeightInfo:
    """One trained weight: its logical shape and role. A linear is [out, in]; experts are [E, in, out]."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def layer(self) -> int | None:
        """The decoder layer it belongs to, None for the embedding, the last norm and the head."""
        parts = self.name.split(".")
        return int(parts[2]) if parts[1] == "layers" else None

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def weight_layout(config: DecoderConfig) -> dict[str, WeightInfo]:
    """Every trained weight by name, in the order the model uses them. A tied head is not listed twice."""
    d_model = config.d_model
    query_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    infos: list[WeightInfo] = [WeightInfo("model.embed_tokens.weight", (config.vocab_size, d_model), Role.EMBEDDING)]
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        infos += [
            WeightInfo(f"{prefix}.input_layernorm.weight", (d_model,), Role.NORM),
            WeightInfo(f"{prefix}.self_attn.q_proj.weight", (query_width, d_model), Role.ATTENTION),
            WeightInfo(f"{prefix}.self_attn.k_proj.weight", (kv_width, d_model), Role.ATTENTION),
            WeightInfo(f"{prefix}.self_attn.v_proj.weight", (kv_width, d_model), Role.ATTENTION),
            WeightInfo(f"{prefix}.self_attn.o_proj.weight", (d_model, query_width), Role.ATTENTION),
            WeightInfo(f"{prefix}.post_attention_layernorm.weight", (d_model,), Role.NORM),
            *_feed_forward(config, f"{prefix}.feed_forward"),
        ]
    infos.append(WeightInfo("model.norm.weight", (d_model,), Role.NORM))
    if not config.tied_embeddings:
        infos.append(WeightInfo("lm_head.weight", (config.vocab_size, d_model), Role.HEAD))
    return {info.name: info for info in infos}


def _feed_forward(config: DecoderConfig, prefix: str) -> list[WeightInfo]:
    d_model, moe = config.d_model, config.moe
    if moe is None:
        assert config.ffn_width is not None
        return _gated(prefix, d_model, config.ffn_width, Role.FFN)
    infos = [WeightInfo(f"{prefix}.router.weight", (moe.experts, d_model), Role.ROUTER)]
    if moe.selection_bias:
        infos.append(WeightInfo(f"{prefix}.expert_bias", (moe.experts,), Role.ROUTER))
    infos += [
        WeightInfo(f"{prefix}.experts.gate_up_proj", (moe.experts, d_model, 2 * moe.expert_width), Role.EXPERT),
        WeightInfo(f"{prefix}.experts.down_proj", (moe.experts, moe.expert_width, d_model), Role.EXPERT),
    ]
    if moe.shared_width:
        infos += _gated(f"{prefix}.shared_expert", d_model, moe.shared_width, Role.SHARED)
    return infos


def _gated(prefix: str, d_model: int, width: int, role: Role) -> list[WeightInfo]:
    return [
        WeightInfo(f"{prefix}.gate_proj.weight", (width, d_model), role),
        WeightInfo(f"{prefix}.up_proj.weight", (width, d_model), role),
        WeightInfo(f"{prefix}.down_proj.weight", (d_model, width), role),
    ]


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


def moe_layers(config: DecoderConfig) -> tuple[str, ...]:
    """Module paths of the MoE blocks in execution order; empty for a dense model."""
    return () if config.moe is None else tuple(f"model.layers.{n}.feed_forward" for n in range(config.layers))
