"""The `Architecture` of a decoder, for plans: the sizes of its matrices and caches, without building it or torch."""

from __future__ import annotations

from collections.abc import Iterator

from moec.compiler.architecture import Architecture, Cache, Experts, Weight
from moec.compiler.roles import Role
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import WeightInfo, weight_layout


def architecture_of(config: DecoderConfig, name: str, *, by_tensor: bool = False) -> Architecture:
    """The account of one of our decoders, its weights those of the table (layout.py).

    by_tensor: each weight is listed by its own name, where layers are not stored alike.
    """
    width, layers, d = config.d_model, config.layers, config.head_dim
    moe = config.moe
    windows = [config.window(n) for n in range(layers)]
    caches = {window: Cache(config.kv_heads, d, d, window) for window in set(windows)}
    return Architecture(
        name=name,
        layers=layers,
        d_model=width,
        heads=config.heads,
        vocab_size=config.vocab_size,
        context=config.context,
        tied=config.tied_embeddings,
        weights=tuple(_by_tensor(config) if by_tensor else _weights(config)),
        caches=tuple(caches[window] for window in windows),
        experts=None if moe is None else Experts(layers, moe.experts, moe.top_k, moe.expert_width, moe.shared_width),
        ffn_width=config.ffn_width or 0,
        qk_norm=config.qk_norm,
    )


def _by_tensor(config: DecoderConfig) -> Iterator[Weight]:
    for name, info in weight_layout(config).items():
        role = info.role.value
        if info.role is Role.EXPERT:
            (experts, width_in, width_out), moe = info.shape, config.moe
            assert moe is not None
            yield Weight(role, name, experts, width_out, width_in, moe.top_k)
        elif len(info.shape) == 1:
            yield Weight(role, name, 1, info.shape[0], 1, counted=info.counted)
        else:
            used = 0 if info.role is Role.EMBEDDING else None
            yield Weight(role, name, 1, info.shape[0], info.shape[1], used)


def _weights(config: DecoderConfig) -> Iterator[Weight]:
    """The table of weights, layers together: equal parts of a layer are rows of one matrix, experts are matrices.

    The layers are alike, so one is listed and counted as often: a search plans ten thousands of shapes.
    """
    parts: dict[tuple[Role, str], list[WeightInfo]] = {}
    for info in weight_layout(config.model_copy(update={"layers": 1})).values():
        parts.setdefault((info.role, info.part), []).append(info)
    for (role, part), infos in parts.items():
        first = infos[0]
        count = sum(1 if info.layer is None else config.layers for info in infos)
        if role is Role.EXPERT:
            (experts, width_in, width_out), moe = first.shape, config.moe
            assert moe is not None
            yield Weight(role.value, part, count * experts, width_out, width_in, count * moe.top_k)
        elif len(first.shape) == 1:
            yield Weight(role.value, part, count, first.shape[0], 1, counted=first.counted)
        else:
            together = [info for info in infos if info.layer == first.layer]
            rows = sum(info.shape[0] for info in together)
            used = 0 if role is Role.EMBEDDING else None
            yield Weight(role.value, part, count // len(together), rows, first.shape[1], used)
