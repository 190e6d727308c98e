"""A legal Program as a pure function, exported again: weights and caches are arguments, new caches are results.

    forward(weights..., caches..., tokens int64 [1, T], start_pos int64 [1])
        -> logits float32 [1, T, V], caches..., then for each MoE layer x, indices, weights, y  (the expansion only)

T is dynamic in [1, max_tokens]. Nothing is loaded: arguments are fake tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.export import EXAMPLE_TOKENS
from moec.compiler.ops import find_call
from moec.compiler.program import Program, module_path
from moec.targets.mlir.expand import ATTENTION, PLAIN, ROUTED, Tap
from moec.targets.mlir.written_states import functional

TAPS = ("x", "indices", "weights", "y")


@dataclass(frozen=True)
class Signature:
    """Argument order: `weights`, `caches`, tokens, start_pos. Result order: logits, `caches`, four a MoE layer."""

    weights: tuple[str, ...]
    caches: tuple[str, ...]
    moe_layers: int


def signature_of(program: Program) -> Signature:
    """Caches are what attention operators write, and what the graph itself returns as a buffer's new content."""
    outputs = program.exported.graph_signature.output_specs
    caches: list[str] = [str(s.target) for s in outputs if s.kind == OutputKind.BUFFER_MUTATION]
    layers = 0
    for node in program.graph.nodes:
        call = find_call(node)
        layers += type(call) in ROUTED
        for cache in () if call is None else call.written().values():
            name = program.weight_of(cache)
            if name is None or name in caches:
                raise CompileError(f"{node.name} does not own its cache", place=module_path(node) or program.info.name)
            caches.append(name)
    weights = [str(s.target) for s in program.exported.graph_signature.input_specs if s.kind != InputKind.USER_INPUT]
    return Signature(tuple(n for n in weights if n not in caches), tuple(caches), layers)


class _Functional(torch.fx.Interpreter):
    """Runs a program's graph with its operators replaced. `caches` and `taps` collect what the calls leave."""

    def __init__(self, program: Program, *, expand: bool) -> None:
        super().__init__(program.exported.graph_module)
        self._expand = expand
        self.taps: list[Tap] = []
        self.caches: dict[str, Tensor] = {}
        self._program = program

    def run_node(self, n: Node) -> Any:
        call = find_call(n)
        if call is None:
            return super().run_node(n)
        given, kind = call.map(lambda operand: self.env[operand]), type(call)
        if kind in ATTENTION:
            results = ATTENTION[kind](given) if self._expand else functional(given)(*given.arguments())
            names = [str(self._program.weight_of(cache)) for cache in call.written().values()]
            self.caches.update(zip(names, results[1:], strict=True))
            return results[0]
        if self._expand and kind in ROUTED:
            y, tap = ROUTED[kind](given)
            self.taps.append(tap)
            return y
        if self._expand and kind in PLAIN:
            return PLAIN[kind](given)
        return super().run_node(n)


class _Model(nn.Module):
    def __init__(self, program: Program, signature: Signature, *, expand: bool) -> None:
        super().__init__()
        self._how: Callable[[], _Functional] = lambda: _Functional(program, expand=expand)
        self._inputs = list(program.exported.graph_signature.input_specs)
        self._outputs = list(program.exported.graph_signature.output_specs)
        self._signature = signature

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        names = (*self._signature.weights, *self._signature.caches)
        by_name = dict(zip(names, given[: len(names)], strict=True))
        user = iter(given[len(names) :])
        values = [next(user) if s.kind == InputKind.USER_INPUT else by_name[str(s.target)] for s in self._inputs]
        runner = self._how()
        results = runner.run(*values)
        for spec, result in zip(self._outputs, results, strict=True):
            if spec.kind == OutputKind.BUFFER_MUTATION:
                runner.caches[str(spec.target)] = result
        logits = next(r for s, r in zip(self._outputs, results, strict=True) if s.kind == OutputKind.USER_OUTPUT)
        taps = [getattr(tap, field) for tap in runner.taps for field in TAPS]
        return logits, *(runner.caches[name] for name in self._signature.caches), *taps


def exported(program: Program, signature: Signature, *, expand: bool) -> ExportedProgram:
    """The function, with our operators expanded to ATen (`expand`) or kept."""
    limit = program.info.max_tokens
    weights = program.weights
    mode = torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        arguments = [
            torch.empty(weights[name].shape, dtype=weights[name].dtype)
            for name in (*signature.weights, *signature.caches)
        ]
        tokens = torch.zeros(1, min(EXAMPLE_TOKENS, limit), dtype=torch.int64)
        arguments += [tokens, torch.zeros(1, dtype=torch.int64)]
    count = len(arguments)
    dynamic: list[Any] = [None] * count
    if limit > 1:
        dynamic[count - 2] = {1: torch.export.Dim("T", min=1, max=limit)}
    module = _Model(program, signature, expand=expand)
    with torch.no_grad():
        return torch.export.export(module, tuple(arguments), dynamic_shapes=(tuple(dynamic),), strict=False)


def operators_of(program: ExportedProgram) -> list[str]:
    """Every operator that a graph calls, by name."""
    targets = {n.target for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem}
    return sorted(str(t) for t in targets)
