"""A decoder as a Program. The graph comes from shapes alone; weights stay lazy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from moec.compiler.export import MAX_TOKENS, assemble, export_module, unreadable, zeros
from moec.compiler.program import ModelInfo, Program, fake_mode_of
from moec.compiler.source import Weights
from moec.sources.decoder.buffers import cache_names, constant_tensors, roles
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.decoder import Decoder
from moec.sources.decoder.layout import moe_layers, weight_layout


def export_decoder(
    config: DecoderConfig, name: str, weights: Weights | None, *, max_tokens: int = MAX_TOKENS
) -> Program:
    """The Program of a decoder at stage EXPORTED; without `weights`, shapes only. CheckpointError for a missing one."""
    exported = _exported(config, min(max_tokens, config.context))
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


def _exported(config: DecoderConfig, max_tokens: int) -> ExportedProgram:
    """The traced graph, kept for the next use: one command may compile, simulate and verify the same model.

    Programs are not changed in place. What their values share is the shape environment: a graph whose environment has
    learned anything since is traced anew, so that a result never depends on what was compiled before.
    """
    exported, learned = _traced(config, max_tokens)
    if learned == _learned(exported):
        return exported
    _traced.cache_clear()
    return _traced(config, max_tokens)[0]


@lru_cache(maxsize=4)
def _traced(config: DecoderConfig, max_tokens: int) -> tuple[ExportedProgram, tuple[Any, ...]]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = Decoder(config)
    exported = export_module(module, context=config.context, max_tokens=max_tokens)
    return exported, _learned(exported)


def _learned(exported: ExportedProgram) -> tuple[Any, ...]:
    """What the shape environment of a graph knows: guards, equal symbols, ranges."""
    env = fake_mode_of(exported.graph_module.graph).shape_env
    if env is None:  # one token a call: nothing is dynamic
        return ()
    return len(env.guards), dict(env.replacements), dict(env.var_to_range), set(env.divisible)
