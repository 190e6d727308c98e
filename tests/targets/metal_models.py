"""Small decoders written directly in the operators of the fused and quantized stages, as Programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import moec.compiler.ops as ops
from moec.compiler.export import assemble, export_module
from moec.compiler.ops import Experts
from moec.compiler.pipeline import run_passes
from moec.compiler.program import LazyWeight, ModelInfo, Program, Role, Stage
from moec.compiler.quant import quantize_weight
from moec.targets.metal.options import Options
from moec.targets.metal.target import MetalTarget


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. `window` 0: global attention in every layer, else in every second one."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head: int = 32
    vocab: int = 101
    context: int = 96
    experts: int = 10
    top_k: int = 3
    expert_width: int = 32
    shared_width: int = 64
    window: int = 0
    bits: int = 4  # 0: float weights
    group: int = 32
    layout: str = "in_out"
    int8_cache: bool = False
    routing: str = "score=sigmoid,normalize=sum,scale=2.5"
    experts_text: str = ""
    interleaved: bool = True
    shared_gate: bool = False
    router_bias: bool = False
    biases: bool = False
    scale_dtype: torch.dtype = torch.float16

    @property
    def what(self) -> Experts:
        return Experts.parse(",".join(filter(None, (f"layout={self.layout}", self.experts_text))))


class Weights:
    """Random weights by name; quantized ones as codes and scales."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.random = torch.Generator().manual_seed(seed)
        self.values: dict[str, Tensor] = {}
        self.roles: dict[str, Role] = {}

    def normal(self, *size: int, std: float | None = None) -> Tensor:
        scale = size[-1] ** -0.5 if std is None else std
        return torch.randn(*size, generator=self.random) * scale

    def plain(self, name: str, value: Tensor, role: Role) -> str:
        self.values[name], self.roles[name] = value, role
        return name

    def matrix(self, name: str, value: Tensor, role: Role) -> None:
        if not self.shape.bits:
            self.plain(name, value, role)
            return
        q = quantize_weight(
            value, bits=self.shape.bits, group_size=self.shape.group, scale_dtype=self.shape.scale_dtype
        )
        self.plain(f"{name}_codes", q.codes, role)
        self.plain(f"{name}_scales", q.scales, role)


def make_weights(s: Shape, seed: int = 0) -> Weights:
    w = Weights(s, seed)
    w.matrix("embed", w.normal(s.vocab, s.width), Role.EMBEDDING)
    w.plain("norm", 1 + w.normal(s.width, std=0.1), Role.NORM)
    angles = torch.outer(torch.arange(s.context), 10000.0 ** (-torch.arange(0, s.head, 2) / s.head))
    w.plain("rope_cos", angles.cos(), Role.CONSTANT)
    w.plain("rope_sin", angles.sin(), Role.CONSTANT)
    gated = 2 if s.what.gated else 1
    for i in range(s.layers):
        p = f"layers_{i}_"
        for name, rows, columns in (
            ("q", s.heads * s.head, s.width),
            ("k", s.kv_heads * s.head, s.width),
            ("v", s.kv_heads * s.head, s.width),
            ("o", s.width, s.heads * s.head),
        ):
            w.matrix(p + name, w.normal(rows, columns), Role.ATTENTION)
        w.plain(p + "norm1", 1 + w.normal(s.width, std=0.1), Role.NORM)
        w.plain(p + "norm2", 1 + w.normal(s.width, std=0.1), Role.NORM)
        w.plain(p + "router", w.normal(s.experts, s.width), Role.ROUTER)
        if "sparsemixer" not in s.routing:
            w.plain(p + "bias", w.normal(s.experts, std=0.1), Role.ROUTER)
        if s.router_bias:
            w.plain(p + "router_bias", w.normal(s.experts, std=0.1), Role.ROUTER)
        up, down = w.normal(s.experts, gated * s.expert_width, s.width), w.normal(s.experts, s.width, s.expert_width)
        if s.layout == "in_out":
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        w.matrix(p + "w13", up, Role.EXPERT)
        w.matrix(p + "w2", down, Role.EXPERT)
        if s.biases:
            w.plain(p + "b13", w.normal(s.experts, gated * s.expert_width, std=0.1), Role.EXPERT)
            w.plain(p + "b2", w.normal(s.experts, s.width, std=0.1), Role.EXPERT)
        if s.shared_width:
            w.matrix(p + "s13", w.normal(gated * s.shared_width, s.width), Role.SHARED)
            w.matrix(p + "s2", w.normal(s.width, s.shared_width), Role.SHARED)
            if s.shared_gate:
                w.plain(p + "sgate", w.normal(1, s.width), Role.SHARED)
        for cache in ("k_cache", "v_cache"):
            kind = torch.int8 if s.int8_cache else torch.float32
            w.plain(p + cache, torch.zeros(1, s.context, s.kv_heads, s.head, dtype=kind), Role.CACHE)
            if s.int8_cache:
                w.plain(p + cache + "_scale", torch.zeros(1, s.context, s.kv_heads), Role.CACHE)
    return w


