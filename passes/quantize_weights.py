"""Quantize weights by role: codes and scales instead of floats, the router and the norms untouched.

    linear(x, W)            ->  moec::linear_q(x, q, s)              W ~ s * q, Eq. 6 of MobileMoE
    embedding(ids, W)       ->  moec::embedding_q(ids, q, s)         a tied table is quantized once and read by both
    fused_moe(x, ..., W)    ->  moec::fused_moe_q(x, ..., q, s)
    cached_attention(..)    ->  moec::cached_attention_q8(..)        for kv_cache: int8

Codes that a checkpoint stores are carried bit for bit; others are computed by the spec's method when a target reads
them (`quantizer.codes_of`). Each weight that becomes codes is a `QuantizedWeight` of the Program. A weight that the
spec quantizes and no rule here reaches is an error that names it: nothing is left in float silently.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.matching.read import arg, aten, is_op
from moec.compiler.ops import (
    Experts,
    cached_attention,
    cached_attention_q8,
    embedding_q,
    fused_moe,
    fused_moe_q,
    linear_q,
)
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Role, Stage, module_path
from moec.compiler.quant import QuantizedTensor
from moec.compiler.quantizer import check_stored, check_width, codes_of, last_axis
from moec.compiler.spec.quantization import Quantization, WeightScheme
from moec.compiler.weights import CodeFormat, LazyWeight, Orientation, Provenance, QuantizedWeight

QUANTIZED = {linear_q, embedding_q, fused_moe_q}  # what else they read in float has no integer form: router, biases


def quantize_weights(quantization: Quantization) -> Pass:
    return Pass("quantize_weights", lambda p: _run(p, quantization), needs=Stage.FUSED, gives=Stage.QUANTIZED)


def _run(program: Program, quantization: Quantization) -> PassResult:
    edit = program.edit()
    changed = 0
    int8 = quantization.activations == "int8"
    for node in [n for n in edit.graph.nodes if n.op == "call_function"]:
        if is_op(node, aten.linear.default):
            new = _linear(edit, node, quantization, int8)
        elif is_op(node, aten.embedding.default):
            new = _embedding(edit, node, quantization)
        elif node.target is fused_moe:
            new = _moe(edit, node, quantization, int8)
        elif node.target is cached_attention and quantization.kv_cache == "int8":
            new = _cache(edit, node)
        else:
            continue
        if new is None:
            continue
        node.replace_all_uses_with(new)
        edit.graph.erase_node(node)
        changed += 1
    done = edit.done(stage=Stage.QUANTIZED)
    _check_complete(done, quantization)
    return PassResult(done, changed)


def _check_complete(program: Program, quantization: Quantization) -> None:
    """No matrix that the spec quantizes is read in float, and none is read whose role nobody knows."""
    for node in program.graph.nodes:
        name = program.weight_of(node) if node.op == "placeholder" else None
        if name is None:
            continue
        weight, role = program.weights[name], program.roles[name]
        reader = next((u for u in node.users if u.op == "call_function" and u.target not in QUANTIZED), None)
        if reader is None or len(weight.shape) < 2 or not weight.dtype.is_floating_point:
            continue
        if quantization.scheme(role) is not None:
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
    return None if name is None else quantization.scheme(edit.roles[name])


def _linear(edit: Editor, node: Node, quantization: Quantization, int8: bool) -> Node | None:
    weight: Node = node.args[1]
    scheme = _scheme(edit, edit.weight_of(weight), quantization)
    if scheme is None:
        return None
    held = quantized(edit, weight, scheme, "out_in", quantization.method)
    codes, scales = operands(edit, held)
    with edit.graph.inserting_before(node):
        return edit.call(
            linear_q, node.args[0], codes, scales, arg(node, 2, "bias"), scheme.bits, scheme.group_size, int8, like=node
        )


def _embedding(edit: Editor, node: Node, quantization: Quantization) -> Node | None:
    weight: Node = node.args[0]
    scheme = _scheme(edit, edit.weight_of(weight), quantization)
    if scheme is None:
        return None
    codes, scales = operands(edit, quantized(edit, weight, scheme, "out_in", quantization.method))
    with edit.graph.inserting_before(node):
        return edit.call(embedding_q, node.args[1], codes, scales, scheme.bits, scheme.group_size, like=node)


def _moe(edit: Editor, node: Node, quantization: Quantization, int8: bool) -> Node | None:
    (x, router_input, router, router_bias, bias, w13, b13, w2, b2, shared13, shared2, gate, top_k, routing, text) = (
        node.args
    )
    scheme = quantization.scheme(Role.EXPERT)
    shared = quantization.scheme(Role.SHARED) if shared13 is not None else scheme
    if _storage(scheme) != _storage(shared):
        raise CompileError(
            "routed and shared experts are one operator and must be stored alike (same type and group size)",
            place=module_path(node) or node.name,
            remedy="give `experts` and `shared` of the spec's quantization the same value",
        )
    if scheme is None:
        return None
    experts = Experts.parse(str(text))
    layout: Orientation = "in_out" if experts.layout == "in_out" else "out_in"
    method = quantization.method
    up, down = quantized(edit, w13, scheme, layout, method), quantized(edit, w2, scheme, layout, method)
    codes13, scales13 = operands(edit, up)
    codes2, scales2 = operands(edit, down)
    packed: list[Node | None] = [None] * 4
    if isinstance(shared13, Node) and isinstance(shared2, Node):
        in_groups = WeightScheme(scheme.bits, scheme.group_size, "in")
        of_shared = [quantized(edit, w, in_groups, "out_in", method) for w in (shared13, shared2)]
        packed = [node for held in of_shared for node in operands(edit, held)]
    how = str(Experts(**{**vars(experts), "layout": up.orientation}))
    with edit.graph.inserting_before(node):
        return edit.call(
            fused_moe_q, x, router_input, router, router_bias, bias, codes13, scales13, b13, codes2, scales2, b2,
            *packed, gate, top_k, routing, how, scheme.bits, scheme.group_size, int8, like=node,
        )  # fmt: skip


def _storage(scheme: WeightScheme | None) -> tuple[int, int] | None:
    return None if scheme is None else (scheme.bits, scheme.group_size)


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
        format=CodeFormat(scheme.bits, scheme.group_size),
        group_axis=scheme.axis,
        orientation=orientation if not transposed else "in_out" if orientation == "out_in" else "out_in",
        transposed=transposed,
        provenance=Provenance("computed", method) if source.stored is None else source.stored.provenance,
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


def _cache(edit: Editor, node: Node) -> Node:
    q, k, v, k_cache, v_cache, start_pos, scale, window = node.args
    scales = []
    for cache in (k_cache, v_cache):
        name = str(edit.weight_of(cache))
        shape = edit.weights[name].shape
        edit.retype_weight(name, _zeros(shape, torch.int8))
        scales.append(edit.add_weight(name + "_scale", _zeros(shape[:-1], torch.float32), Role.CACHE, mutable=True))
    with edit.graph.inserting_before(node):
        return edit.call(
            cached_attention_q8, q, k, v, k_cache, v_cache, scales[0], scales[1], start_pos, scale, window, like=node
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyWeight:
    return LazyWeight(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))
