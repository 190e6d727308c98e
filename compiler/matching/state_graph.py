"""How a graph reads and writes a state of fixed size: the content that a call starts from, and the new one.

before = buffer where start_pos > 0, zero where it is 0          in any spelling: read by its values
after  = a value that is returned as the new content of the buffer
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from moec.compiler.matching.read import Stuck, shape
from moec.compiler.program import Editor
from moec.compiler.states import Replaced

BEGINS = "set the state to zero where start_pos is 0: torch.where(start_pos == 0, 0, state)"
_SHAPES = {"zeros_like", "ones_like", "full_like", "empty_like", "sym_size"}  # read no element
_STARTS = (0, 1, 2, 5, 100)
_CASES = {
    "eq", "ne", "gt", "ge", "lt", "le", "where", "mul", "logical_not", "bitwise_not", "zeros", "zeros_like", "full",
    "scalar_tensor", "view", "reshape", "unsqueeze", "squeeze", "expand", "_to_copy", "to", "clone", "alias", "select",
    "masked_fill", "lift_fresh_copy", "full_like",
}  # fmt: skip


@dataclass(frozen=True)
class HeldState:
    """A buffer that a call replaces. `before`: what it reads; `after`: what becomes its content."""

    name: str
    buffer: Node
    before: Node
    after: Node


def start_of(edit: Editor) -> Node | None:
    """The start position: the input that is no weight and has one dimension."""
    inputs = (n for n in edit.graph.nodes if n.op == "placeholder" and edit.weight_of(n) is None)
    return next((n for n in inputs if n.meta["val"].dim() == 1), None)


def replaced_states(edit: Editor) -> list[tuple[str, Node, Node]]:
    """(name, buffer, new content) of every state of which nothing but a new content is known."""
    results = edit.graph.output_node().args[0]
    assert isinstance(results, (list, tuple))
    found = []
    for spec, value in zip(edit.output_specs, results, strict=True):
        state = edit.states.get(str(spec.target)) if spec.kind == OutputKind.BUFFER_MUTATION else None
        buffer = None if state is None else edit.placeholder_of(state.name)
        if state is not None and buffer is not None and isinstance(state.update, Replaced):
            found.append((state.name, buffer, value))
    return found


def content(edit: Editor, name: str, buffer: Node, after: Node) -> HeldState:
    """The one value that a call reads of a state, its zero at the beginning included.

    Stuck if it is read in several ways, is not float32, or is not zero where a sequence begins.
    """
    if buffer.meta["val"].dtype != torch.float32:
        raise Stuck(buffer, f"the state {name} is not float32")
    if edit.mutations_of(after) != [name]:
        raise Stuck(after, f"the new content of the state {name} is a result, or a state, of something else too")
    if any(u.op != "output" for u in after.users):
        raise Stuck(after, f"the new content of the state {name} is read in this call too")
    start = start_of(edit)
    node = buffer
    while True:
        users = [u for u in node.users if u.op != "output" and _operator(u) not in _SHAPES]
        if len(users) != 1:
            raise Stuck(node, f"the state {name} is read in {len(users)} places", BEGINS)
        if _begins(users[0], buffer, start):
            node = users[0]
            break
        if not _passes(users[0]):
            raise Stuck(users[0], f"the state {name} goes on where a sequence begins anew", BEGINS)
        node = users[0]
    if tuple(shape(node)) != tuple(shape(buffer)):
        raise Stuck(node, f"the state {name} is read in another shape")
    if len(node.users) != 1:
        raise Stuck(node, f"the state {name} is read in {len(node.users)} places")
    return HeldState(name, buffer, node, after)


def _passes(node: Node) -> bool:
    """Whether `node` may stand between a buffer and the choice of zero."""
    return _operator(node) in ("clone", "alias", "_to_copy", "to")


def _operator(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.partition("::")[2]


def _begins(node: Node, buffer: Node, start: Node | None) -> bool:
    """Whether `node` is the buffer from position 1 on and zero at position 0, by its values."""
    if start is None:
        return False
    kept = torch.randn(tuple(shape(buffer)), generator=torch.Generator().manual_seed(1))
    marks = {int(n) + d for n in _numbers(node, buffer) for d in (-1, 0, 1)}
    for position in sorted({*_STARTS, *(m for m in marks if m >= 0)}):
        try:
            value = _value(node, {buffer: kept, start: torch.tensor([position])})
        except RuntimeError:  # arguments that torch does not take
            return False
        if value is None or tuple(value.shape) != tuple(kept.shape):
            return False
        if not torch.equal(value, kept if position else torch.zeros_like(kept)):
            return False
    return True


def _numbers(node: Node, stop: Node) -> set[float]:
    """What positions may be compared with: every number among the operands of the choice."""
    found, pending, seen = set[float](), [node], {stop}
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        found |= {a for a in (*one.args, *one.kwargs.values()) if isinstance(a, (int, float)) and abs(a) < 2**53}
        pending += [n for n in one.all_input_nodes if n.op == "call_function"]
    return found


def _value(node: Node, known: dict[Node, Tensor]) -> Any:
    """The value of a few operators over `known`, None where another one or another input is met."""
    if node in known:
        return known[node]
    if node.op != "call_function" or _operator(node) not in _CASES:
        return None
    if _operator(node) == "mul" and not node.meta["val"].is_floating_point():
        return None  # arithmetic on positions: a comparison of it could pick any of them
    values = {n: _value(n, known) for n in node.all_input_nodes}
    if any(v is None for v in values.values()):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]
