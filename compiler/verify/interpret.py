"""Runs a Program's graph with its real weights, node by node: the numbers behind every check of a graph.

Weights are loaded when a node first reads them and dropped after the last, unless they fit the budget; values live from
their definition to their last use. So a graph whose weights exceed memory runs, slowly.

T tokens of one call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx import Node

from moec.compiler.program import Program, Role

Observer = Callable[[Node, tuple[Any, ...], Any], None]
Override = Callable[..., Any]

_KEEP_BYTES = 2 << 30


class GraphRunner:
    """A program as a function of token ids, with the state (KV cache) that it writes.

    `overrides` replaces the implementation of operators. `keep_bytes` is how much of the weights may stay loaded
    between calls.
    """

    def __init__(
        self,
        program: Program,
        *,
        overrides: Mapping[Any, Override] | None = None,
        keep_bytes: int = _KEEP_BYTES,
    ) -> None:
        self.program = program
        self._overrides = dict(overrides or {})
        self._keep_bytes, self._kept_bytes = keep_bytes, 0
        self._kept: dict[str, torch.Tensor] = {}
        self.state: dict[str, torch.Tensor] = {}
        self._sources = self._input_sources()
        self._dead_after = _dead_after(program)
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
        return self.state[key] if key in self.state else self._weight(key)

    def _call(
        self, node: Node, values: dict[Node, Any], inputs: Sequence[torch.Tensor], observe: Observer | None
    ) -> None:
        if node.op != "call_function":
            raise AssertionError(f"cannot run {node.op} node {node.name}")

        def resolve(n: Node) -> Any:
            # read when used, so that a weight is in memory only then
            return self.value_of(n, inputs) if n.op == "placeholder" else values[n]

        args = torch.fx.map_arg(node.args, resolve)
        kwargs = torch.fx.map_arg(node.kwargs, resolve)
        target: Callable[..., Any] = self._overrides.get(node.target, node.target)  # type: ignore[assignment]
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

    def _weight(self, name: str) -> torch.Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = self.program.weights[name].load()
        size = tensor.numel() * tensor.element_size()
        if self._kept_bytes + size <= self._keep_bytes:
            self._kept[name] = tensor
            self._kept_bytes += size
        return tensor

    def _is_state(self, name: str) -> bool:
        return self.program.roles.get(name) == Role.CACHE or any(
            s.kind == OutputKind.BUFFER_MUTATION and s.target == name
            for s in self.program.exported.graph_signature.output_specs
        )

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
