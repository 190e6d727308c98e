"""A decoder as a Program. The graph comes from shapes alone; weights stay lazy."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensorMode

from moec.compiler.export import MAX_TOKENS, assemble, export_module, unreadable, zeros
from moec.compiler.program import ModelInfo, Program
from moec.compiler.source import Weights
from moec.sources.decoder.buffers import cache_names, constant_tensors, roles
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.decoder import Decoder
from moec.sources.decoder.layout import moe_layers, weight_layout


def export_decoder(
    config: DecoderConfig, name: str, weights: Weights | None, *, max_tokens: int = MAX_TOKENS
) -> Program:
    """The Program of a decoder at stage EXPORTED; without `weights`, shapes only. CheckpointError for a missing one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = Decoder(config)
    exported = export_module(module, context=config.context, max_tokens=max_tokens)
    info = ModelInfo(
        name=name,
        vocab_size=config.vocab_size,
        context=config.context,
        max_tokens=min(max_tokens, config.context),
        bos_id=config.bos_id,
        eos_ids=config.eos_ids,
        moe_layers=moe_layers(config),
    )
    trained = {
        n: unreadable(n, info.shape) if weights is None else weights.weight(n, info.shape)
        for n, info in weight_layout(config).items()
    }
    caches = {n: zeros(tuple(exported.state_dict[n].shape)) for n in cache_names(config)}
    return assemble(exported, {**trained, **constant_tensors(config), **caches}, roles(config), info)
