"""Quantize weights by role: codes and scales instead of floats, the router and the norms untouched.

    linear(x, W)            ->  moec::linear_q(x, q, s)              W ~ s * q, Eq. 6 of MobileMoE
    embedding(ids, W)       ->  moec::embedding_q(ids, q, s)         a tied table is quantized once and read by both
    fused_moe(x, ..., W)    ->  moec::fused_moe_q(x, ..., q, s)
    cached_attention(..)    ->  the same with scales                 for kv_cache: int8

Codes that a checkpoint stores are carried bit for bit; others are computed by the spec's method when a target reads
them (`quantizer.codes_of`). Each weight that becomes codes is a `QuantizedWeight` of the Program. A weight that the
spec quantizes and that no rule here handles is an error that names it: nothing is left in float silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.matching.read import arg, aten, is_op
from moec.compiler.ops import (
    CachedAttention,
    EmbeddingQ,
    FusedMoe,
    FusedMoeQ,
    LinearQ,
    cached_attention,
    embedding_q,
    fused_moe,
    fused_moe_q,
    linear_q,
)
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Role, Stage, module_path
from moec.compiler.quant import QuantizedTensor
from moec.compiler.quantizer import check_stored, check_width, codes_of, format_of, last_axis
from moec.compiler.spec.quantization import Quantization, WeightScheme
from moec.compiler.states import Codes
from moec.compiler.weights import CodeFormat, LazyWeight, Orientation, Provenance, QuantizedWeight

_ROLES = ("embedding", "head", "experts", "shared", "attention", "ffn")  # the overrides of a spec
QUANTIZED = {linear_q, embedding_q, fused_moe_q}  # what else they read in float has no integer form: router, biases


def quantize_weights(quantization: Quantization) -> Pass:
    return Pass("quantize_weights", lambda p: _run(p, quantization), needs=Stage.FUSED, gives=Stage.QUANTIZED)


def _run(program: Program, quantization: Quantization) -> PassResult:
    edit = program.edit()
    changed = 0
    int8 = quantization.int8_activations
    for node in [n for n in edit.graph.nodes if n.op == "call_function"]:
        if is_op(node, aten.linear.default):
            new = _linear(edit, node, quantization, int8)
        elif is_op(node, aten.embedding.default):
            new = _embedding(edit, node, quantization)
        elif node.target is fused_moe:
            new = _moe(edit, node, quantization, int8)
        elif node.target is cached_attention and quantization.cache_codes is not None:
            new = _cache(edit, node, quantization.cache_codes)
        else:
            continue
        if new is None:
            continue
        node.replace_all_uses_with(new)
        edit.graph.erase_node(node)
        changed += 1
    _check_patterns(program, quantization)
    done = edit.done(stage=Stage.QUANTIZED)
    _check_complete(done, quantization)
    return PassResult(done, changed)


def _check_patterns(program: Program, quantization: Quantization) -> None:
    """CompileError for a pattern of `tensors` that names no weight that can be quantized: it must be a typing error."""
    if not quantization.tensors:
        return
    everything = quantization.model_copy(update={"tensors": {}, **dict.fromkeys(_ROLES), "weights": "int8"})
    names = sorted({r.name for r in reads(program, everything)})
    for pattern in quantization.tensors:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CompileError(
                f"quantization.tensors: no weight that can be quantized is called {pattern!r}",
                remedy=f"names are such as {', '.join(names[:3])}",
            )


def _check_complete(program: Program, quantization: Quantization) -> None:
    """No matrix that the spec quantizes is read in float, and every matrix that is read has a known role."""
    for node in program.graph.nodes:
        name = program.weight_of(node) if node.op == "placeholder" else None
        if name is None:
            continue
        weight, role = program.weights[name], program.roles[name]
        reader = next((u for u in node.users if u.op == "call_function" and u.target not in QUANTIZED), None)
        if reader is None or len(weight.shape) < 2 or not weight.dtype.is_floating_point:
            continue
        if quantization.scheme(role, name) is not None:
            raise CompileError(
                f"the {role.value} weight {name} would stay in float: {reader.name} ({reader.target}) has no quantized "
                "form",
                place=module_path(reader) or None,
                remedy="set this role to fp32 in the spec's quantization",
            )
        if role is Role.OTHER and is_op(reader, aten.linear.default, aten.embedding.default):
            raise CompileError(
                f"the weight {name} would stay in float: its role is not known",
                place=module_path(reader) or None,
                remedy="give it a role where the model is exported",
            )


def _scheme(edit: Editor, name: str | None, quantization: Quantization) -> WeightScheme | None:
    return None if name is None else quantization.scheme(edit.roles[name], name)


@dataclass(frozen=True)
class Read:
    """A weight that the pass quantizes, where it is read: the node, and the name of its operand there."""

    node: Node
    operand: str
    name: str
    scheme: WeightScheme
    orientation: Orientation


def reads(program: Program, quantization: Quantization) -> list[Read]:
    """Every read of a weight that the pass turns into codes, in the order of the graph."""
    found: list[Read] = []

    def add(node: Node, operand: str, weight: Any, scheme: WeightScheme | None, orientation: Orientation) -> None:
        name = program.weight_of(weight) if isinstance(weight, Node) else None
        if name is not None and scheme is not None:
            found.append(Read(node, operand, name, scheme, orientation))

    for node in program.graph.nodes:
        if is_op(node, aten.linear.default, aten.embedding.default):
            weight = node.args[0 if is_op(node, aten.embedding.default) else 1]
            name = program.weight_of(weight)
            scheme = None if name is None else quantization.scheme(program.roles[name], name)
            add(node, "weight", weight, scheme, "out_in")
        elif node.target is fused_moe:
            call: FusedMoe[Node] = FusedMoe.of(node)
            scheme = quantization.scheme(Role.EXPERT, program.weight_of(call.w13))
            layout: Orientation = "in_out" if call.mlp.layout == "in_out" else "out_in"
            add(node, "w13", call.w13, scheme, layout)
            add(node, "w2", call.w2, scheme, layout)
            of_shared = None if scheme is None else replace(scheme, axis="in")
            add(node, "shared_w13", call.shared_w13, of_shared, "out_in")
            add(node, "shared_w2", call.shared_w2, of_shared, "out_in")
    return found


def _linear(edit: Editor, node: Node, quantization: Quantization, int8: bool) -> Node | None:
    weight: Node = node.args[1]
    scheme = _scheme(edit, edit.weight_of(weight), quantization)
    if scheme is None:
        return None
    held = quantized(edit, weight, scheme, "out_in", quantization.method)
    codes, scales = operands(edit, held)
    name = edit.weight_of(weight)
    assert name is not None
    call = LinearQ(
        x=node.args[0],
        codes=codes,
        scales=scales,
        bias=arg(node, 2, "bias"),
        bits=scheme.bits,
        group_size=scheme.group_size,
        int8_activations=int8,
        activation_block=quantization.activation_block(edit.roles[name], name),
        levels=scheme.levels,
    )
    with edit.graph.inserting_before(node):
        return edit.emit(call, like=node)


def _embedding(edit: Editor, node: Node, quantization: Quantization) -> Node | None:
    weight: Node = node.args[0]
    scheme = _scheme(edit, edit.weight_of(weight), quantization)
    if scheme is None:
        return None
    codes, scales = operands(edit, quantized(edit, weight, scheme, "out_in", quantization.method))
    call = EmbeddingQ(
        ids=node.args[1],
        codes=codes,
        scales=scales,
        bits=scheme.bits,
        group_size=scheme.group_size,
        levels=scheme.levels,
    )
    with edit.graph.inserting_before(node):
        return edit.emit(call, like=node)


def _moe(edit: Editor, node: Node, quantization: Quantization, int8: bool) -> Node | None:
    moe = FusedMoe[Node].of(node)
    scheme = quantization.scheme(Role.EXPERT, edit.weight_of(moe.w13))
    others = [quantization.scheme(Role.EXPERT, edit.weight_of(moe.w2))]
    for weight in (moe.shared_w13, moe.shared_w2):
        if weight is not None:
            others.append(quantization.scheme(Role.SHARED, edit.weight_of(weight)))
    if any(_storage(scheme) != _storage(other) for other in others):
        raise CompileError(
            "routed and shared experts are one operator and must be stored alike (same type and group size)",
            place=module_path(node) or node.name,
            remedy="give `experts` and `shared` of the spec's quantization the same value"
            + (", and the layer's experts the same in `tensors`" if quantization.tensors else ""),
        )
    if scheme is None:
        return None
    layout: Orientation = "in_out" if moe.mlp.layout == "in_out" else "out_in"
    method = quantization.method
    w13, w2 = (quantized(edit, weight, scheme, layout, method) for weight in (moe.w13, moe.w2))
    w13_codes, w13_scales = operands(edit, w13)
    w2_codes, w2_scales = operands(edit, w2)
    up: tuple[Node | None, Node | None] = (None, None)
    down: tuple[Node | None, Node | None] = (None, None)
    if moe.shared_w13 is not None and moe.shared_w2 is not None:
        in_groups = replace(scheme, axis="in")
        of_shared = [quantized(edit, w, in_groups, "out_in", method) for w in (moe.shared_w13, moe.shared_w2)]
        up, down = (operands(edit, held) for held in of_shared)
    call = FusedMoeQ(
        x=moe.x,
        router_input=moe.router_input,
        router_weight=moe.router_weight,
        router_bias=moe.router_bias,
        selection_bias=moe.selection_bias,
        w13_codes=w13_codes,
        w13_scales=w13_scales,
        b13=moe.b13,
        w2_codes=w2_codes,
        w2_scales=w2_scales,
        b2=moe.b2,
        shared_w13_codes=up[0],
        shared_w13_scales=up[1],
        shared_w2_codes=down[0],
        shared_w2_scales=down[1],
        shared_gate=moe.shared_gate,
        top_k=moe.top_k,
        routing=moe.routing,
        experts=str(replace(moe.mlp, layout=w13.orientation)),
        bits=scheme.bits,
        group_size=scheme.group_size,
        int8_activations=int8,
        activation_block=quantization.activation_block(Role.EXPERT, w13.name),
        levels=scheme.levels,
    )
    with edit.graph.inserting_before(node):
        return edit.emit(call, like=node)


def _storage(scheme: WeightScheme | None) -> CodeFormat | None:
    return None if scheme is None else format_of(scheme)


def quantized(
    edit: Editor, weight: Node, scheme: WeightScheme, orientation: Orientation, method: str
) -> QuantizedWeight:
    """The lazily quantized weight, made once per float weight: placeholders for its tensors and its entry."""
    name = edit.weight_of(weight)
    if name is None:
        raise CompileError(f"the weight {weight.name} is computed, it cannot be quantized", place=module_path(weight))
    if name in edit.quantized:
        return edit.quantized[name]
    source = edit.weights[name]
    if source.stored is not None:
        check_stored(source.stored, scheme, orientation, name)
    check_width(source.shape, scheme, orientation, name)
    transposed = last_axis(orientation) != scheme.axis
    codes_name, scales_name = quantized_names(name)
    held = QuantizedWeight(
        name=name,
        shape=source.shape,
        role=edit.roles[name].value,
        codes=codes_name,
        scales=scales_name,
        format=format_of(scheme),
        group_axis=scheme.axis,
        orientation=orientation if not transposed else "in_out" if orientation == "out_in" else "out_in",
        transposed=transposed,
        provenance=Provenance("computed", method) if source.stored is None else source.stored.provenance,
        unscaled=None if source.stored is None else source.stored.unscaled,
        origins=source.origins,
    )
    *lead, a, b = source.shape
    rows, width = (b, a) if transposed else (a, b)
    pair = _Pair(lambda: codes_of(source, scheme, orientation=orientation, name=name, method=method))
    role = edit.roles[name]
    per = 2 if scheme.bits == 4 else 1
    codes_type = torch.uint8 if scheme.bits == 4 else torch.int8
    edit.add_weight(codes_name, LazyWeight((*lead, rows, width // per), codes_type, pair.codes), role)
    shape = (*lead, rows, width // scheme.group_size)
    edit.add_weight(scales_name, LazyWeight(shape, torch.float16, pair.scales), role)
    edit.quantized[name] = held
    return held


def operands(edit: Editor, held: QuantizedWeight) -> tuple[Node, Node]:
    """The placeholders of codes and scales."""
    codes, scales = edit.placeholder_of(held.codes), edit.placeholder_of(held.scales)
    assert codes is not None
    assert scales is not None
    return codes, scales


def quantized_names(name: str) -> tuple[str, str]:
    """Names for the new tensors, as released checkpoints have them: `a.weight` -> `a.qweight`, `a.weight_scale`;
    `x.down_proj` -> `x.down_qweight`, `x.down_scale`."""
    if name.endswith(".weight"):
        stem = name.removesuffix("weight")
        return f"{stem}qweight", f"{stem}weight_scale"
    stem = name.removesuffix("_proj")
    return f"{stem}_qweight", f"{stem}_scale"


class _Pair:
    """Codes and scales of one quantization, computed once for the two reads that follow each other."""

    def __init__(self, compute: Callable[[], QuantizedTensor]) -> None:
        self._compute = compute
        self._waiting: dict[str, Tensor] = {}

    def _take(self, part: str) -> Tensor:
        if part not in self._waiting:
            result = self._compute()
            self._waiting = {"codes": result.codes, "scales": result.scales}
        return self._waiting.pop(part)

    def codes(self) -> Tensor:
        return self._take("codes")

    def scales(self) -> Tensor:
        return self._take("scales")


def _cache(edit: Editor, node: Node, codes: Codes) -> Node:
    attention = CachedAttention[Node].of(node)
    scales = []
    for cache in (attention.k_cache, attention.v_cache):
        state = edit.states[str(edit.weight_of(cache))]
        scales.append(edit.hold(replace(state, codes=codes))[1])
    with edit.graph.inserting_before(node):
        return edit.emit(replace(attention, k_scale=scales[0], v_scale=scales[1]), like=node)
