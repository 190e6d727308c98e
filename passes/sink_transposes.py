"""Move transposes of tokens and channels, [1, C, T] -> [1, T, C], behind operators that work in either layout.

    transpose(transpose(x))             ->  x
    f(transpose(a), transpose(b))       ->  transpose(f(a, b))           f of each element alone
    f(transpose(a), weight of no axis)  ->  transpose(f(a, ..))
    split(transpose(a), sizes, axis)    ->  transpose of each of split(a, sizes, the other axis)

torch's convolution takes [1, C, T], everything else rows of tokens: after the moves the two transposes meet and cancel.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import SPLITS, dim_of, is_op, rank
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Stage

aten = torch.ops.aten
POINTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.exp.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.tanh.default,
    aten._to_copy.default,
}


def sink_transposes() -> Pass:
    return Pass("sink_transposes", _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    changed = sum(_sink(edit, node) for node in list(edit.graph.nodes) if node.op == "call_function")
    return PassResult(edit.done(), changed) if changed else PassResult(program, 0)


def _sink(edit: Editor, node: Node) -> int:
    turned = _turned(node)
    if turned is not None:
        source = _turned(turned)
        if source is None:
            return 0
        node.replace_all_uses_with(source)
        return 1
    if is_op(node, *SPLITS):
        return _split(edit, node)
    if node.target not in POINTWISE or rank(node) != 3:
        return 0
    operands = [a for a in node.args if isinstance(a, Node)]
    inner = {a: _inner(a) for a in operands}
    if not any(_turned(a) is not None for a in operands) or any(v is None for v in inner.values()):
        return 0
    with edit.graph.inserting_before(node):
        args = [inner[a] if isinstance(a, Node) else a for a in node.args]
        made = edit.call(node.target, *args, like=node, **node.kwargs)
        back = edit.call(aten.transpose.int, made, 1, 2, like=node)
    node.replace_all_uses_with(back)
    return 1


def _turned(node: Any) -> Node | None:
    """What `node` is a transpose of: of the last two of three dimensions."""
    if not is_op(node, aten.transpose.int) or rank(node) != 3:
        return None
    first, second = (d % 3 for d in node.args[1:3])
    source: Node = node.args[0]
    return source if {first, second} == {1, 2} else None


def _inner(node: Node) -> Node | None:
    """An operand before its transpose; one of a single element is the same either way."""
    turned = _turned(node)
    if turned is not None:
        return turned
    value = node.meta.get("val")
    return node if isinstance(value, torch.Tensor) and value.dim() == 0 else None


def _split(edit: Editor, node: Node) -> int:
    source = _turned(node.args[0])
    dim = dim_of(node, 2, "dim", 3, 0)
    if source is None or dim not in (1, 2) or any(u.target is not operator.getitem for u in node.users):
        return 0
    with edit.graph.inserting_before(node):
        parts = edit.call(node.target, source, node.args[1], 3 - dim, like=node)
    for user in list(node.users):
        with edit.graph.inserting_before(user):
            part = edit.call(operator.getitem, parts, user.args[1], like=user)
            back = edit.call(aten.transpose.int, part, 1, 2, like=user)
        user.replace_all_uses_with(back)
    return 1
