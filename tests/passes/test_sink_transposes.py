"""sink_transposes: turns of tokens and channels cancel through pointwise operators and stay before others."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from moec.passes.sink_transposes import sink_transposes
from tests.harness import VOCABULARY, check_rule, export_toy, run
from tests.passes.moe_zoo import Linear, parameter

D = 6


class Toy(nn.Module):
    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.up, self.inner = parameter(VOCABULARY, D), Linear(D, 3 * D), inner

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        x = F.embedding(tokens, self.table)
        return F.linear(x + self.inner(self.up(x)), self.table) + 0.0 * start


def _gated(x: Tensor) -> Tensor:
    a, b, c = x.transpose(1, 2).chunk(3, 1)
    return (F.silu(a) * b + 0.5 * c).transpose(-1, -2)


def _turned_alone(x: Tensor) -> Tensor:
    """One operand is turned, a weight of the channels is not: nothing cancels."""
    a, b, _ = x.chunk(3, -1)
    return (a.transpose(1, 2) * b.mean((0, 1))[:, None]).transpose(1, 2)


def _softmax(x: Tensor) -> Tensor:
    """Over the channels, or over the tokens: the rule does not look into it."""
    return x[..., :D].transpose(1, 2).softmax(-1).transpose(1, 2)


def test_they_cancel() -> None:
    after = check_rule(sink_transposes(), export_toy(lambda: Toy(_gated)), count=6)
    assert "aten.transpose.int" not in after.text()


def test_what_is_turned_for_a_reason_stays() -> None:
    program = export_toy(lambda: Toy(_softmax))
    assert run(sink_transposes(), program).changed == 0


def test_one_operand_that_is_not_turned_keeps_the_other_as_it_is() -> None:
    assert run(sink_transposes(), export_toy(lambda: Toy(_turned_alone))).changed == 0
