"""A one-layer model of CPU operators as a two-method `.pte`, written with ExecuTorch's own emitter, and its eager twin.

T tokens, V vocabulary, D model width, H query heads, KV key/value heads, d head size, S context, F expert width.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn

from moec.compiler.ops import CachedAttention
from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.program import ModelInfo
from moec.compiler.states import key_value_states
from moec.runtime.moe_config import MoeConfig, WeightFormat
from moec.targets.constant_methods import constant_methods
from moec.targets.xnnpack import cpu_ops, packing  # noqa: F401  (cpu_ops registers moec::*)
from moec.targets.xnnpack.lower import LinearPartitioner

V, D, H, KV, HEAD, S, E, TOP_K, F = 97, 64, 6, 2, 32, 256, 8, 2, 32
MAX_TOKENS = 16
EOS_IDS = (2, 3)
_F32 = WeightFormat()


class OneLayer(nn.Module):
    """Embedding, attention (f32 or INT8 cache), a mixture of experts, head. `last`: logits of the last token only."""

    def __init__(self, *, int8_cache: bool = False, window: int = 0, last: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        self.int8_cache, self.window, self.last = int8_cache, window, last
        self.embedding = nn.Parameter(torch.randn(V, D, generator=generator))
        self.norm = nn.Parameter(torch.rand(D, generator=generator) + 0.5)
        self.qkv = nn.Parameter(weight((H + 2 * KV) * HEAD, D))
        self.out = nn.Parameter(weight(D, H * HEAD))
        self.router = nn.Parameter(weight(E, D))
        self.register_buffer("w13", packing.pack(weight(E, 2 * F, D), None, _F32, E, 2 * F, D))
        self.register_buffer("w2", packing.pack(weight(E, D, F), None, _F32, E, D, F))
        self.register_buffer("head", packing.pack(self.embedding.detach(), None, _F32, 1, V, D))
        stored = torch.int8 if int8_cache else torch.float32
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, S, KV, HEAD, dtype=stored))
        for name in ("k_scale", "v_scale") if int8_cache else ():
            self.register_buffer(name, torch.zeros(1, S, KV))
        angle = torch.arange(S)[:, None] * 10000 ** (-torch.arange(0, HEAD, 2) / HEAD)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        config = MoeConfig(
            experts=E, d_model=D, expert_width=F, top_k=TOP_K, how=Routing(), what=Experts(), w13=_F32, w2=_F32
        )
        self.config = config.encode()

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        t = tokens.shape[1]
        positions = start_pos + torch.arange(t)
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        x = torch.ops.moec.embedding_packed(tokens, self.head, V, D, _F32.encode())
        h = torch.ops.moec.rms_norm(x, self.norm, 1e-5)
        qkv = nn.functional.linear(h, self.qkv).view(1, t, H + 2 * KV, HEAD)
        q, k, v = qkv[:, :, :H], qkv[:, :, H : H + KV], qkv[:, :, H + KV :].contiguous()
        q = torch.ops.moec.rope(q.contiguous(), cos, sin, True)
        k = torch.ops.moec.rms_norm(torch.ops.moec.rope(k.contiguous(), cos, sin, False), None, 1e-5)
        scales = [self.k_scale, self.v_scale] if self.int8_cache else []
        attention = q, k, v, self.k_cache, self.v_cache, start_pos, HEAD**-0.5, self.window, *scales
        if torch.compiler.is_compiling():
            y = torch.ops.moec.cached_attention(*attention)
        else:  # as the kernels compute it
            y = CachedAttention[Tensor](*attention).in_integers()
        x = (x + nn.functional.linear(y, self.out)).view(t, D)
        none = [None] * 2
        x = x + torch.ops.moec.fused_moe_packed(
            x, x, self.router, *none, self.w13, None, self.w2, None, None, None, None, *self.config
        )
        if self.last:
            return torch.ops.moec.linear_packed(x[-1:], self.head, None, V, D, _F32.encode())
        return torch.ops.moec.linear_packed(x.view(1, t, D), self.head, None, V, D, _F32.encode())


def write_pte(
    path: Path, *, int8_cache: bool = False, window: int = 0, delegate: bool = False, says_states: bool = True
) -> OneLayer:
    """Write the program with methods forward and forward_all that share a cache; the eager twin of forward_all.

    `delegate`: XNNPACK computes the two plain linears. `says_states` False: a program as it was before it said how its
    states are written.
    """
    path.write_bytes(_lowered_once(V, int8_cache, window, delegate, says_states))
    return OneLayer(int8_cache=int8_cache, window=window)


def lowered(int8_cache: bool = False, window: int = 0, delegate: bool = False, says_states: bool = True) -> bytes:
    """The program of `write_pte`, made anew."""
    models = {"forward": OneLayer(int8_cache=int8_cache, window=window, last=True)}
    models["forward_all"] = OneLayer(int8_cache=int8_cache, window=window)
    states = key_value_states("", KV, HEAD, HEAD, window=window)
    constants = constant_methods(ModelInfo("one-layer", V, S, MAX_TOKENS, 1, EOS_IDS), states)
    if not says_states:
        del constants["get_states_appended"]
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    dynamic = ({1: torch.export.Dim("T", min=1, max=MAX_TOKENS)}, {})
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = {
                name: torch.export.export(model, example, dynamic_shapes=dynamic, strict=False).run_decompositions({})
                for name, model in models.items()
            }
            edge = to_edge_transform_and_lower(
                exported,
                partitioner={name: [LinearPartitioner()] for name in exported} if delegate else None,
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
                constant_methods=constants,
            )
            planning = MemoryPlanningPass(share_mutable_buffers=True)
            config = ExecutorchBackendConfig(memory_planning_pass=planning, emit_mutable_buffer_names=True)
            return bytes(edge.to_executorch(config).buffer)
    finally:
        logging.disable(logging.NOTSET)


# Of every form once a process: lowering takes seconds, and many files of tests run one of a few forms.
@cache
def _lowered_once(vocabulary: int, *form: Any) -> bytes:
    """`vocabulary`: the module's, which a test may set."""
    assert vocabulary == V
    return lowered(*form)
