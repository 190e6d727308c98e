"""Run a Program with torch: the tests' reference for every rewrite. Weights are loaded once; caches live between calls.

It shares nothing with `moec.analysis.verify.interpret`, which is one of the things that tests check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind

import moec.compiler.ops  # noqa: F401  (registers the operators a program may hold)
from moec.compiler.program import Program, Role


class Interpreter:
    """`interpreter(tokens, start_pos) -> logits`. Holds all weights in memory: for small models."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._runner = torch.fx.Interpreter(program.exported.graph_module)
        self._inputs = list(program.exported.graph_signature.input_specs)
        self._outputs = list(program.exported.graph_signature.output_specs)
        self.state: dict[str, Tensor] = {name: weight.load() for name, weight in program.weights.items()}

    def __call__(self, *inputs: Tensor) -> Any:
        """The user outputs (one value, or a tuple); buffers that the graph returns as mutated are written back."""
        given = iter(inputs)
        values = [next(given) if s.kind == InputKind.USER_INPUT else self.state[str(s.target)] for s in self._inputs]
        with torch.no_grad():
            results = self._runner.run(*values)
        user = []
        for spec, value in zip(self._outputs, results, strict=True):
            if spec.kind == OutputKind.BUFFER_MUTATION:
                self.state[str(spec.target)] = value
            else:
                user.append(value)
        return user[0] if len(user) == 1 else tuple(user)

    def reset(self) -> None:
        """Forget the caches."""
        for name, role in self.program.roles.items():
            if role is Role.CACHE:
                self.state[name] = self.program.weights[name].load()
