"""canonicalize: what computes nothing goes, what computes something stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Stage
from moec.passes.canonicalize import canonicalize
from tests.harness import MAX_TOKENS, VOCABULARY, check_golden, check_rule, export_toy
from tests.passes.moe_zoo import parameter

D = 6


class Toy(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = parameter(VOCABULARY, D)
        self.step = step

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return self.step(F.embedding(tokens, self.embed)) + 1.0


NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "to_float": lambda x: x.to(torch.float32),
    "float_to_float": lambda x: x.to(torch.float32, copy=True),
    "dropout_in_eval": lambda x: F.dropout(x, 0.5, training=False),
    "detach": lambda x: x.detach(),
    "view_as_itself": lambda x: x.view(x.shape),
    "reshape_as_itself": lambda x: x.reshape(1, -1, D),
    "expand_to_itself": lambda x: x.expand(-1, -1, -1),
    "whole_slice": lambda x: x[:, :, 0:D],
}
SOMETHING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cast_and_back": (lambda x: x.to(torch.bfloat16).to(torch.float32), "bfloat16"),
    "part": (lambda x: x[:, :, 1:], "aten.slice"),
    "step": (lambda x: x[:, :, ::2], "aten.slice"),
    "other_shape": (lambda x: x.view(x.shape[1], D), "aten.view"),
    "swapped": (lambda x: x.transpose(0, 1).reshape(1, -1, D), "aten."),
    "flip": (lambda x: x.flip(1), "aten.flip"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_gone(name: str) -> None:
    program = export_toy(lambda: Toy(NOTHING[name]))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target)]
    assert calls == [torch.ops.aten.embedding.default, torch.ops.aten.add.Tensor], program.text()


@pytest.mark.parametrize("name", SOMETHING)
def test_kept(name: str) -> None:
    step, kept = SOMETHING[name]
    program = export_toy(lambda: Toy(step))
    assert kept in program.text()
    check_rule(canonicalize(), program, count=0)


def test_assertions_go_and_the_text_is_stable() -> None:
    def step(x: Tensor) -> Tensor:
        torch._check(x.shape[1] <= MAX_TOKENS)
        return x.relu().clone()

    program = export_toy(lambda: Toy(step))
    assert program.stage is Stage.CANONICAL
    assert "assert" not in program.text()
    check_golden("canonicalize", program.text())
    assert export_toy(lambda: Toy(step)).digest() == program.digest()
