"""Latent attention: keys and values that are computed from caches row by row are cached in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from moec.compiler.ops import CachedAttention
from moec.compiler.program import Program
from moec.compiler.states import Appended
from moec.passes.fuse_attention import fuse_attention
from tests.harness import CONTEXT, check_refused, check_rule, replace_steps
from tests.passes.attention_zoo import export_residual
from tests.passes.moe_zoo import Linear, parameter

D, HEADS, LATENT, PART, ROTATED, VALUE = 10, 4, 9, 6, 2, 5
WIDTH = PART + ROTATED


class Attention(nn.Module):
    """Latents and one head of rotated keys are cached; keys and values of all heads are made of them at every call."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, **steps: Callable[..., Any]) -> None:
        super().__init__()
        self.q, self.a, self.pe = Linear(D, HEADS * WIDTH), Linear(D, LATENT), Linear(D, ROTATED)
        self.b, self.o = Linear(LATENT, HEADS * (PART + VALUE)), Linear(HEADS * VALUE, D)
        self.factor, self.table = parameter(WIDTH), parameter(1, 1, CONTEXT, WIDTH)
        self.register_buffer("k_cache", torch.zeros(1, 1, CONTEXT, LATENT))
        self.register_buffer("v_cache", torch.zeros(1, 1, CONTEXT, ROTATED))
        replace_steps(self, steps)

    def positions(self, x: Tensor, start: Tensor) -> Tensor:
        return start + torch.arange(x.shape[1])

    def mask(self, positions: Tensor) -> Tensor:
        return torch.arange(CONTEXT) <= positions.unsqueeze(1)

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.b(latents).view(1, CONTEXT, HEADS, PART + VALUE).transpose(1, 2)
        part, values = heads.split([PART, VALUE], -1)
        return part, values

    def join(self, part: Tensor, rotated: Tensor) -> Tensor:
        keys = part.new_empty(1, HEADS, CONTEXT, WIDTH)
        keys[..., :PART] = part
        keys[..., PART:] = rotated
        return keys

    def extra(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        positions = self.positions(x, start)
        q = self.q(x).view(1, -1, HEADS, WIDTH).transpose(1, 2)
        self.k_cache.index_copy_(2, positions, self.a(x).unsqueeze(1))
        self.v_cache.index_copy_(2, positions, self.pe(x).unsqueeze(1))
        part, values = self.expand(self.k_cache)
        keys = self.join(part, self.v_cache)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask(positions))
        return self.extra(self.o(y.transpose(1, 2).reshape(1, -1, HEADS * VALUE)))


def program(**steps: Callable[..., Any]) -> Program:
    return export_residual(lambda: Attention(**steps), D)


def _by_cat(self: Attention, part: Tensor, rotated: Tensor) -> Tensor:
    return torch.cat((part, rotated.expand(-1, HEADS, -1, -1)), -1)


def _scaled(self: Attention, part: Tensor, rotated: Tensor) -> Tensor:
    """By a weight, which is the same for all positions."""
    return -_by_cat(self, part, rotated) * self.factor / 2.0


def _by_permute(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    heads = self.b(latents).reshape(CONTEXT, HEADS, PART + VALUE).permute(1, 0, 2).unsqueeze(0)
    return heads[..., :PART], heads[..., PART:]


def _window(self: Attention, positions: Tensor) -> Tensor:
    j, p = torch.arange(CONTEXT), positions.unsqueeze(1)
    return (j <= p) & (j > p - 4)


@pytest.mark.parametrize(
    "steps",
    [{}, {"join": _by_cat}, {"join": _scaled}, {"expand": _by_permute}, {"mask": _window}],
    ids=["as released", "joined by cat", "scaled", "permuted", "window"],
)
def test_fused(steps: dict[str, Callable[..., Any]]) -> None:
    after = check_rule(fuse_attention(), program(**steps), count=1)
    (call,) = (c for n in after.graph.nodes if (c := CachedAttention[Node].find(n)) is not None)
    shapes = [tuple(c.meta["val"].shape) for c in (call.k_cache, call.v_cache)]
    assert shapes == [(1, CONTEXT, HEADS, WIDTH), (1, CONTEXT, HEADS, VALUE)]
    assert call.window == (4 if "mask" in steps else 0)
    text = after.text()
    assert "index_copy" not in text
    assert text.count("@attention.b.weight)") == 1  # of new rows only, and once for keys and values
    states = after.states
    assert [s.shape[2:] for s in states.values()] == [(HEADS, WIDTH), (HEADS, VALUE)]
    assert all(isinstance(s.update, Appended) and s.tensors(7)[0].shape[1] == 7 for s in states.values())


def _summed(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    part, values = Attention.expand(self, latents)
    return part.cumsum(2), values


def _centred(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    part, values = Attention.expand(self, latents)
    return part - part.mean(2, keepdim=True), values


def _backwards(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    return Attention.expand(self, latents.flip(2))


def _mixed(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    """A reshape that puts features of one position into another."""
    return Attention.expand(self, latents.transpose(2, 3).reshape(1, 1, CONTEXT, LATENT))


def _by_position(self: Attention, part: Tensor, rotated: Tensor) -> Tensor:
    return _by_cat(self, part, rotated) + self.table


def _half_filled(self: Attention, part: Tensor, rotated: Tensor) -> Tensor:
    keys = part.new_zeros(1, HEADS, CONTEXT, WIDTH)
    keys[..., :PART] = part
    return keys + rotated.mean(-1, keepdim=True)


def _reads_again(self: Attention, y: Tensor) -> Tensor:
    return y + self.k_cache.mean()


def _reads_values_again(self: Attention, y: Tensor) -> Tensor:
    return y + self.b(self.k_cache).mean()


def _all_seen(self: Attention, positions: Tensor) -> Tensor:
    return torch.arange(CONTEXT) <= positions.unsqueeze(1) + 1


def _one_later(self: Attention, x: Tensor, start: Tensor) -> Tensor:
    return start + torch.arange(x.shape[1]) + 1


def _of_one_cache(self: Attention, part: Tensor, rotated: Tensor) -> Tensor:
    return torch.cat((part, part[..., :ROTATED]), -1)


REFUSED: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    "sums over positions": ({"expand": _summed}, "not each position by itself"),
    "less the mean over positions": ({"expand": _centred}, "not each position by itself"),
    "positions backwards": ({"expand": _backwards}, "not each position by itself"),
    "positions mixed": ({"expand": _mixed}, "not each position by itself"),
    "a weight of each position": ({"join": _by_position}, "not each position by itself"),
    "filled in part": ({"join": _half_filled}, "not each position by itself"),
    "the latents have another reader": ({"extra": _reads_again}, "another reader than"),
    "what is made of them has another reader": ({"extra": _reads_values_again}, "another reader than"),
    "not causal": ({"mask": _all_seen}, "neither causal nor"),
    "written elsewhere": ({"positions": _one_later}, "not written at start_pos|neither causal"),
    "one cache": ({"join": _of_one_cache}, "from 1 caches, not from two"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    steps, reason = REFUSED[name]
    check_refused(fuse_attention(), program(**steps), reason)
