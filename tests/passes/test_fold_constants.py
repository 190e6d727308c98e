"""Numbers that a graph computes from nothing become constants; what depends on tokens, weights or chance stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moec.compiler.program import Role
from moec.passes.fold_constants import fold_constants
from tests.harness import VOCABULARY, check_rule, export_toy, run

D = 8


class Toy(nn.Module):
    """embed -> h times a factor of the positions -> head."""

    def __init__(self, factor: Callable[[Toy, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY, bias=False)
        self._factor = factor

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        positions = (start_pos + torch.arange(tokens.shape[1])).float()
        h = self.embed(tokens)
        return self.head(h * self._factor(self, positions, h))


def _frequencies(base: float) -> Tensor:
    return 1.0 / base ** (torch.arange(0, 2 * D, 2, dtype=torch.float) / (2 * D))


def _rotated(s: Toy, positions: Tensor, h: Tensor) -> Tensor:
    return (positions[:, None] * _frequencies(1e4)).cos()


def _two(s: Toy, positions: Tensor, h: Tensor) -> Tensor:
    """Two constants, of which the second is the first's reader too."""
    first = _frequencies(100.0)
    return (positions[:, None] * first).cos() + first.view(2, 4).exp().reshape(D)


def test_frequencies() -> None:
    for factor, count in ((_rotated, 1), (_two, 2)):
        after = check_rule(fold_constants(), export_toy(lambda factor=factor: Toy(factor)), count=count)
        names = [name for name, role in after.roles.items() if name.startswith("constant_") and role is Role.CONSTANT]
        assert len(names) == count
        assert torch.equal(after.weights[names[0]].load(), _frequencies(1e4 if count == 1 else 100.0))
        assert "aten.pow" not in after.text()


def test_what_stays() -> None:
    """Fills and counts, sizes of a call, positions, weights, random numbers, and what is too large."""
    stay: tuple[Callable[[Toy, Tensor, Tensor], Tensor], ...] = (
        lambda s, p, h: torch.full((D,), 0.5),
        lambda s, p, h: torch.arange(D, dtype=torch.float),
        lambda s, p, h: (torch.arange(h.shape[1], dtype=torch.float) / 3)[:, None],
        lambda s, p, h: p[:, None] ** 0.5,
        lambda s, p, h: s.embed.weight[0].exp(),
        lambda s, p, h: torch.arange(1 << 17, dtype=torch.float).exp().sum() + 1,
    )
    for factor in stay:
        assert run(fold_constants(), export_toy(lambda factor=factor: Toy(factor))).changed == 0
    random = export_toy(lambda: Toy(lambda s, p, h: torch.rand(D) * 2))
    assert run(fold_constants(), random).changed == 0
