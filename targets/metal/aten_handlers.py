"""Handlers of ATen operators for which the delegate has none: those of attention that was not fused.

T tokens, S cache positions. A cache that the graph itself writes keeps its shape in the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.targets.metal.context import Context
from moec.targets.metal.emitter import Slot
from moec.targets.metal.handlers import operands, scalar_type, slot_of

aten = torch.ops.aten


def gather(c: Context, n: Node) -> Slot:
    """All dimensions but `dim` must agree."""
    x, dim, index, *_ = operands(n)
    shapes = [list(v.meta["val"].shape) for v in (x, index)]
    for shape in shapes:
        del shape[dim]
    if shapes[0] != shapes[1]:
        raise CompileError(
            f"{n.name} gathers from {shapes[0]} by {shapes[1]}: Metal needs equal sizes outside dimension {dim}",
            place=c.program.info.name,
        )
    out = c.P.make_or_get_slot(n)
    return c.e.emit("TakeAlongAxis", x=slot_of(c, x), indices=slot_of(c, index), axis=int(dim), out=out)


def index_copy(c: Context, n: Node) -> Slot:
    """Write rows of a cache, in place: the result is the cache itself."""
    cache, dim, index, update = operands(n)
    if cache.op != "placeholder" or len(cache.users) != 1:
        what = f"{n.name} writes what is not a cache, or one that is read before"
        raise CompileError(what, place=c.program.info.name)
    slot = slot_of(c, cache)
    # the delegate reads int64 indices, and a float32 result of the graph must not widen a cache of 16 bits
    rows = c.e.cast(slot_of(c, index), torch.int64)
    value = c.e.cast(slot_of(c, update), cache.meta["val"].dtype)
    c.e.emit("IndexCopy", dst=slot, update=value, indices=rows, axis=int(dim), out=slot)
    c.P.set_slot(n, slot)
    return slot


def softmax(c: Context, n: Node) -> Slot:
    """In float32 whatever the operand's type; the result is of the type of activations, as what it weighs."""
    x, dim = operands(n)[:2]
    return c.finish(n, c.e.emit("Softmax", x=slot_of(c, x), axis=int(dim), precise=True))


def where_scalar(c: Context, n: Node) -> Slot:
    test, x, other = operands(n)
    if not n.meta["val"].dtype.is_floating_point:
        raise CompileError(f"{n.name} chooses between integers: no Metal lowering", place=c.program.info.name)
    out = c.P.make_or_get_slot(n)
    return c.e.emit("Where", condition=slot_of(c, test), x=slot_of(c, x), y=c.e.scalar(float(other)), out=out)


def logical_and(c: Context, n: Node) -> Slot:
    """`&` of masks."""
    a, b = operands(n)
    if n.meta["val"].dtype != torch.bool:
        raise CompileError(f"{n.name} is an `&` of integers: Metal has that of bool only", place=c.program.info.name)
    return c.e.binary("LogicalAnd", slot_of(c, a), slot_of(c, b), c.P.make_or_get_slot(n))


def filled(value: float) -> Callable[[Context, Node], Slot]:
    """`new_ones`, `new_zeros`, and `new_empty`, of which nothing is read before it is written."""

    def lower(c: Context, n: Node) -> Slot:
        dtype, sizes = n.meta["val"].dtype, operands(n)[1]
        return c.e.emit(
            "Full",
            shape=[c.e.int_or_vid(slot_of(c, d) if isinstance(d, Node) else int(d)) for d in sizes],
            v=c.P.to_float_or_vid(value),
            scalar_type=scalar_type(c.dtype if dtype == torch.float32 else dtype),
            out=c.P.make_or_get_slot(n),
        )

    return lower


def largest(c: Context, n: Node) -> Slot:
    """aten.max along a dimension, of whose two results only the values may be read."""
    x, dim, *keep = operands(n)
    if any(user.args[1] != 0 for user in n.users):
        raise CompileError(f"{n.name}: where the largest is has no Metal lowering", place=c.program.info.name)
    values = c.P.make_or_get_slots(n)
    c.e.emit("Max", x=slot_of(c, x), axes=[int(dim)], keepdims=bool(keep and keep[0]), out=values[0])
    return values  # type: ignore[no-any-return]


HANDLERS = {
    aten.gather.default: gather,
    aten.index_copy.default: index_copy,
    aten.softmax.int: softmax,
    aten.where.ScalarOther: where_scalar,
    aten.__and__.Tensor: logical_and,
    aten.new_ones.default: filled(1.0),
    aten.new_zeros.default: filled(0.0),
    aten.new_empty.default: filled(0.0),
    aten.max.dim: largest,
}
