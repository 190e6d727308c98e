"""Runs a Program's graph with its real weights, node by node: the numbers behind every check of a graph.

Weights are loaded when a node reads them and kept while they fit a budget; values live from their definition to their
last use. So a graph whose weights exceed memory runs, slowly.

T tokens of one call, V vocabulary.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx import Node

from moec.compiler.program import LazyWeight, Program

Observer = Callable[[Node, tuple[Any, ...], Any], None]
Override = Callable[..., Any]

_KEEP_BYTES = 6 << 30


class WeightCache:
    """Loaded weights, the least recently used dropped first. Programs share weights, so their runners share a cache.

    A weight larger than `limit` bytes is never kept.
    """

    def __init__(self, limit: int = _KEEP_BYTES) -> None:
        self._limit, self._bytes = limit, 0
        # the weight is held beside its tensor, so that its identity is not given to another one
        self._held: OrderedDict[int, tuple[LazyWeight, torch.Tensor]] = OrderedDict()

    def load(self, weight: LazyWeight) -> torch.Tensor:
        key = id(weight)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][1]
        tensor = weight.load()
        size = tensor.numel() * tensor.element_size()
        if size > self._limit:
            return tensor
        self._held[key] = (weight, tensor)
        self._bytes += size
        while self._bytes > self._limit:
            _, (_, dropped) = self._held.popitem(last=False)
            self._bytes -= dropped.numel() * dropped.element_size()
        return tensor


class GraphRunner:
    """A program as a function of token ids, with the state (KV cache) that it writes.

    `overrides` replaces the implementation of operators. `cache` keeps loaded weights between calls and runners.
    """

    def __init__(
        self,
        program: Program,
        *,
        overrides: Mapping[Any, Override] | None = None,
        cache: WeightCache | None = None,
    ) -> None:
        self.program = program
        self._overrides = dict(overrides or {})
        self._cache = cache or WeightCache()
        self.state: dict[str, torch.Tensor] = {}
        self._sources = self._input_sources()
        self._dead_after = _dead_after(program)
        self._states = program.state_tensors()
        self.reset()

    def reset(self) -> None:
        """Forget what earlier calls wrote: every cache as it was loaded."""
        self.state = {name: w.load().clone() for name, w in self.program.weights.items() if self._is_state(name)}

    def __call__(self, tokens: Sequence[int], start_pos: int, observe: Observer | None = None) -> torch.Tensor:
        """Logits float32 [T, V] of `tokens` at positions start_pos...; `observe(node, args, value)` sees every call."""
        inputs = [torch.tensor([list(tokens)], dtype=torch.int64), torch.tensor([start_pos], dtype=torch.int64)]
        values: dict[Node, Any] = {}
        with torch.no_grad():
            for node in self.program.graph.nodes:
                if node.op == "output":
                    return self._finish(node, values)
                if node.op != "placeholder":
                    self._call(node, values, inputs, observe)
                    for dead in self._dead_after.get(node, ()):
                        values.pop(dead, None)
        raise AssertionError("a graph without output")

    def value_of(self, node: Node, inputs: Sequence[torch.Tensor] = ()) -> Any:
        """The value of a placeholder: a weight (loaded), the state, or one of the user inputs."""
        kind, key = self._sources[node.name]
        if kind == "input":
            return inputs[key]
        if kind == "constant":
            return self.program.exported.constants[key]
        return self.state[key] if key in self.state else self._cache.load(self.program.weights[key])

    def _call(
        self, node: Node, values: dict[Node, Any], inputs: Sequence[torch.Tensor], observe: Observer | None
    ) -> None:
        if node.op == "get_attr":  # the body of a scan
            values[node] = operator.attrgetter(str(node.target))(self.program.exported.graph_module)
            return
        if node.op != "call_function":
            raise AssertionError(f"cannot run {node.op} node {node.name}")

        def resolve(n: Node) -> Any:
            # read when used, so that a weight is in memory only then
            return self.value_of(n, inputs) if n.op == "placeholder" else values[n]

        args = torch.fx.map_arg(node.args, resolve)
        kwargs = torch.fx.map_arg(node.kwargs, resolve)
        target: Callable[..., Any] = self._overrides.get(node.target, node.target)
        value = target(*args, **kwargs)
        values[node] = value
        if observe is not None:
            observe(node, args, value)

    def _finish(self, output: Node, values: dict[Node, Any]) -> torch.Tensor:
        logits = None
        results = output.args[0]
        assert isinstance(results, (tuple, list))
        for spec, result in zip(self.program.exported.graph_signature.output_specs, results, strict=True):
            if not isinstance(result, Node):
                continue
            value = values[result] if result in values else self.value_of(result)
            if spec.kind == OutputKind.BUFFER_MUTATION:
                assert spec.target is not None
                self.state[spec.target] = value
            elif spec.kind == OutputKind.USER_OUTPUT and logits is None:
                logits = value
        assert logits is not None, "a graph without a user output"
        return logits.flatten(0, -2).to(torch.float32)

    def _is_state(self, name: str) -> bool:
        return name in self._states

    def _input_sources(self) -> dict[str, tuple[str, Any]]:
        """Placeholder name -> ("weight", name), ("constant", name) or ("input", index)."""
        sources: dict[str, tuple[str, Any]] = {}
        user = 0
        for spec in self.program.exported.graph_signature.input_specs:
            name = spec.arg.name if isinstance(spec.arg, TensorArgument) else getattr(spec.arg, "name", "")
            if spec.kind == InputKind.USER_INPUT:
                sources[name] = ("input", user)
                user += 1
            elif spec.target in self.program.weights:
                sources[name] = ("weight", spec.target)
            else:
                sources[name] = ("constant", spec.target)
        return sources


def _dead_after(program: Program) -> dict[Node, list[Node]]:
    """For each node, the values nobody reads after it."""
    last: dict[Node, Node] = {}
    for node in program.graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
        last.setdefault(node, node)
    dead: dict[Node, list[Node]] = {}
    for node, user in last.items():
        dead.setdefault(user, []).append(node)
    return dead
