"""Fuse a scan over tokens that carries a state into moec::gated_delta or moec::selective_scan.

    after, y = scan(step, before, (q, k, v, decay, beta))    ->  y = moec::gated_delta(q, k, v, decay, beta, state, ..)
    after, y = scan(step, before, (x, dt, b, c), (a, d))     ->  y = moec::selective_scan(x, dt, a, b, c, d, state, ..)

What the step computes is recognised by evaluating it (compiler/matching/recurrence.py), not by how it is written.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.compiler.matching.read import Stuck, is_op, rank, shape
from moec.compiler.matching.recurrence import Recurrence, read_body
from moec.compiler.matching.state_graph import HeldState, content, replaced_states, start_of
from moec.compiler.ops import GatedDelta, SelectiveScan
from moec.compiler.ops.call import Call
from moec.compiler.pipeline import Pass, PassResult, Refusal
from moec.compiler.program import Editor, Program, Stage, module_path
from moec.compiler.states import Replaced, State

aten = torch.ops.aten
RULE = "fuse_recurrence"
REMEDY = "a recurrence is torch scan(step, state, tokens) of a gated delta rule or a selective scan, its state a buffer"
SCAN = torch.ops.higher_order.scan


def fuse_recurrence() -> Pass:
    return Pass(RULE, _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


@dataclass(frozen=True)
class _Fold:
    """`inputs`: of the body after the state; the first `tokens` of them are folded over, the others are fixed."""

    node: Node
    body: GraphModule
    before: Node
    inputs: tuple[Node, ...]
    tokens: int
    after: Node
    y: Node


def _run(program: Program) -> PassResult:
    edit = program.edit()
    refusals: list[Refusal] = []
    changed = 0
    written = {after: (name, buffer) for name, buffer, after in replaced_states(edit)}
    for node in [n for n in edit.graph.nodes if n.target is SCAN]:
        try:
            fold = _fold(edit, node)
            if fold.after not in written:
                raise Stuck(node, "its last state is not returned as the new content of a buffer")
            name, buffer = written[fold.after]
            held = content(edit, name, buffer, fold.after)
            if held.before is not fold.before:
                raise Stuck(node, f"it does not begin at the content of {name}, the state that it writes")
            _fuse(edit, fold, held, read_body(fold.body, node))
            changed += 1
        except Stuck as stuck:
            refusals.append(Refusal.at(RULE, stuck.node, stuck.reason, stuck.remedy or REMEDY, block=node))
    return PassResult(edit.done(), changed, tuple(refusals)) if changed else PassResult(program, 0, tuple(refusals))


def _fold(edit: Editor, node: Node) -> _Fold:
    body, states, tokens, fixed = node.args
    if not isinstance(body, Node) or body.op != "get_attr":
        raise Stuck(node, "its step is no graph of its own")
    if len(states) != 1:  # type: ignore[arg-type]
        raise Stuck(node, f"it carries {len(states)} states, a recurrence has one")  # type: ignore[arg-type]
    parts = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if set(parts) != {0, 1} or len(node.users) != 2:
        raise Stuck(node, "not both of its results, the state and what each token gives, are read")
    given = (*tokens, *fixed)  # type: ignore[misc]
    if not all(isinstance(i, Node) for i in given):
        raise Stuck(node, "its step reads something that is no tensor")
    module = getattr(edit.module, str(body.target))
    return _Fold(node, module, states[0], given, len(tokens), parts[0], parts[1])  # type: ignore[arg-type, index]


def _fuse(edit: Editor, fold: _Fold, held: HeldState, read: Recurrence) -> None:
    start = start_of(edit)
    assert start is not None  # `content` read it
    for name, index in read.operands.items():
        folded = index - 1 < fold.tokens
        if folded != (name not in ("a", "d")):
            raise Stuck(fold.node, f"{name} of {read.kind} is {'one for each token' if folded else 'the same for all'}")
    layer = module_path(fold.node) or module_path(fold.y)
    edit.drop_mutation(held.after)
    (state,) = edit.hold(State(held.name, tuple(shape(held.buffer)), Replaced(read.kind), layer=layer))
    with edit.graph.inserting_before(fold.node):
        given = {n: _operand(edit, fold, i - 1) for n, i in read.operands.items()}
        call: Call[Any]
        if read.kind == "gated_delta":
            call = GatedDelta(**given, state=state, start_pos=start, **read.numbers)
        else:
            a = given.pop("a")
            if rank(a) == 1:
                a = edit.call(aten.unsqueeze.default, a, 1, like=fold.node)
            call = SelectiveScan(a=a, d=given.pop("d", None), state=state, start_pos=start, **given)
        fused = edit.emit(call, like=fold.node)
        sizes = shape(fold.y)
        tokens = edit.call(aten.sym_size.int, fused, 1)
        y = edit.call(aten.view.default, fused, [1, tokens, int(sizes[2]), int(sizes[3])], like=fold.node)
    _replace_result(edit, fold.y, y)
    edit.graph.eliminate_dead_code()


def _operand(edit: Editor, fold: _Fold, index: int) -> Node:
    """An input of the body: of the tokens as [1, T, ..], which the fold has as [T, 1, ..]."""
    node = fold.inputs[index]
    if index >= fold.tokens:
        return node
    return _turned(node) or edit.call(aten.transpose.int, node, 0, 1, like=fold.node)


def _turned(node: Node) -> Node | None:
    """What `node` is with its first two dimensions exchanged."""
    if is_op(node, aten.permute.default) and list(node.args[1]) == [1, 0, *range(2, rank(node))]:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, aten.transpose.int) and {d % rank(node) for d in node.args[1:3]} == {0, 1}:  # type: ignore[operator]
        return node.args[0]  # type: ignore[return-value]
    return None


def _replace_result(edit: Editor, old: Node, y: Node) -> None:
    """`old` is [T, 1, ..], `y` [1, T, ..]: its readers mostly turn it back."""
    for user in [u for u in old.users if _turned(u) is old]:
        user.replace_all_uses_with(y)
    if any(_turned(u) is not old for u in old.users):
        with edit.graph.inserting_after(y):
            back = edit.call(aten.transpose.int, y, 0, 1, like=y)
        old.replace_all_uses_with(back)
