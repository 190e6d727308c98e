"""A program run over many texts at once, a stretch of its graph at a time: one layer's weights are in memory, not all.

The graph is cut where little is alive: between layers, where only the residual stream is. Every stretch runs for all
texts before the next begins, so each weight is read once, whatever the number of tokens. Values that follow from
positions alone (masks, rotary tables) are computed anew in each stretch instead of being kept.

T tokens of one call, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx import Node

from moec.compiler.ops import fused_moe
from moec.compiler.program import Program, Role, writes

Observer = Callable[[Node, tuple[Any, ...]], None]
_SLACK = 1.05  # a cut may be this much wider than the narrowest


@dataclass
class Call:
    """One call of a text: its ids, where they start, and the values that later stretches read."""

    text: int
    start: int
    ids: tuple[int, ...]
    values: dict[Node, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stretch:
    """Consecutive nodes to run, the values they need from before, and those that are read after."""

    nodes: tuple[Node, ...]
    kept: frozenset[Node]


class LayerStream:
    """`program` over `texts` of token ids. `wanted`: the nodes whose operands are observed; nothing else is computed.

    Iterating gives the stretches in order. `run(stretch, observe)` computes one for all texts and calls
    `observe(node, args)` before each wanted node, whose own result is computed only where a later node needs it. A
    fused MoE node is a stretch of its own, `joint`: it is for the caller to compute for all tokens at once
    (`joint_operand`, `give`). result: whether the logits are computed; `results` gives them after the last stretch.
    """

    def __init__(
        self,
        program: Program,
        texts: Sequence[Sequence[int]],
        wanted: Collection[Node] = (),
        *,
        result: bool = False,
    ) -> None:
        self.program = program
        self._wanted = frozenset(wanted)
        self._result = _logits(program) if result else None
        longest = program.info.max_tokens
        self.calls = [
            Call(n, start, tuple(ids[start : start + longest]))
            for n, ids in enumerate(texts)
            for start in range(0, len(ids), longest)
        ]
        self._inputs = _user_inputs(program)
        self._states = _states(program)
        self._mutations = _mutations(program)
        writers = [n for n in program.graph.nodes if n.op == "call_function" and writes(n)]
        self._needed = _ancestors([*self._wanted, *writers]) | set(writers)
        if self._result is not None:
            self._needed |= _ancestors([self._result]) | {self._result}
        self._cheap = _position_only(program, self._states)
        self._kept_state: dict[tuple[int, str], Tensor] = {}
        self._texts = len(texts)
        self.stretches = self._cut()

    def __iter__(self) -> Iterator[Stretch]:
        return iter(self.stretches)

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(call.ids) for call in self.calls)

    # --- cutting ----------------------------------------------------------------------------------------------------

    def _cut(self) -> list[Stretch]:
        order = [
            n
            for n in self.program.graph.nodes
            if n.op == "call_function" and n not in self._cheap and (n in self._needed or n in self._wanted)
        ]
        place = {n: i for i, n in enumerate(order)}
        last = {n: max((place[u] for u in n.users if u in place), default=-1) for n in order}
        if self._result is not None:
            last[self._result] = len(order)
        widths, alive = [], 0
        ends: dict[int, list[Node]] = {}
        for i, node in enumerate(order):
            if last[node] > i:
                alive += _size(node)
                ends.setdefault(last[node], []).append(node)
            alive -= sum(_size(n) for n in ends.get(i, ()))
            widths.append(alive)
        inner = widths[len(widths) // 4 : 3 * len(widths) // 4] or widths
        limit = _SLACK * min(inner)
        cuts = [i for i, w in enumerate(widths[:-1]) if w <= limit and i > 0]
        for i, node in enumerate(order):
            if node.target is fused_moe:
                cuts += [i - 1, i]
        bounds = [0, *(i + 1 for i in sorted({c for c in cuts if 0 <= c < len(order) - 1})), len(order)]
        stretches = []
        for a, b in pairwise(bounds):
            kept = frozenset(n for n in order[:b] if last[n] >= b)
            stretches.append(Stretch(tuple(order[a:b]), kept))
        return stretches

    # --- a node for all tokens at once ------------------------------------------------------------------------------

    def joint(self, stretch: Stretch) -> Node | None:
        """The fused MoE node that is this stretch; None if it is another."""
        return stretch.nodes[0] if len(stretch.nodes) == 1 and stretch.nodes[0].target is fused_moe else None

    def joint_operand(self, operand: Node, calls: Sequence[Call] | None = None) -> Tensor:
        """A value that is kept, or a reshape of one, of all calls: its rows [T, D]."""
        return torch.cat([self._kept(operand, call).flatten(0, -2) for call in calls or self.calls])

    def _kept(self, node: Node, call: Call) -> Tensor:
        value = call.values[node]
        assert isinstance(value, Tensor)
        return value

    def give(self, stretch: Stretch, y_TD: Tensor | None, calls: Sequence[Call] | None = None) -> None:
        """The result of a joint node, [T, D]; None where nobody reads it."""
        node, start = stretch.nodes[0], 0
        for call in calls or self.calls:
            if y_TD is not None and node in stretch.kept:
                call.values[node] = y_TD[start : start + len(call.ids)]
            start += len(call.ids)
            call.values = {n: v for n, v in call.values.items() if n in stretch.kept}

    @torch.no_grad()
    def run_joint(
        self, stretch: Stretch, *, calls: Sequence[Call] | None = None, weights: dict[str, Tensor] | None = None
    ) -> None:
        """A joint node computed by its operator, for all tokens at once. `calls` and `weights` as of `run`."""
        node = stretch.nodes[0]
        loaded = {} if weights is None else weights

        def resolve(operand: Node) -> Any:
            name = self.program.weight_of(operand)
            return self.joint_operand(operand, calls) if name is None else self._loaded(name, loaded)

        target: Any = node.target
        self.give(stretch, target(*torch.fx.map_arg(node.args, resolve)), calls)

    def weights_of(self, stretch: Stretch) -> list[str]:
        """The names of the weights that a stretch reads, without caches and constants."""
        names = (self.program.weight_of(n) for node in stretch.nodes for n in node.all_input_nodes)
        constant = (Role.CACHE, Role.CONSTANT)
        known = (n for n in names if n is not None and n not in self._states)
        return [n for n in dict.fromkeys(known) if self.program.roles.get(n) not in constant]

    def shared_state(self) -> str | None:
        """A cache that nodes of several stretches use, if there is one."""
        for name, placeholder in self._states.items():
            if sum(any(u in s.nodes for u in placeholder.users) for s in self.stretches) > 1:
                return name
        return None

    def needs(self, node: Node) -> bool:
        """Whether the node's own result is read by what is wanted."""
        return node in self._needed

    def branch(self) -> list[Call]:
        """Copies of all calls as far as they have come, which go on as texts of their own (`run` with `calls`)."""
        numbers = {call.text: self._texts + i for i, call in enumerate({c.text: c for c in self.calls}.values())}
        self._texts += len(numbers)
        for (text, name), value in list(self._kept_state.items()):
            if text in numbers:
                self._kept_state[numbers[text], name] = value.clone()
        return [Call(numbers[call.text], call.start, call.ids, dict(call.values)) for call in self.calls]

    def results(self, calls: Sequence[Call] | None = None) -> Iterator[Tensor]:
        """Logits [t, V] of each call, float32, after the last stretch."""
        assert self._result is not None
        for call in calls or self.calls:
            yield call.values[self._result].flatten(0, -2).to(torch.float32)

    # --- running ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self,
        stretch: Stretch,
        observe: Observer,
        compute: dict[Any, Callable[..., Any]] | None = None,
        *,
        calls: Sequence[Call] | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """One stretch for all texts. `compute` gives operators another implementation.

        calls: branches to run instead. weights: values that are taken, and to which those that are read are added.
        """
        weights = {} if weights is None else weights
        after = {n for s in self.stretches[self.stretches.index(stretch) + 1 :] for n in s.nodes}
        states: dict[str, Tensor] = {}
        text = -1
        for call in calls or self.calls:
            if call.text != text:
                self._keep_states(text, states, after)
                states, text = {}, call.text
            self.run_call(stretch, call, weights, states, observe, compute or {})
        self._keep_states(text, states, after)

    def _keep_states(self, text: int, states: dict[str, Tensor], after: set[Node]) -> None:
        """A cache that layers share is read by later stretches; the others are dropped with their layer."""
        for name, value in states.items():
            if any(user in after for user in self._states[name].users):
                self._kept_state[text, name] = value
            else:
                self._kept_state.pop((text, name), None)

    def run_call(
        self,
        stretch: Stretch,
        call: Call,
        weights: dict[str, Tensor],
        states: dict[str, Tensor],
        observe: Observer,
        compute: dict[Any, Callable[..., Any]],
    ) -> None:
        """One stretch for one call, under the caller's gradient mode. `weights`, `states`: to which what is read is
        added; the call's values become those that later stretches read."""
        values = dict(call.values)
        operands = _Operands(self, call, values, weights, states)
        for node in stretch.nodes:
            if node in self._wanted:
                observe(node, torch.fx.map_arg(node.args, operands.value))
            if node not in self._needed:
                continue
            values[node] = self._value(node, operands.value, compute)
            for name in self._mutations.get(node, ()):
                states[name] = values[node]
        call.values = {n: v for n, v in values.items() if n in stretch.kept}

    def _value(self, node: Node, resolve: Callable[[Node], Any], compute: dict[Any, Callable[..., Any]]) -> Any:
        args, kwargs = torch.fx.map_arg(node.args, resolve), torch.fx.map_arg(node.kwargs, resolve)
        target: Any = compute.get(node.target, node.target)
        return target(*args, **kwargs)

    def _placeholder(self, node: Node, call: Call, weights: dict[str, Tensor], states: dict[str, Tensor]) -> Any:
        if node.name in self._inputs:
            values = (torch.tensor([call.ids], dtype=torch.int64), torch.tensor([call.start], dtype=torch.int64))
            return values[self._inputs[node.name]]
        name = self.program.weight_of(node)
        assert name is not None
        if name in self._states:
            if name not in states:
                kept = self._kept_state.get((call.text, name))
                states[name] = self.program.weights[name].load().clone() if kept is None else kept
            return states[name]
        return self._loaded(name, weights)

    def _loaded(self, name: str, weights: dict[str, Tensor]) -> Tensor:
        if name not in weights:
            weights[name] = self.program.weights[name].load()
        return weights[name]


