"""Canonicalize: one functional graph of ATen operators without the nodes that compute nothing.

assert(..), dropout(x, p, train=False), x.to(own type), clone(x), view(x, own shape)  ->  x
_unsafe_view(clone(x), shape)                                                         ->  reshape(x, shape)
layer_norm(.., cudnn)                                                                 ->  layer_norm(..)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from moec.compiler.functional import functional
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Program, Stage

aten = torch.ops.aten

ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
COPIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
}
CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.to.other,
}
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.view_as.default,
    aten.slice.Tensor,
}


def canonicalize() -> Pass:
    return Pass("canonicalize", _run, needs=Stage.EXPORTED, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    edit = program.edit() if program.stage >= Stage.CANONICAL else functional(program)
    if edit is None:
        program = replace(program, exported=program.exported.run_decompositions({}))
        edit = program.edit()
    changed = 0
    for node in list(edit.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ASSERTIONS:
            edit.graph.erase_node(node)
            changed += 1
            continue
        if node.target is aten.layer_norm.default and len(node.args) > 5:
            node.args = node.args[:5]
            changed += 1
        source = _same_value(node)
        if source is None and node.target is aten._unsafe_view.default:
            node.target = aten.reshape.default  # without the copy before it, its operand need not be contiguous
            changed += 1
        if source is not None:
            for user in node.users:
                if node.target in COPIES and user.target is aten.view.default:
                    user.target = aten.reshape.default
            node.replace_all_uses_with(source)
            edit.graph.erase_node(node)
            changed += 1
    if not changed and program.stage >= Stage.CANONICAL:
        return PassResult(program, 0)
    return PassResult(edit.done(stage=max(program.stage, Stage.CANONICAL)), changed)


def _same_value(node: Node) -> Node | None:
    """The operand whose value `node` merely repeats, if there is one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if node.target in COPIES:
        return source
    if node.target in (aten.dropout.default, aten.native_dropout.default):
        return source if node.target is aten.dropout.default and (node.args[1] == 0.0 or not node.args[2]) else None
    if node.target in CASTS:
        return source if _same_type(source, node) else None
    if node.target in RESHAPES and _same_shape(source, node):
        return source if node.target is not aten.slice.Tensor or _is_whole(node) else None
    return None


def _same_type(a: Node, b: Node) -> bool:
    return a.meta["val"].dtype == b.meta["val"].dtype and a.meta["val"].device == b.meta["val"].device


def _same_shape(a: Node, b: Node) -> bool:
    """Equal dimension by dimension, decided without adding a guard on a symbol."""
    left, right = a.meta["val"].shape, b.meta["val"].shape
    return len(left) == len(right) and all(
        x is y or (x == y if isinstance(x, int) and isinstance(y, int) else str(x) == str(y))
        for x, y in zip(left, right, strict=True)
    )


def _is_whole(node: Node) -> bool:
    """A slice that keeps its operand's shape with a positive step keeps every element."""
    return len(node.args) < 5 or node.args[4] == 1
