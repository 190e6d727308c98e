"""ONNX forms of the ATen operators that remain around the fused blocks."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.program import module_path
from moec.targets.onnx.attention import token_count
from moec.targets.onnx.context import Context
from moec.targets.onnx.weights import ELEMENT

aten = torch.ops.aten
LAST = (1 << 63) - 1
Handler = Callable[[Context, Node], str]


def _dtype(n: Node) -> torch.dtype:
    value = n.meta["val"]
    return value.dtype if isinstance(value, torch.Tensor) else torch.int64


def _binary(kind: str) -> Handler:
    def lower(c: Context, n: Node) -> str:
        a, b = n.args[:2]
        # comparisons give bool: their operands have the type of the operand that is a tensor
        kinds = [_dtype(v) for v in (a, b) if isinstance(v, Node)]
        floats = [k for k in kinds if k.is_floating_point]
        dtype = floats[0] if floats else torch.float32 if any(isinstance(v, float) for v in (a, b)) else kinds[0]
        values = []
        for v in (a, b):
            value = c.operand(v, dtype)
            values.append(
                c.b.op("Cast", value, to=ELEMENT[dtype]) if isinstance(v, Node) and _dtype(v) != dtype else value
            )
        if n.kwargs.get("alpha", 1) != 1:
            values[1] = c.b.op("Mul", values[1], c.operand(n.kwargs["alpha"], dtype))
        return c.b.op(kind, *values, out=n.name)

    return lower


def _unary(kind: str, **attributes: Any) -> Handler:
    return lambda c, n: c.b.op(kind, c.value(n.args[0]), out=n.name, **attributes)


def _logical(kind: str) -> Handler:
    return lambda c, n: c.b.op(kind, c.value(n.args[0]), c.value(n.args[1]), out=n.name)


def sym_size(c: Context, n: Node) -> str:
    x, axis = n.args
    if c.values.get(x) == "input_ids" and axis == 1:
        return c.b.op("Squeeze", token_count(c), c.b.ints(0), out=n.name)
    axis = int(axis) % len(x.meta["val"].shape)
    return c.b.op("Squeeze", c.b.dimension(c.value(x), axis), c.b.ints(0), out=n.name)


def reshape(c: Context, n: Node) -> str:
    return c.b.op("Reshape", c.value(n.args[0]), c.shape(n.args[1]), out=n.name)


def by_result(c: Context, n: Node) -> str:
    """flatten, unflatten, squeeze and their kind: what the result's shape says, when one dimension at most is open."""
    dims = [d if isinstance(d, int) else -1 for d in n.meta["val"].shape]
    if dims.count(-1) > 1:
        raise _refused(n, "has several open dimensions")
    return c.b.reshape(c.value(n.args[0]), *dims, out=n.name)


def transpose(c: Context, n: Node) -> str:
    order = list(range(len(n.meta["val"].shape)))
    if n.target is aten.permute.default:
        order = [int(d) % len(order) for d in n.args[1]]
    else:
        a, b = (int(d) % len(order) for d in (n.args[1:] or (0, 1)))
        order[a], order[b] = order[b], order[a]
    return c.b.op("Transpose", c.value(n.args[0]), perm=order, out=n.name)


def unsqueeze(c: Context, n: Node) -> str:
    return c.b.op("Unsqueeze", c.value(n.args[0]), c.b.ints(int(n.args[1])), out=n.name)


def slice_(c: Context, n: Node) -> str:
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    given: list[Any] = [*n.args, *defaults[len(n.args) :]]
    x, dim, start, end, step = given
    bounds = [c.extent([0 if start is None else start]), c.extent([LAST if end is None else end])]
    return c.b.op("Slice", c.value(x), *bounds, c.b.ints(int(dim)), c.b.ints(int(step)), out=n.name)


def select(c: Context, n: Node) -> str:
    x, dim, index = n.args
    return c.b.op("Gather", c.value(x), c.operand(index, torch.int64), axis=int(dim), out=n.name)


def index_select(c: Context, n: Node) -> str:
    x, dim, index = n.args
    return c.b.op("Gather", c.value(x), c.value(index), axis=int(dim), out=n.name)


def cat(c: Context, n: Node) -> str:
    parts, axis = n.args[0], int(n.args[1]) if len(n.args) > 1 else 0
    return c.b.op("Concat", *(c.value(p) for p in parts), axis=axis, out=n.name)


def stack(c: Context, n: Node) -> str:
    axis = int(n.args[1]) if len(n.args) > 1 else 0
    axis %= len(n.meta["val"].shape)
    parts = [c.b.op("Unsqueeze", c.value(p), c.b.ints(axis)) for p in n.args[0]]
    return c.b.op("Concat", *parts, axis=axis, out=n.name)


def expand(c: Context, n: Node) -> str:
    dims = [1 if d == -1 else d for d in n.args[1]]
    return c.b.op("Expand", c.value(n.args[0]), c.extent(dims), out=n.name)


def arange(c: Context, n: Node) -> str:
    first, end, step = {1: (0, *n.args, 1), 2: (*n.args, 1), 3: n.args}[len(n.args)]
    values = (c.operand(v, _dtype(n)) for v in (first, end, step))
    return c.b.op("Range", *values, out=n.name)


def cast(c: Context, n: Node) -> str:
    if _dtype(n) not in ELEMENT:
        raise _refused(n, f"computes in {_dtype(n)}")
    return c.b.op("Cast", c.value(n.args[0]), to=ELEMENT[_dtype(n)], out=n.name)


def silu(c: Context, n: Node) -> str:
    x = c.value(n.args[0])
    return c.b.op("Mul", x, c.b.op("Sigmoid", x), out=n.name)


