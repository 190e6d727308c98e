"""Shared experts of width 0 go; one of width 1, and a sum that widens its operand, stay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.passes.drop_empty import drop_empty
from tests.harness import VOCABULARY, check_rule, export_toy, run

D = 8


class Shared(nn.Module):
    """embed -> h + sigmoid(gate h) * down(silu(up h)) -> head."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY, bias=False)
        self.up, self.down = nn.Linear(D, width, bias=False), nn.Linear(width, D, bias=False)
        self.gate, self.first = nn.Linear(D, 1, bias=False), first

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        h = self.embed(tokens)
        shared = torch.sigmoid(self.gate(h)) * self.down(F.silu(self.up(h))).reshape(h.shape)
        return self.head(shared + h if self.first else h + shared)


class Widened(Shared):
    """The sum has the shape of nothing's result, not of its other operand: a zero that must stay."""

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        h = self.embed(tokens)
        return self.head(h[..., :1] + self.down(F.silu(self.up(h))))


def test_a_shared_expert_of_no_width_goes() -> None:
    for first in (False, True):
        after = check_rule(drop_empty(), export_toy(lambda first=first: Shared(0, first)), count=1)
        assert not {"up.weight", "down.weight", "gate.weight"} & set(after.weights)


def test_what_must_stay() -> None:
    for build in (lambda: Shared(1, False), lambda: Widened(0, False), lambda: Shared(3, True)):
        program = export_toy(build)
        assert run(drop_empty(), program).changed == 0
