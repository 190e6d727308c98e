"""What the tests of attention rules share: a model around one attention layer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Program, Role
from tests.harness import VOCABULARY, export_toy
from tests.passes.moe_zoo import parameter


class Residual(nn.Module):
    """x_TD + attention(x_TD, start_pos), x_TD being rows of a table."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.embed = parameter(VOCABULARY, width)
        self.attention = attention

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embed)
        return x + self.attention(x, start_pos)


def export_residual(attention: Callable[[], nn.Module], width: int) -> Program:
    return export_toy(lambda: Residual(attention(), width), {"embed": Role.EMBEDDING})