def gelu(c: Context, n: Node) -> str:
    return c.b.op("Gelu", c.value(n.args[0]), approximate=str(n.kwargs.get("approximate", "none")), out=n.name)


def power(c: Context, n: Node) -> str:
    x, exponent = n.args
    value = c.value(x)
    if exponent == 2:
        return c.b.op("Mul", value, value, out=n.name)
    return c.b.op("Pow", value, c.operand(exponent, _dtype(n)), out=n.name)


def rsqrt(c: Context, n: Node) -> str:
    return c.b.op("Reciprocal", c.b.op("Sqrt", c.value(n.args[0])), out=n.name)


def layer_norm(c: Context, n: Node) -> str:
    x, sizes, weight, bias, eps = (*n.args, None, None, None)[:5]
    scale = c.b.constant(np.ones(tuple(sizes), np.float32)) if weight is None else c.value(weight)  # type: ignore[arg-type]
    operands = [c.value(x), scale, *([] if bias is None else [c.value(bias)])]
    epsilon = 1e-5 if eps is None else float(eps)  # type: ignore[arg-type]
    return c.b.op("LayerNormalization", *operands, axis=-len(sizes), epsilon=epsilon, out=n.name)  # type: ignore[arg-type]


def reduced(kind: str) -> Handler:
    def lower(c: Context, n: Node) -> str:
        dims = n.args[1] if len(n.args) > 1 else None
        axes = [int(d) for d in dims] if isinstance(dims, (list, tuple)) else [int(dims)]
        keep = int(bool(n.args[2])) if len(n.args) > 2 else 0
        return c.b.op(kind, c.value(n.args[0]), c.b.ints(*axes), keepdims=keep, out=n.name)

    return lower


def softmax(c: Context, n: Node) -> str:
    return c.b.op("Softmax", c.value(n.args[0]), axis=int(n.args[1]), out=n.name)


def where(c: Context, n: Node) -> str:
    test, a, b = n.args
    return c.b.op("Where", c.value(test), c.operand(a, _dtype(n)), c.operand(b, _dtype(n)), out=n.name)


def full(c: Context, n: Node) -> str:
    value = n.args[1] if n.target is aten.full.default else 0 if n.target is aten.zeros.default else 1
    shape = c.extent(n.args[0]) if n.args[0] else c.b.constant(np.array([], np.int64))
    return c.b.op("Expand", c.operand(value, _dtype(n)), shape, out=n.name)


def clamp(c: Context, n: Node) -> str:
    low, high = (*n.args[1:], *(n.kwargs.get(k) for k in ("min", "max")))[:2]
    bounds = ["" if v is None else c.operand(v, _dtype(n)) for v in (low, high)]
    return c.b.op("Clip", c.value(n.args[0]), *bounds, out=n.name)


def same(c: Context, n: Node) -> str:
    return c.value(n.args[0])


def getitem(c: Context, n: Node) -> str:
    parts = c.pieces[n.args[0]]
    return parts[int(n.args[1])]


def splits(c: Context, n: Node) -> str:
    """split and chunk: results are read by getitem."""
    x, axis = c.value(n.args[0]), int(n.args[2]) if len(n.args) > 2 else int(n.kwargs.get("dim", 0))
    sizes = [part.shape[axis] for part in n.meta["val"]]
    if not all(isinstance(s, int) for s in sizes):
        raise _refused(n, "splits an open dimension")
    names = [f"{n.name}.{i}" for i in range(len(sizes))]
    c.pieces[n] = c.b.ops("Split", x, c.b.ints(*sizes), outs=names, axis=axis)
    return names[0]


def _refused(n: Node, what: str) -> CompileError:
    return CompileError(f"{n.name} ({n.target}) {what}: it has no ONNX form here", place=module_path(n) or n.name)


HANDLERS: dict[Any, Handler] = {
    aten.sym_size.int: sym_size,
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), reshape),
    **dict.fromkeys(
        (aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
        by_result,
    ),
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default), transpose),
    aten.unsqueeze.default: unsqueeze,
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    aten.index_select.default: index_select,
    aten.cat.default: cat,
    aten.stack.default: stack,
    aten.expand.default: expand,
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), arange),
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device), cast),
    **dict.fromkeys(
        (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.detach_.default,
         aten.lift_fresh_copy.default), same
    ),
    operator.getitem: getitem,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), splits),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, operator.add), _binary("Add")),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar, operator.sub), _binary("Sub")),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, operator.mul), _binary("Mul")),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _binary("Div")),
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _logical("MatMul")),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _binary("LessOrEqual")),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _binary("Less")),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _binary("GreaterOrEqual")),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _binary("Greater")),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _binary("Equal")),
    **dict.fromkeys((aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor), _logical("And")),
    aten.neg.default: _unary("Neg"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.tanh.default: _unary("Tanh"),
    aten.relu.default: _unary("Relu"),
    aten.exp.default: _unary("Exp"),
    aten.cos.default: _unary("Cos"),
    aten.sin.default: _unary("Sin"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.abs.default: _unary("Abs"),
    aten.silu.default: silu,
    aten.gelu.default: gelu,
    aten.rsqrt.default: rsqrt,
    aten.pow.Tensor_Scalar: power,
    aten.layer_norm.default: layer_norm,
    aten.mean.dim: reduced("ReduceMean"),
    aten.sum.dim_IntList: reduced("ReduceSum"),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default), softmax),
    aten.where.self: where,
    **dict.fromkeys((aten.full.default, aten.zeros.default, aten.ones.default), full),
    aten.clamp.default: clamp,
}  # fmt: skip