class Model(nn.Module):
    """forward(tokens [1, T], start_pos [1]) -> logits [1, T, V] in `moec::` operators."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.s = weights.shape
        for name, value in weights.values.items():
            if weights.roles[name] is Role.CACHE:
                self.register_buffer(name, value.clone())
            else:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def get(self, name: str) -> Tensor | None:
        return getattr(self, name, None)

    def linear(self, x: Tensor, name: str) -> Tensor:
        if not self.s.bits:
            return nn.functional.linear(x, getattr(self, name))
        codes, scales = getattr(self, name + "_codes"), getattr(self, name + "_scales")
        return ops.linear_q(x, codes, scales, None, self.s.bits, self.s.group, False)

    def attention(self, x: Tensor, p: str, start: Tensor, cos: Tensor, sin: Tensor, window: int) -> Tensor:
        s = self.s
        q = self.linear(x, p + "q").view(1, -1, s.heads, s.head)
        k = self.linear(x, p + "k").view(1, -1, s.kv_heads, s.head)
        v = self.linear(x, p + "v").view(1, -1, s.kv_heads, s.head)
        q = ops.rms_norm(ops.rope(q, cos, sin, s.interleaved), None, 1e-5)
        k = ops.rms_norm(ops.rope(k, cos, sin, s.interleaved), None, 1e-5)
        caches = [getattr(self, p + "k_cache"), getattr(self, p + "v_cache")]
        if s.int8_cache:
            scales = [getattr(self, p + "k_cache_scale"), getattr(self, p + "v_cache_scale")]
            y = ops.cached_attention(q, k, v, *caches, start, s.head**-0.5, window, *scales)
        else:
            y = ops.cached_attention(q, k, v, *caches, start, s.head**-0.5, window)
        return self.linear(y, p + "o")

    def moe(self, x: Tensor, p: str) -> Tensor:
        s, get = self.s, self.get
        flat = x.view(-1, s.width)
        head = (flat, flat, get(p + "router"), get(p + "router_bias"), get(p + "bias"))
        text = (s.top_k, s.routing, str(s.what))
        if not s.bits:
            weights = [get(p + n) for n in ("w13", "b13", "w2", "b2", "s13", "s2", "sgate")]
            return ops.fused_moe(*head, *weights, *text).view(x.shape)
        names = ("w13_codes", "w13_scales", "b13", "w2_codes", "w2_scales", "b2")
        shared = ("s13_codes", "s13_scales", "s2_codes", "s2_scales", "sgate")
        weights = [get(p + n) for n in names + shared]
        return ops.fused_moe_q(*head, *weights, *text, s.bits, s.group, False).view(x.shape)

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        s = self.s
        positions = start_pos + torch.arange(tokens.shape[1])
        cos, sin = self.rope_cos.index_select(0, positions), self.rope_sin.index_select(0, positions)
        if s.bits:
            x = ops.embedding_q(tokens, self.embed_codes, self.embed_scales, s.bits, s.group)
        else:
            x = nn.functional.embedding(tokens, self.embed)
        for i in range(s.layers):
            p = f"layers_{i}_"
            window = s.window if i % 2 == 0 else 0
            x = x + self.attention(ops.rms_norm(x, getattr(self, p + "norm1"), 1e-5), p, start_pos, cos, sin, window)
            x = x + self.moe(ops.rms_norm(x, getattr(self, p + "norm2"), 1e-5), p)
        return self.linear(ops.rms_norm(x, self.norm, 1e-5), "embed")


def program_of(weights: Weights, *, max_tokens: int = 32, name: str = "handmade") -> Program:
    """The Program of the weights' model, as if it had come out of the pipeline."""
    s = weights.shape
    exported = export_module(Model(weights), context=s.context, max_tokens=max_tokens)

    def lazy(value: Tensor) -> LazyWeight:
        load: Callable[[], Tensor] = lambda: value.clone()  # noqa: E731
        return LazyWeight(tuple(value.shape), value.dtype, load)

    info = ModelInfo(
        name=name,
        vocab_size=s.vocab,
        context=s.context,
        max_tokens=max_tokens,
        moe_layers=tuple(f"layers.{i}" for i in range(s.layers)),
    )
    program = assemble(exported, {k: lazy(v) for k, v in weights.values.items()}, weights.roles, info)
    return legal(replace(program, stage=Stage.FUSED))


def legal(program: Program) -> Program:
    """What the Metal target lowers: after its own passes."""
    return run_passes(program, MetalTarget().legalize(Options()))
