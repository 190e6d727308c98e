"""One MoE block in many spellings: every step is a method, and a variant replaces some of them.

N tokens, D model width, E experts, K experts per token, F expert width, S shared width; all sizes differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Program, Role
from tests.harness import VOCABULARY, export_toy, replace_steps

D, FF, S = 12, 7, 10
ROLES = {
    "w13": Role.EXPERT,
    "w2": Role.EXPERT,
    "router": Role.ROUTER,
    "router_bias": Role.ROUTER,
    "bias": Role.ROUTER,
    "gate_proj.weight": Role.SHARED,
    "up_proj.weight": Role.SHARED,
    "down_proj.weight": Role.SHARED,
    "shared_gate.weight": Role.SHARED,
}


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """`names.like.checkpoints.weight`, for the rules that stack two of them."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = parameter(width_out, width_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Block(nn.Module):
    """MobileMoE's block: sigmoid scores, a selection bias, normalised weights, einsum over gathered experts."""

    def __init__(self, experts: int = 5, top_k: int = 2, shared: bool = True, **steps: Callable[..., Any]) -> None:
        super().__init__()
        self.count, self.top_k = experts, top_k
        self.router = parameter(experts, D)
        self.router_bias = parameter(experts)
        self.bias = parameter(experts)
        self.w13 = parameter(experts, D, 2 * FF)
        self.w2 = parameter(experts, FF, D)
        self.gate_proj, self.up_proj, self.down_proj = Linear(D, S), Linear(D, S), Linear(S, D)
        self.shared_gate = Linear(D, 1)
        self.with_shared = shared
        replace_steps(self, steps)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.router)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def choice(self, scores: Tensor) -> Tensor:
        return scores + self.bias

    def select(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = choice.topk(self.top_k, dim=-1)
        return values, indices

    def weigh(self, scores: Tensor, choice: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        weights = scores.gather(-1, indices)
        return weights / weights.sum(-1, keepdim=True) * 2.5

    def up(self, x: Tensor, indices: Tensor) -> Tensor:
        return torch.einsum("td,tkdf->tkf", x, self.w13[indices])

    def activate(self, joined: Tensor) -> Tensor:
        gate, up = joined.chunk(2, -1)
        return F.silu(gate) * up

    def down(self, hidden: Tensor, indices: Tensor) -> Tensor:
        return torch.einsum("tkf,tkfd->tkd", hidden, self.w2[indices])

    def experts(self, x: Tensor, indices: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x, indices)), indices)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        return (y * weights.unsqueeze(-1)).sum(1)

    def shared(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def join(self, y: Tensor, shared: Tensor, x: Tensor) -> Tensor:
        return y + shared

    def extra(self, h: Tensor, seen: dict[str, Tensor]) -> Tensor:
        """What else the model does with the block's inner values."""
        return h

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.logits(x)
        scores = self.scores(logits)
        choice = self.choice(scores)
        values, indices = self.select(choice)
        weights = self.weigh(scores, choice, values, indices)
        y = self.combine(self.experts(x, indices), weights)
        seen = {"logits": logits, "scores": scores, "indices": indices, "weights": weights, "y": y}
        return (self.join(y, self.shared(x), x) if self.with_shared else y), seen


class Toy(nn.Module):
    """Embedding, blocks side by side with their residual, head."""

    def __init__(self, blocks: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.embed, self.head = parameter(VOCABULARY, D), parameter(VOCABULARY, D)
        self.blocks = nn.ModuleDict({name: Block(**options) for name, options in blocks.items()})

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        h = total = F.embedding(tokens, self.embed)
        for block in self.blocks.values():
            y, seen = block(h.flatten(0, 1))
            total = block.extra(total + y.view_as(h), seen)  # type: ignore[operator]
        return F.linear(total, self.head)


def zoo(blocks: Mapping[str, Mapping[str, Any]]) -> Program:
    """The canonical program of named blocks that all read the same tokens; options are those of `Block`."""
    roles = {f"blocks.{block}.{name}": role for block in blocks for name, role in ROLES.items()}
    return export_toy(lambda: Toy(blocks), {**roles, "embed": Role.EMBEDDING, "head": Role.HEAD})


def program(**options: Any) -> Program:
    """The canonical program of one block, called `moe`."""
    return zoo({"moe": options})
