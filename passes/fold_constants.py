"""Fold constants: arithmetic on numbers that the graph itself holds is done once, here, and not at every token.

f(arange, full, zeros, ones, numbers)  ->  a constant, f any chain of the operators below

Rotary frequencies that a model computes in `forward` are such. What only fills or counts is left: it takes no memory
and rules read it. The values are those of torch on this machine's CPU, as those of the eager model.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import CASTS, VIEWS, aten
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, LazyWeight, Program, Role, Stage, writes

MADE = {
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.zeros.default,
    aten.ones.default, aten.scalar_tensor.default,
}  # fmt: skip
ARITHMETIC = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Scalar, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor,
    aten.reciprocal.default, aten.neg.default, aten.exp.default, aten.log.default, aten.sqrt.default,
    aten.rsqrt.default, aten.cos.default, aten.sin.default,
}  # fmt: skip
KNOWN = MADE | ARITHMETIC | VIEWS | CASTS | {aten.expand.default, aten.slice.Tensor, aten.cat.default}
MOST = 1 << 16  # elements of a value on the way: more than the frequencies of any model, 256 KB


def fold_constants() -> Pass:
    return Pass("fold_constants", _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    known: dict[Node, bool] = {}  # and whether there is arithmetic in it
    for node in program.graph.nodes:
        if _is_known(node, known):
            known[node] = node.target in ARITHMETIC or any(known[n] for n in node.all_input_nodes)
    if not any(_is_last(node, known) for node in known):
        return PassResult(program, 0)
    edit = program.edit()
    copies = {old.name: new for old, new in zip(program.graph.nodes, edit.graph.nodes, strict=True)}
    known = {copies[node.name]: computed for node, computed in known.items()}
    values: dict[Node, Any] = {}
    folded = [node for node in known if _is_last(node, known)]
    for node in known:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    for node in folded:
        constant = edit.add_weight(_name(edit), _held(values[node]), Role.CONSTANT)
        node.replace_all_uses_with(constant)
    edit.graph.eliminate_dead_code(is_impure_node=writes)
    return PassResult(edit.done(), len(folded))


def _is_known(node: Node, known: dict[Node, bool]) -> bool:
    """Computed here from numbers alone, small, and of a fixed shape."""
    if node.op != "call_function" or node.target not in KNOWN or any(n not in known for n in node.all_input_nodes):
        return False
    value = node.meta.get("val")
    fixed = isinstance(value, torch.Tensor) and all(isinstance(s, int) for s in value.shape)
    return fixed and int(torch.Size(value.shape).numel()) <= MOST


def _is_last(node: Node, known: dict[Node, bool]) -> bool:
    """A float that arithmetic has made, and that something not known reads."""
    outside = any(user not in known for user in node.users)
    return known[node] and outside and node.meta["val"].dtype == torch.float32


def _held(value: torch.Tensor) -> LazyWeight:
    held = value.contiguous()
    return LazyWeight(tuple(held.shape), held.dtype, lambda: held)


def _name(edit: Editor) -> str:
    return next(n for i in itertools.count() if edit.placeholder_of(n := f"constant_{i}") is None)
