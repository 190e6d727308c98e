"""Fuse rotary embedding into moec::rope(x [1,T,H,d], cos [T,d/2], sin [T,d/2], interleaved).

interleaved:  stack((a*c - b*s, a*s + b*c), -1).flatten(-2)   with a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
halves:       cat((a*c - b*s, a*s + b*c), -1)                 with a, b = x.chunk(2, -1); x may be [1, H, T, d]
rotate_half:  x*C + cat((-b, a), -1)*S                        with C = cat((c, c), -1), S = cat((s, s), -1), up to
                                                              operators applied to every element alike
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import (
    arg,
    binary,
    dim_of,
    is_op,
    piece,
    rank,
    same_shape,
    same_size,
    shape,
    static,
    unpad,
    unview,
    with_scalar,
)
from moec.compiler.ops import Rope
from moec.compiler.pipeline import Pass, PassResult, Refusal
from moec.compiler.program import Editor, Program, Stage

aten = torch.ops.aten
RULE = "fuse_rope"


def fuse_rope() -> Pass:
    return Pass(RULE, _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    refusals: list[Refusal] = []
    tables: dict[tuple[Node, ...], Node] = {}
    changed = 0
    for node in list(edit.graph.nodes):
        if is_op(node, aten.stack.default, aten.cat.default):
            changed += _pairwise(edit, node, tables)
        elif is_op(node, aten.add.Tensor):
            changed += _rotate_half(edit, node, tables)
    return PassResult(edit.done(), changed, tuple(refusals)) if changed else PassResult(program, 0, tuple(refusals))


def _pairwise(edit: Editor, node: Node, tables: dict[tuple[Node, ...], Node]) -> int:
    parts = node.args[0]
    last = rank(node) - 1
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim_of(node, 1, "dim", rank(node), 0) != last:
        return 0
    interleaved = is_op(node, aten.stack.default)
    end = _flattened(node) if interleaved else node
    for a, b, cos, sin in _rotations(parts[0], parts[1]):
        source = _unbound(a, b) if interleaved else _halves(a, b)
        if source is None or end is None or rank(source) != 4 or shape(source)[0] != 1:
            continue
        by_head = (1, 1, shape(source)[2], shape(source)[3] // 2)
        if not interleaved and all(same_shape(shape(t), by_head) for t in (cos, sin)):
            return _turn_heads(edit, node, source, [_flat_table(edit, t, tables) for t in (cos, sin)])
        c, s = _table(cos), _table(sin)
        if c is None or s is None:
            continue
        if not all(same_size(shape(t)[0], shape(source)[1]) for t in (c, s)):
            continue
        with edit.graph.inserting_before(end):
            fused = edit.emit(Rope(x=source, cos=c, sin=s, interleaved=interleaved), like=end)
        end.replace_all_uses_with(fused)
        return 1
    return 0


def _rotations(first: Any, second: Any) -> Iterator[tuple[Node, Node, Node, Node]]:
    """(a, b, cos, sin) of first = a*cos - b*sin and second = a*sin + b*cos, each sum and product in either order.

    The product of two complex numbers commutes: there are two readings, (a, b) turned by (cos, sin) and the reverse.
    """
    minus, plus = binary(first, aten.sub.Tensor), binary(second, aten.add.Tensor)
    if minus is None or plus is None:
        return
    products = [p for p in (binary(p, aten.mul.Tensor) for p in (*minus, *plus)) if p is not None]
    if len(products) != 4 or not all(isinstance(n, Node) for p in products for n in p):
        return
    ac, bs, one, two = products
    for a, cos in (ac, ac[::-1]):
        for b, sin in (bs, bs[::-1]):
            wanted = ({a, sin}, {b, cos})
            if (set(one), set(two)) in (wanted, wanted[::-1]) and len({a, b, cos, sin}) == 4:
                yield a, b, cos, sin


def _unbound(a: Node, b: Node) -> Node | None:
    """x when a and b are its elements 2i and 2i+1 along the last dimension."""
    parents = {n.args[0] for n in (a, b) if getattr(n.target, "__name__", "") == "getitem"}
    if len(parents) == 1 and (a.args[1], b.args[1]) == (0, 1):
        unbind: Any = parents.pop()
        pairs = unbind.args[0]
        if not is_op(unbind, aten.unbind.int) or dim_of(unbind, 1, "dim", rank(pairs), 0) != rank(pairs) - 1:
            return None
        if shape(pairs)[-1] != 2 or not is_op(pairs, aten.view.default, aten.unflatten.int, aten.reshape.default):
            return None
        source = pairs.args[0]
        return source if rank(source) == rank(pairs) - 1 and static(shape(source)[-1]) == 2 * shape(pairs)[-2] else None
    even, odd = piece(a), piece(b)
    if even is None or odd is None or even[0] is not odd[0]:
        return None
    source, last = even[0], rank(even[0]) - 1
    size = shape(source)[-1]
    return source if even[1:] == (last, 0, size, 2) and odd[1:] == (last, 1, size, 2) else None


def _halves(a: Node, b: Node) -> Node | None:
    first, second = piece(a), piece(b)
    if first is None or second is None or first[0] is not second[0]:
        return None
    source, last = first[0], rank(first[0]) - 1
    size = shape(source)[-1]
    whole = first[1:] == (last, 0, size // 2, 1) and second[1:] == (last, size // 2, size, 1)
    return source if whole and size % 2 == 0 else None


def _flattened(stack: Node) -> Node | None:
    """The reshape [..., d/2, 2] -> [..., d] that follows a stack."""
    users = list(stack.users)
    if len(users) != 1 or not is_op(users[0], aten.view.default, aten.reshape.default, aten.flatten.using_ints):
        return None
    view = users[0]
    merged = rank(view) == rank(stack) - 1 and shape(view)[-1] == 2 * shape(stack)[-2]
    return view if merged and shape(view)[-2] == shape(stack)[-3] else None


def _table(node: Node) -> Node | None:
    """[T, d/2] from what is broadcast over heads: [T, 1, d/2] or [1, T, 1, d/2]."""
    source = unview(node)
    sizes = shape(node)
    if len(sizes) < 3 or sizes[-2] != 1 or any(s != 1 for s in sizes[:-3]):
        return None
    fits = rank(source) == 2 and same_size(shape(source)[0], sizes[-3]) and shape(source)[1] == sizes[-1]
    return source if fits else None


def _rotate_half(edit: Editor, node: Node, tables: dict[tuple[Node, ...], Node]) -> int:
    pair = binary(node, aten.add.Tensor)
    products = [p for p in (binary(term, aten.mul.Tensor) for term in pair or ()) if p is not None]
    if len(products) != 2:
        return 0
    for plain, turned in (products, products[::-1]):
        for x, cos in (plain, plain[::-1]):
            for rotated, sin in (turned, turned[::-1]):
                if _is_rotate_half(rotated, x):
                    return _replace_rotate_half(edit, node, x, cos, sin, tables)
    return 0


def _is_rotate_half(node: Any, x: Any) -> bool:
    """cat((-second half, first half), -1) of x."""
    if not isinstance(x, Node) or not is_op(node, aten.cat.default):
        return False
    if dim_of(node, 1, "dim", rank(node), 0) != rank(node) - 1:
        return False
    parts = node.args[0]
    if len(parts) != 2 or not is_op(parts[0], aten.neg.default):
        return False
    return _halves(parts[1], parts[0].args[0]) is x


def _replace_rotate_half(
    edit: Editor, node: Node, x: Node, cos: Node, sin: Node, tables: dict[tuple[Node, ...], Node]
) -> int:
    """x is [1, H, T, d], the transpose of [1, T, H, d]; C and S are [1, 1, T, d] with equal halves."""
    if rank(x) != 4 or shape(x)[0] != 1:
        return 0
    for table in (cos, sin):
        if not same_shape(shape(table), (1, 1, *shape(x)[2:])) or not repeats_halves(table):
            return 0
    half = shape(x)[3] // 2
    return _turn_heads(edit, node, x, [_half_table(edit, t, half, tables) for t in (cos, sin)])


def _turn_heads(edit: Editor, node: Node, x: Node, halves: list[Node]) -> int:
    """x is [1, H, T, d]; its tables are [T, d/2]."""
    with edit.graph.inserting_before(node):
        if is_op(x, aten.transpose.int) and {x.args[1] % 4, x.args[2] % 4} == {1, 2}:
            source = x.args[0]
        else:
            source = edit.call(aten.transpose.int, x, 1, 2, like=node)
        turned = edit.emit(Rope(x=source, cos=halves[0], sin=halves[1], interleaved=False), like=node)
        back = edit.call(aten.transpose.int, turned, 1, 2, like=node)
    node.replace_all_uses_with(back)
    return 1


def _flat_table(edit: Editor, table: Node, tables: dict[tuple[Node, ...], Node]) -> Node:
    """[T, d/2] of [1, 1, T, d/2] (or of what is below its dimensions of one), computed once, right behind the table."""
    source = unpad(table)
    if any(size != 1 for size in shape(source)[:-2]):
        source = table
    key = (source, source)  # `_half_table` has its halves under the node alone
    if key not in tables:
        flat = source
        while rank(flat) > 2:
            with edit.graph.inserting_after(flat):
                flat = edit.call(aten.select.int, flat, 0, 0, like=source)
        tables[key] = flat
    return tables[key]


def _half_table(edit: Editor, table: Node, half: int, tables: dict[tuple[Node, ...], Node]) -> Node:
    """[T, d/2] of [1, 1, T, d] (or of what is below its views), computed once, right behind the table."""
    source = unview(table)
    if (source,) not in tables:
        flat = source
        for _ in range(rank(source) - 2):
            with edit.graph.inserting_after(flat):
                flat = edit.call(aten.select.int, flat, 0, 0, like=source)
        with edit.graph.inserting_after(flat):
            tables[(source,)] = edit.call(aten.slice.Tensor, flat, 1, 0, half, like=source)
    return tables[(source,)]


ELEMENTWISE = {aten.cos.default, aten.sin.default, aten._to_copy.default, aten.to.dtype, aten.neg.default}


def repeats_halves(node: Any) -> bool:
    """The halves of the last dimension are equal: cat((f, f), -1) under operators that treat every element alike."""
    while isinstance(node, Node):
        if is_op(node, aten.cat.default):
            parts = node.args[0]
            return len(parts) == 2 and parts[0] is parts[1] and dim_of(node, 1, "dim", rank(node), 0) == rank(node) - 1
        if is_op(node, aten.unsqueeze.default):
            if dim_of(node, 1, "dim", rank(node)) == rank(node) - 1:
                return False
        elif not (is_op(node, *ELEMENTWISE) or with_scalar(node, aten.mul.Tensor) is not None):
            return False
        node = arg(node, 0, "input")
    return False
