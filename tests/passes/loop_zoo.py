"""MoE blocks that spell their experts out: loops over masks, loops over all tokens, stacks, and lists of modules.

N tokens, D model width, E experts, K experts per token, F expert width; a variant replaces methods of `Loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Program, Role
from tests.harness import VOCABULARY, export_toy, replace_steps
from tests.passes.moe_zoo import Linear, parameter

D, FF = 6, 5


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Linear(D, FF), Linear(D, FF), Linear(FF, D)
        self.up_bias, self.gate_bias, self.down_bias = parameter(FF), parameter(FF), parameter(D)


class Loop(nn.Module):
    """softmax -> topk -> normalise; `dispatch` is the spelling."""

    def __init__(self, experts: int = 3, top_k: int = 2, **steps: Callable[..., Any]) -> None:
        super().__init__()
        self.count, self.top_k = experts, top_k
        self.router = parameter(experts, D)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))
        self.w13, self.w2 = parameter(experts, D, 2 * FF), parameter(experts, FF, D)
        replace_steps(self, steps)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = F.linear(x, self.router).softmax(-1).topk(self.top_k, -1)
        return values / values.sum(-1, keepdim=True), indices

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def activate(self, expert: int, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def mlp(self, expert: int, x: Tensor) -> Tensor:
        e: Any = self.experts[expert]
        return e.down_proj(self.activate(expert, e.gate_proj(x), e.up_proj(x)))

    def order(self) -> list[int]:
        return list(range(self.count))

    def rows(self, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        return x[tokens]

    def weigh(self, expert: int, y: Tensor, weights: Tensor, tokens: Tensor, ranks: Tensor) -> Tensor:
        return y * weights[tokens, ranks, None]

    def selects(self, expert: int, indices: Tensor) -> Tensor:
        return indices == expert

    def add(self, expert: int, y: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        return y.index_add(0, tokens, rows)

    def dispatch(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        y = self.start(x)
        for e in self.order():
            tokens, ranks = torch.where(self.selects(e, indices))
            out = self.mlp(e, self.rows(e, x, tokens))
            y = self.add(e, y, tokens, self.weigh(e, out, weights, tokens, ranks))
        return y

    def extra(self, y: Tensor, indices: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.route(x)
        return self.extra(self.dispatch(x, weights, indices), indices)


class Toy(nn.Module):
    def __init__(self, blocks: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.embed, self.head = parameter(VOCABULARY, D), parameter(VOCABULARY, D)
        self.blocks = nn.ModuleDict({name: Loop(**options) for name, options in blocks.items()})

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        h = total = F.embedding(tokens, self.embed)
        for block in self.blocks.values():
            total = total + block(h.flatten(0, 1)).view_as(h)
        return F.linear(total, self.head)


def zoo(blocks: Mapping[str, Mapping[str, Any]]) -> Program:
    """The canonical program of named blocks that all read the same tokens."""
    return export_toy(lambda: Toy(blocks), {"embed": Role.EMBEDDING, "head": Role.HEAD})


# ------------------------------------------------------------------------------------------------------- the spellings


def mixtral(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """transformers before its stacked experts: one_hot, permute, where, index_add_."""
    y, mask = torch.zeros_like(x), F.one_hot(indices, self.count).permute(2, 1, 0)
    for e in self.order():
        ranks, tokens = torch.where(mask[e])
        out = self.mlp(e, x[None, tokens].reshape(-1, D)) * weights[tokens, ranks, None]
        y.index_add_(0, tokens, out.to(x.dtype))
    return y


def written(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """y[tokens] += rows, tokens from nonzero of any."""
    y = torch.zeros_like(x)
    for e in self.order():
        tokens, ranks = torch.where(indices == e)
        y[tokens] += self.mlp(e, x[tokens]) * weights[tokens, ranks].unsqueeze(-1)
    return y


def scattered(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], self.count).scatter(1, indices, weights)


def dense(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Every expert sees every token; the weights are scattered."""
    by_expert, y = scattered(self, x, weights, indices), 0
    for e in self.order():
        y = y + self.mlp(e, x) * by_expert[:, e : e + 1]
    return y  # type: ignore[return-value]


def dense_sum(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in self.order():
        y += (weights * (indices == e)).sum(-1, keepdim=True) * self.mlp(e, x)
    return y


def dense_one_hot(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    by_expert = (weights.unsqueeze(-1) * F.one_hot(indices, self.count)).sum(1)
    return sum(by_expert[:, e].unsqueeze(-1) * self.mlp(e, x) for e in self.order())  # type: ignore[return-value]


def any_of(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Tokens from any(), weights from the scattered ones."""
    by_expert, y = scattered(self, x, weights, indices), torch.zeros_like(x)
    for e in self.order():
        tokens = (indices == e).any(-1).nonzero().squeeze(-1)
        y = y.index_add(0, tokens, self.mlp(e, x[tokens]) * by_expert[tokens, e].unsqueeze(-1))
    return y


def stacked(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    outputs = torch.stack([self.mlp(e, x) for e in self.order()], 1)
    return (outputs * scattered(self, x, weights, indices).unsqueeze(-1)).sum(1)


def gathered(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    outputs = torch.stack([self.mlp(e, x) for e in self.order()], 1)
    picked = outputs.gather(1, indices.unsqueeze(-1).expand(-1, -1, D))
    return (picked * weights.unsqueeze(-1)).sum(1)
