"""The account of a decoder for plans: its matrices and caches by size, without building it and without torch."""

from __future__ import annotations

from collections.abc import Iterator

from moec.compiler.architecture import Architecture, Cache, Experts, Weight
from moec.compiler.spec.model import DecoderConfig


def architecture_of(config: DecoderConfig, name: str) -> Architecture:
    """The account of one of our decoders; the same shapes as `model/layout.py` (a test compares them)."""
    width, layers, d = config.d_model, config.layers, config.head_dim
    moe = config.moe
    return Architecture(
        name=name,
        layers=layers,
        d_model=width,
        heads=config.heads,
        vocab_size=config.vocab_size,
        context=config.context,
        tied=config.tied_embeddings,
        weights=tuple(_decoder_weights(config)),
        caches=tuple(Cache(config.kv_heads, d, d, config.window(n)) for n in range(layers)),
        experts=None if moe is None else Experts(layers, moe.experts, moe.top_k, moe.expert_width, moe.shared_width),
        ffn_width=config.ffn_width or 0,
        qk_norm=config.qk_norm,
    )


def _decoder_weights(config: DecoderConfig) -> Iterator[Weight]:
    width, layers, d = config.d_model, config.layers, config.head_dim
    yield Weight("embedding", "token table", 1, config.vocab_size, width, used=0)
    yield Weight("attention", "q, k, v", layers, (config.heads + 2 * config.kv_heads) * d, width)
    yield Weight("attention", "output", layers, width, config.heads * d)
    yield from _feed_forward(config)
    yield Weight("norm", "norms", 2 * layers + 1, width, 1)
    if not config.tied_embeddings:
        yield Weight("head", "head", 1, config.vocab_size, width)


def _feed_forward(config: DecoderConfig) -> Iterator[Weight]:
    width, layers, moe = config.d_model, config.layers, config.moe
    if moe is None:
        assert config.ffn_width is not None
        yield Weight("ffn", "gate, up", layers, 2 * config.ffn_width, width)
        yield Weight("ffn", "down", layers, width, config.ffn_width)
        return
    experts, used = layers * moe.experts, layers * moe.top_k
    yield Weight("router", "router", layers, moe.experts, width)
    if moe.selection_bias:
        yield Weight("router", "selection bias", layers, moe.experts, 1, counted=False)
    yield Weight("expert", "gate, up", experts, 2 * moe.expert_width, width, used)
    yield Weight("expert", "down", experts, width, moe.expert_width, used)
    if moe.shared_width:
        yield Weight("shared", "gate, up", layers, 2 * moe.shared_width, width)
        yield Weight("shared", "down", layers, width, moe.shared_width)
