"""Operators of our own in ONNX: linears, embeddings, norms, rotary positions, the fused MoE node.

T tokens, D width, N outputs and K inputs of a linear, V vocabulary, E experts.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch.fx import Node

import moec.compiler.ops as ops
from moec.compiler.matching.read import arg
from moec.compiler.ops.call import shape_of
from moec.compiler.program import module_path
from moec.targets.onnx import moe_ort, moe_standard
from moec.targets.onnx.attention import cached_attention
from moec.targets.onnx.context import Context
from moec.targets.onnx.moe_form import MoeForm, form_of
from moec.targets.onnx.moe_math import dequantized
from moec.targets.onnx.weights import AS_STORED, Change

CODES = {4: TensorProto.INT4, 8: TensorProto.INT8}
# A head is multiplied in pieces of its rows: dequantized whole it would be the largest value of the graph.
PIECE = 1 << 24


def linear(c: Context, n: Node) -> str:
    x, weight, *rest = n.args
    bias = [c.value(v) for v in rest if v is not None]
    k = int(weight.meta["val"].shape[1])
    if c.program.weight_of(weight) is None:
        y = c.b.op("MatMul", c.value(x), c.b.op("Transpose", c.value(weight), perm=[1, 0]))
        return c.b.op("Add", y, *bias, out=n.name) if bias else y
    y = c.b.op("Gemm", c.b.reshape(c.value(x), -1, k), c.value(weight), *bias, transB=1)
    return _with_leading(c, n, y)


def linear_q(c: Context, n: Node) -> str:
    call = ops.LinearQ[Node].of(n)
    rows, k = int(shape_of(call.codes)[0]), int(shape_of(call.x)[-1])
    bits, group = call.bits, call.group_size
    flat = c.b.reshape(c.value(call.x), -1, k)
    added = [] if call.bias is None else [c.value(call.bias)]
    if c.ort:
        factor = c.widened(c.scales(call.scales), c.wide(call.scales))
        codes = _offset_codes(c, call.codes, bits, group)
        y = moe_ort.nbits(c.b, flat, codes, factor, n=rows, k=k, bits=bits, group=group)
        y = c.b.op("Add", y, *added) if added else y
        return _with_leading(c, n, y)
    step = max(1, PIECE // k)
    name, parts = c.weight_name(call.codes), []
    for first in range(0, rows, step):
        count = min(step, rows - first)
        suffix = f".{first}" if rows > step else ""
        w = c.weights.tensor(name, CODES[bits], (count, k), first=first * k, name=name + suffix)
        s = c.scales(call.scales, first=first * k // group, dims=(count, k // group), suffix=suffix)
        parts.append(c.b.op("Gemm", flat, dequantized(c.b, w, s, group, wide=c.wide(call.scales)), transB=1))
    y = parts[0] if len(parts) == 1 else c.b.op("Concat", *parts, axis=1)
    return _with_leading(c, n, c.b.op("Add", y, *added) if added else y)


def _offset_codes(c: Context, codes: Node, bits: int, group: int) -> str:
    """[N, K / group, bytes of a group]: unsigned codes, as MatMulNBits reads them."""
    name = c.weight_name(codes)
    rows, packed = c.program.weights[name].shape
    per = group * bits // 8
    return c.weights.tensor(name, TensorProto.UINT8, (rows, packed // per, per), change=moe_ort.OFFSET)


def _with_leading(c: Context, n: Node, y: str) -> str:
    """[rows, N] with the leading dimensions that the node declares; one of them may be open."""
    dims = [d if isinstance(d, int) else -1 for d in n.meta["val"].shape]
    if len(dims) == 2:
        return y
    return c.b.reshape(y, *dims, out=n.name)


def embedding(c: Context, n: Node) -> str:
    table, ids = n.args[:2]
    return c.b.op("Gather", c.value(table), c.value(ids), out=n.name)


def embedding_q(c: Context, n: Node) -> str:
    """Rows of the table are looked up before they are dequantized. INT4 tensors cannot be indexed: the rows come as
    bytes, from the same place in the file that the output head reads as INT4."""
    call = ops.EmbeddingQ[Node].of(n)
    b, name, index, bits = c.b, c.weight_name(call.codes), c.value(call.ids), call.bits
    dims = [int(d) if isinstance(d, int) else -1 for d in n.meta["val"].shape]
    stored = tuple(c.program.weights[name].shape)

    def byte(value: int) -> str:
        return b.constant(np.array(value, np.uint8))

    if bits == 8 and not c.ort:
        q = b.op("Gather", c.weights.tensor(name, TensorProto.INT8, stored), index)
    else:
        change = moe_ort.OFFSET if c.ort else AS_STORED
        rows = b.op(
            "Gather", c.weights.tensor(name, TensorProto.UINT8, stored, change=change, name=f"{name}.bytes"), index
        )
        if bits == 4:
            low, high = b.op("BitwiseAnd", rows, byte(15)), b.op("BitShift", rows, byte(4), direction="RIGHT")
            rows = b.op("Concat", *(b.op("Unsqueeze", half, b.ints(-1)) for half in (low, high)), axis=-1)
        # two's complement nibbles are lifted by 8, which flips their top bit, to be lowered by 8 like offset ones
        lifted = rows if c.ort else b.op("BitwiseXor", rows, byte(8))
        signed = b.op("Sub", b.op("Cast", lifted, to=TensorProto.INT32), b.constant(np.array(1 << bits - 1, np.int32)))
        q = b.reshape(b.op("Cast", signed, to=TensorProto.INT8), *dims)
    factor = b.op("Gather", c.scales(call.scales), index)
    factor = factor if c.wide(call.scales) else b.op("Cast", factor, to=TensorProto.FLOAT)
    return b.op("DequantizeLinear", q, factor, axis=len(dims) - 1, block_size=call.group_size, out=n.name)


def rms_norm(c: Context, n: Node) -> str:
    call = ops.RmsNorm[Node].of(n)
    return _rms_norm(c, n, call.x, call.weight, float(call.eps))


def aten_rms_norm(c: Context, n: Node) -> str:
    x, weight, eps = n.args[0], arg(n, 2, "weight"), arg(n, 3, "eps")
    return _rms_norm(c, n, x, weight, float(torch.finfo(torch.float32).eps if eps is None else eps))


def _rms_norm(c: Context, n: Node, x: Any, weight: Node | None, eps: float) -> str:
    b, value = c.b, c.value(x)
    mean = b.op("ReduceMean", b.op("Mul", value, value), b.ints(-1), keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, b.float(eps)))
    if weight is None:
        return b.op("Div", value, root, out=n.name)
    return b.op("Mul", b.op("Div", value, root), c.value(weight), out=n.name)


def rope(c: Context, n: Node) -> str:
    call = ops.Rope[Node].of(n)
    b, interleaved = c.b, call.interleaved
    heads, width = (int(d) for d in shape_of(call.x)[2:])
    # [T, d/2] -> [1, T, 1, d/2], and a last dimension for the pair when its elements are neighbours
    axes = (0, 2, 4) if interleaved else (0, 2)

    def angle(table: Node) -> str:
        return c.once(("angle", table, interleaved), lambda: b.op("Unsqueeze", c.value(table), b.ints(*axes)))

    angles = [angle(call.cos), angle(call.sin)]
    x = c.value(call.x)
    value = b.reshape(x, 1, -1, heads, width // 2, 2) if interleaved else x
    first, second = b.split(value, 2)

    def turned(p: str, q: str, kind: str) -> str:
        return b.op(kind, b.op("Mul", p, angles[0]), b.op("Mul", q, angles[1]))

    y = b.op("Concat", turned(first, second, "Sub"), turned(second, first, "Add"), axis=-1)
    return b.reshape(y, 1, -1, heads, width, out=n.name) if interleaved else y


def fused_moe(c: Context, n: Node) -> str:
    """A call of the local function `moec::FusedMoE`, one overload for each form of block in the model."""
    moe = ops.RoutedMoe[Node].of(n)
    form = form_of(moe)
    if c.ort:
        moe_ort.check(form, module_path(n) or n.name)
    wide = isinstance(moe, ops.FusedMoeQ) and c.wide(moe.w13_scales)
    if (form, wide) not in c.functions:
        make = moe_ort.ort_function if c.ort else moe_standard.standard_function
        c.functions[form, wide] = make(form, str(len(c.functions) or ""), wide_scales=wide)
    overload = c.functions[form, wide].overload
    names = (moe_ort if c.ort else moe_standard).input_names(form)
    found = _ort_operands(c, form, moe) if c.ort else _standard_operands(c, form, moe)
    outs = [n.name, f"{n.name}.indices", f"{n.name}.weights"]
    inputs = [found[name] for name in names]
    more = {"overload": overload} if overload else {}
    c.b.ops(moe_standard.FUNCTION, *inputs, outs=outs, domain=moe_standard.DOMAIN, **form.attributes, **more)
    c.taps.append({"x": found["x"], "indices": outs[1], "weights": outs[2], "y": outs[0]})
    return outs[0]


def _common_operands(c: Context, moe: ops.RoutedMoe[Node]) -> dict[str, str]:
    names = ("x", "router_input", "router_weight", "router_bias", "selection_bias", "b2", "shared_gate")
    return {name: c.value(operand) for name in names if (operand := getattr(moe, name)) is not None}


def _standard_operands(c: Context, form: MoeForm, moe: ops.RoutedMoe[Node]) -> dict[str, str]:
    found = _common_operands(c, moe)
    if moe.b13 is not None:
        found["b13"] = c.value(moe.b13)
    shapes = {
        "shared_w13": (form.shared_outer, form.width),
        "shared_w2": (form.width, form.shared_width),
        "w13": form.shape("w13"),
        "w2": form.shape("w2"),
    }
    for name, shape in shapes.items():
        stacked = name in ("w13", "w2")
        if isinstance(moe, ops.FusedMoeQ):
            codes = moe.weight(name)
            if codes is not None:
                found |= _quantized_operand(c, form, name, *codes, shape, form.experts if stacked else 0)
        elif isinstance(moe, ops.FusedMoe) and (weight := moe.weight(name)) is not None:
            whole = c.weight_name(weight) if stacked else ""
            parts = {f"{name}.{e}": c.weights.part(whole, shape, e) for e in range(form.experts if stacked else 0)}
            found |= parts if stacked else {name: c.value(weight)}
    return found


def _quantized_operand(
    c: Context, form: MoeForm, name: str, codes: Node, scales: Node, shape: tuple[int, int], experts: int
) -> dict[str, str]:
    """Codes and scales of a weight of the shared expert (`experts` 0), or those of each routed expert by itself."""
    weight = c.weight_name(codes)
    if not experts:
        whole = c.weights.tensor(weight, CODES[form.bits], shape)
        return {name: whole, f"{name}.scales": c.scales(scales)}
    found, count = {}, prod(shape)
    for e in range(experts):
        first = e * count
        found[f"{name}.{e}"] = c.weights.tensor(weight, CODES[form.bits], shape, first=first, name=f"{weight}.{e}")
        dims = (shape[0], shape[1] // form.group_size)
        found[f"{name}.{e}.scales"] = c.scales(scales, first=first // form.group_size, dims=dims, suffix=f".{e}")
    return found


def _ort_operands(c: Context, form: MoeForm, moe: ops.RoutedMoe[Node]) -> dict[str, str]:
    assert isinstance(moe, ops.FusedMoeQ)  # `moe_ort.check` refused the others
    found, interleaved = _common_operands(c, moe), form.what.interleaved
    plain, turned = (AS_STORED, moe_ort.OFFSET), (moe_ort.ALTERNATING, moe_ort.ALTERNATING_OFFSET)
    if moe.b13 is not None:
        found["b13"] = c.value(moe.b13)
        if not interleaved:
            found["b13"] = c.weights.plain(c.weight_name(moe.b13), change=moe_ort.ALTERNATING_FLOAT32)
    for name in ("shared_w13", "shared_w2"):
        shared = moe.weight(name)
        if shared is not None:
            found[name] = _offset_codes(c, shared[0], form.bits, form.group_size)
            found[f"{name}.scales"] = c.scales(shared[1])
    for name, weight in (("w13", (moe.w13_codes, moe.w13_scales)), ("w2", (moe.w2_codes, moe.w2_scales))):
        changes: tuple[Change, Change] = turned if name == "w13" and not interleaved else plain
        codes = c.weight_name(weight[0])
        found[name] = c.weights.tensor(codes, TensorProto.UINT8, c.program.weights[codes].shape, change=changes[1])
        found[f"{name}.scales"] = c.scales(weight[1], change=changes[0])
    return found


HANDLERS = {
    ops.linear_q: linear_q,
    ops.embedding_q: embedding_q,
    ops.rms_norm: rms_norm,
    ops.rope: rope,
    ops.cached_attention: cached_attention,
    ops.fused_moe: fused_moe,
    ops.fused_moe_q: fused_moe,
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.embedding.default: embedding,
    torch.ops.aten.rms_norm.default: aten_rms_norm,
}