@dataclass(frozen=True)
class _Operands:
    """Values of the nodes that one call reads, computed or loaded when they are first read.

    An object, since a function that calls itself refers to itself: what it has seen, activations of a whole stretch,
    would stay in memory until the next collection of cycles.
    """

    stream: LayerStream
    call: Call
    values: dict[Node, Any]
    weights: dict[str, Tensor]
    states: dict[str, Tensor]

    def value(self, node: Node) -> Any:
        if node in self.values:
            return self.values[node]
        if node.op == "placeholder":
            return self.stream._placeholder(node, self.call, self.weights, self.states)
        if node in self.stream._cheap:
            self.values[node] = self.stream._value(node, self.value, {})
            return self.values[node]
        raise AssertionError(f"{node.name} was not computed")


def _logits(program: Program) -> Node:
    """The value that the program returns."""
    results = next(reversed(program.graph.nodes)).args[0]
    specs = program.exported.graph_signature.output_specs
    pairs = zip(specs, results, strict=True)  # type: ignore[arg-type]
    return next(v for s, v in pairs if s.kind == OutputKind.USER_OUTPUT and isinstance(v, Node))


def _size(node: Node) -> int:
    """Elements of a value, with symbolic sizes as in the example that was exported."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    size = 1
    for s in value.shape:
        size *= s if isinstance(s, int) else int(s.node.hint)
    return size


def _user_inputs(program: Program) -> dict[str, int]:
    names = [s.arg.name for s in program.exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    return {name: i for i, name in enumerate(names)}


def _states(program: Program) -> dict[str, Node]:
    """The caches: weights that a call writes, by name, with their placeholders."""
    written = {s.target for s in program.exported.graph_signature.output_specs if s.kind == OutputKind.BUFFER_MUTATION}
    found = {}
    for node in program.graph.nodes:
        name = program.weight_of(node)
        if name is not None and (name in written or program.roles.get(name) == Role.CACHE):
            found[name] = node
    return found


def _mutations(program: Program) -> dict[Node, list[str]]:
    """The nodes whose value is the new content of a cache."""
    output = next(reversed(program.graph.nodes))
    found: dict[Node, list[str]] = {}
    specs = program.exported.graph_signature.output_specs
    for spec, value in zip(specs, output.args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind == OutputKind.BUFFER_MUTATION and isinstance(value, Node) and isinstance(spec.arg, TensorArgument):
            found.setdefault(value, []).append(str(spec.target))
    return found


def _ancestors(nodes: Collection[Node]) -> set[Node]:
    """What must be computed to know the operands of `nodes`."""
    found: set[Node] = set()
    stack = [n for node in nodes for n in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _position_only(program: Program, states: Collection[str]) -> set[Node]:
    """Nodes that read no learned weight and no cache: masks, rotary tables, sizes."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = program.weight_of(node)
            if name is None or (name not in states and program.roles.get(name) == Role.CONSTANT):
                found.add(node)
        elif node.op == "call_function" and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
