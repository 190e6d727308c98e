"""The weights of a decoder: names (those of the released checkpoints), shapes and roles, without building a module.

`weight_layout` is the only place that lists them. Parameter counts, plans, checks of group sizes, checkpoint reading,
synthesizing and training follow from it; tests compare `Decoder` and `TrainingDecoder` with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moec.compiler.roles import Role
from moec.compiler.spec.quantization import Quantization
from moec.compiler.spec.strict import Fault
from moec.sources.decoder.config import DecoderConfig


@dataclass(frozen=True)
class WeightInfo:
    """One trained weight: its logical shape and role. A linear is [out, in]; experts are [E, in, out].

    part: what it is in every layer alike, for people; equal parts of a layer are one matrix in a plan. keys: for each
    dimension, the key of `model:` that decides its size.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    part: str
    keys: tuple[str, ...]

    @property
    def layer(self) -> int | None:
        """The decoder layer it belongs to, None for the embedding, the last norm and the head."""
        parts = self.name.split(".")
        return int(parts[2]) if parts[1] == "layers" else None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def counted(self) -> bool:
        """Whether it is a parameter: the selection bias is a balancing state, which published counts leave out."""
        return not (self.role is Role.ROUTER and len(self.shape) == 1)


def weight_layout(config: DecoderConfig) -> dict[str, WeightInfo]:
    """Every trained weight by name, in the order the model uses them. A tied head is not listed twice."""
    d_model, vocabulary = config.d_model, config.vocab_size
    query_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    table = ((vocabulary, d_model), ("vocab_size", "d_model"))
    infos: list[WeightInfo] = [
        WeightInfo("model.embed_tokens.weight", table[0], Role.EMBEDDING, "the embedding", table[1])
    ]
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        projected = {"q": query_width, "k": kv_width, "v": kv_width}
        infos += [
            _norm(f"{prefix}.input_layernorm.weight", d_model),
            *(
                WeightInfo(
                    f"{prefix}.self_attn.{part}_proj.weight",
                    (width, d_model),
                    Role.ATTENTION,
                    "q, k, v",
                    ("head_dim", "d_model"),
                )
                for part, width in projected.items()
            ),
            WeightInfo(
                f"{prefix}.self_attn.o_proj.weight",
                (d_model, query_width),
                Role.ATTENTION,
                "attention output",
                ("d_model", "head_dim"),
            ),
            _norm(f"{prefix}.post_attention_layernorm.weight", d_model),
            *_feed_forward(config, f"{prefix}.feed_forward"),
        ]
    infos.append(_norm("model.norm.weight", d_model))
    if not config.tied_embeddings:
        infos.append(WeightInfo("lm_head.weight", table[0], Role.HEAD, "the head", table[1]))
    return {info.name: info for info in infos}


def router_names(config: DecoderConfig) -> list[str]:
    """The weights that decide which experts a token selects: router matrices and selection biases."""
    return [name for name, info in weight_layout(config).items() if info.role is Role.ROUTER]


def _norm(name: str, width: int) -> WeightInfo:
    return WeightInfo(name, (width,), Role.NORM, "norms", ("d_model",))


def _feed_forward(config: DecoderConfig, prefix: str) -> list[WeightInfo]:
    d_model, moe = config.d_model, config.moe
    if moe is None:
        assert config.ffn_width is not None
        return _gated(prefix, d_model, config.ffn_width, Role.FFN, "the feed-forward block", "ffn_width")
    infos = [
        WeightInfo(f"{prefix}.router.weight", (moe.experts, d_model), Role.ROUTER, "router", ("moe.experts", "d_model"))
    ]
    if moe.selection_bias:
        infos.append(
            WeightInfo(f"{prefix}.expert_bias", (moe.experts,), Role.ROUTER, "selection bias", ("moe.experts",))
        )
    experts, width = moe.experts, moe.expert_width
    infos += [
        WeightInfo(
            f"{prefix}.experts.gate_up_proj",
            (experts, d_model, 2 * width),
            Role.EXPERT,
            "gate and up of the experts",
            ("moe.experts", "d_model", "moe.expert_width"),
        ),
        WeightInfo(
            f"{prefix}.experts.down_proj",
            (experts, width, d_model),
            Role.EXPERT,
            "down of the experts",
            ("moe.experts", "moe.expert_width", "d_model"),
        ),
    ]
    if moe.shared_width:
        infos += _gated(
            f"{prefix}.shared_expert", d_model, moe.shared_width, Role.SHARED, "the shared expert", "moe.shared_width"
        )
    return infos


def _gated(prefix: str, d_model: int, width: int, role: Role, of: str, key: str) -> list[WeightInfo]:
    up, down = f"gate and up of {of}", f"down of {of}"
    return [
        WeightInfo(f"{prefix}.gate_proj.weight", (width, d_model), role, up, (key, "d_model")),
        WeightInfo(f"{prefix}.up_proj.weight", (width, d_model), role, up, (key, "d_model")),
        WeightInfo(f"{prefix}.down_proj.weight", (d_model, width), role, down, ("d_model", key)),
    ]


def parameter_counts(config: DecoderConfig) -> dict[str, int]:
    """`total` and `active` (per token) parameters of a model, a tied embedding counted once.

    The embedding table is active in full, as published counts have it; of the experts the top-k are.
    """
    counted = [info for info in weight_layout(config).values() if info.counted]
    routed = sum(info.numel for info in counted if info.role is Role.EXPERT)
    total = sum(info.numel for info in counted)
    active = 0 if config.moe is None else routed * config.moe.top_k // config.moe.experts
    return {"total": total, "active": total - routed + active}


def group_faults(config: DecoderConfig, quantization: Quantization) -> Iterator[Fault]:
    """Widths along which weights are grouped and that are no multiple of their role's group size; places in `model:`.

    A linear is grouped along its input, experts along `expert_group_axis`.
    """
    seen: set[str] = set()
    for name, info in weight_layout(config).items():
        scheme = quantization.scheme(info.role, name)
        if scheme is None:
            continue
        dimension = len(info.shape) - (2 if info.role is Role.EXPERT and scheme.axis == "in" else 1)
        width, key = info.shape[dimension], info.keys[dimension]
        if width % scheme.group_size and key not in seen:
            seen.add(key)  # one fault for each key; in every layer it would be the same
            what = f"{info.part} is grouped along this width"
            yield Fault(
                tuple(key.split(".")), f"{what}: it must be a multiple of group_size ({scheme.group_size}), got {width}"
            )


def moe_layers(config: DecoderConfig) -> tuple[str, ...]:
    """Module paths of the MoE blocks in execution order; empty for a dense model."""
    return () if config.moe is None else tuple(f"model.layers.{n}.feed_forward" for n in range(config.layers))
