"""Latent attention in its absorbed form: caches of latents in place of every head's keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from moec.compiler.ops import HeadLinear, LatentAttention
from moec.compiler.pipeline import Pass, run_passes
from moec.compiler.program import Program, Stage
from moec.compiler.states import Appended
from moec.passes.absorb_latents import absorb_latents
from moec.passes.fuse_attention import fuse_attention
from tests.harness import CONTEXT, check_equal, check_refused, replace_steps
from tests.passes.attention_zoo import export_residual
from tests.passes.moe_zoo import Linear, parameter

D, HEADS, LATENT, PART, ROTATED, VALUE = 10, 4, 32, 6, 16, 5
WIDTH = PART + ROTATED


class Attention(nn.Module):
    """Latents and one head of rotated keys are cached; keys and values of all heads are made of them at every call."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, latent: int = LATENT, rotated: int = ROTATED, **steps: Callable[..., Any]) -> None:
        super().__init__()
        self.latent, self.rotated, self.width = latent, rotated, PART + rotated
        self.q, self.a, self.pe = Linear(D, HEADS * self.width), Linear(D, latent), Linear(D, rotated)
        self.b, self.o = Linear(latent, HEADS * (PART + VALUE)), Linear(HEADS * VALUE, D)
        self.again = Linear(latent, HEADS * VALUE)
        self.bias, self.factor = parameter(HEADS * (PART + VALUE)), parameter(self.width)
        self.sinks = parameter(HEADS)
        self.register_buffer("k_cache", torch.zeros(1, 1, CONTEXT, latent))
        self.register_buffer("v_cache", torch.zeros(1, 1, CONTEXT, rotated))
        replace_steps(self, steps)

    def mask(self, positions: Tensor) -> Tensor:
        return torch.arange(CONTEXT) <= positions.unsqueeze(1)

    def heads(self, latents: Tensor) -> Tensor:
        return self.b(latents)  # type: ignore[no-any-return]

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.heads(latents).view(1, CONTEXT, HEADS, PART + VALUE).transpose(1, 2)
        part, values = heads.split([PART, VALUE], -1)
        return part, values

    def join(self, part: Tensor, rotated: Tensor) -> Tensor:
        return torch.cat((part, rotated.expand(-1, HEADS, -1, -1)), -1)

    def queries(self, x: Tensor) -> Tensor:
        return self.q(x).view(1, -1, HEADS, self.width).transpose(1, 2)  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        positions = start + torch.arange(x.shape[1])
        q = self.queries(x)
        self.k_cache.index_copy_(2, positions, self.a(x).unsqueeze(1))
        self.v_cache.index_copy_(2, positions, self.pe(x).unsqueeze(1))
        part, values = self.expand(self.k_cache)
        keys = self.join(part, self.v_cache)
        y = self.attend(q, keys, values, self.mask(positions))
        return self.o(y.transpose(1, 2).reshape(1, -1, HEADS * VALUE))  # type: ignore[no-any-return]


class Expanded(Attention):
    """The same with a cache of keys and values, as most implementations have it."""

    def __init__(self, **steps: Callable[..., Any]) -> None:
        super().__init__(**steps)
        self.register_buffer("k_cache", torch.zeros(1, HEADS, CONTEXT, WIDTH))
        self.register_buffer("v_cache", torch.zeros(1, HEADS, CONTEXT, VALUE))

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        positions = start + torch.arange(x.shape[1])
        heads = self.heads(self.a(x)).view(1, -1, HEADS, PART + VALUE).transpose(1, 2)
        part, values = heads.split([PART, VALUE], -1)
        rotated = self.pe(x).view(1, 1, -1, ROTATED)
        self.k_cache.index_copy_(2, positions, torch.cat((part, rotated.expand(-1, HEADS, -1, -1)), -1))
        self.v_cache.index_copy_(2, positions, values)
        y = self.attend(self.queries(x), self.k_cache, self.v_cache, self.mask(positions))
        return self.o(y.transpose(1, 2).reshape(1, -1, HEADS * VALUE))  # type: ignore[no-any-return]


def program(form: type[Attention] = Attention, **changes: Any) -> Program:
    return export_residual(lambda: form(**changes), D)


def both() -> Pass:
    """The rule behind the one that makes attention of the graph."""
    fused = fuse_attention()
    absorb = absorb_latents()
    return Pass(absorb.name, lambda p: absorb.run(run_passes(p, [fused])), needs=Stage.CANONICAL, gives=Stage.FUSED)


def _filled(self: Attention, part: Tensor, rotated: Tensor) -> Tensor:
    """As DeepSeek's first release joins them."""
    keys = part.new_empty(1, HEADS, CONTEXT, WIDTH)
    keys[..., :PART] = part
    keys[..., PART:] = rotated
    return keys


def _rotated_first(self: Attention, part: Tensor, rotated: Tensor) -> Tensor:
    return torch.cat((rotated.expand(-1, HEADS, -1, -1), part), -1)


def _by_slices(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    heads = self.b(latents).reshape(CONTEXT, HEADS, PART + VALUE).permute(1, 0, 2).unsqueeze(0)
    return heads[..., :PART], heads[..., PART:]


def _values_first(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    heads = self.heads(latents).view(1, CONTEXT, HEADS, PART + VALUE).transpose(1, 2)
    return heads[..., VALUE:], heads[..., :VALUE]


def _overlapping(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Values that are features of the key as well: strange, and the same computation."""
    heads = self.heads(latents).view(1, CONTEXT, HEADS, PART + VALUE).transpose(1, 2)
    return heads[..., :PART], heads[..., 2 : 2 + VALUE]


def _joined_queries(self: Attention, x: Tensor) -> Tensor:
    part, rotated = Attention.queries(self, x).split([PART, ROTATED], -1)
    return torch.cat((part * 2.0, rotated * 0.5), -1)


def _window(self: Attention, positions: Tensor) -> Tensor:
    j, p = torch.arange(CONTEXT), positions.unsqueeze(1)
    return (j <= p) & (j > p - 4)


ABSORBED: dict[str, dict[str, Any]] = {
    "latents are cached": {},
    "keys and values are cached": {"form": Expanded},
    "filled part by part": {"join": _filled},
    "rotated part first": {"join": _rotated_first},
    "cut by slices": {"expand": _by_slices},
    "values before keys": {"expand": _values_first},
    "values and keys overlap": {"expand": _overlapping},
    "queries are joined, too": {"queries": _joined_queries},
    "window": {"mask": _window},
}


@pytest.mark.parametrize("name", ABSORBED)
def test_absorbed(name: str) -> None:
    before = program(**ABSORBED[name])
    result = both().run(before)
    assert result.changed == 1
    assert not result.refusals
    after = result.program
    check_equal(before, after)
    nodes = [n for n in after.graph.nodes if n.op == "call_function"]
    (call,) = (c for n in nodes if (c := LatentAttention[Node].find(n)) is not None)
    products = [c for n in nodes if (c := HeadLinear[Node].find(n)) is not None]
    assert [p.transposed for p in products] == [True, False]
    assert call.window == (4 if name == "window" else 0)
    assert "cached_attention" not in after.text()
    assert "@attention.b.weight)" not in after.text(), "latents are still expanded"
    assert [s.shape[2:] for s in after.states.values()] == [(1, LATENT), (1, ROTATED)]
    assert all(isinstance(s.update, Appended) and s.tensors(7)[0].shape[1] == 7 for s in after.states.values())


def _biased(self: Attention, latents: Tensor) -> Tensor:
    return F.linear(latents, self.b.weight, self.bias)


def _with_sink(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * WIDTH**-0.5
    scores = scores + torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    sinks = self.sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], -1)
    joined = torch.cat((scores, sinks), -1)
    weights = F.softmax(joined - joined.max(-1, keepdim=True).values, dim=-1, dtype=scores.dtype)
    return torch.matmul(weights[..., :-1], v)


def _computed(self: Attention, latents: Tensor) -> Tensor:
    return F.linear(latents, self.b.weight * 2.0)


# attention over latents that the operator does not compute: each is said
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a bias": ({"heads": _biased}, "has a bias"),
    "a computed weight": ({"form": Expanded, "heads": _computed}, "no weight"),
    "sinks": ({"form": Expanded, "attend": _with_sink}, "sinks"),
    "a rank that fills no register": ({"latent": 24}, "multiples of 16"),
    "a rotated part that fills none": ({"rotated": 8}, "multiples of 16"),
    "latents larger than what they make": ({"latent": 112}, "no smaller"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changes, reason = REFUSED[name]
    fused = run_passes(program(**changes), [fuse_attention()])
    assert "cached_attention" in fused.text(), "another rule refuses it"
    check_refused(absorb_latents(), fused, reason)


def _values_elsewhere(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    part, _ = Attention.expand(self, latents)
    return part, self.again(latents).view(1, CONTEXT, HEADS, VALUE).transpose(1, 2)


def _rotated_by_head(self: Attention, part: Tensor, rotated: Tensor) -> Tensor:
    """The second part differs by head."""
    return torch.cat((part, part[..., :1] * rotated), -1)


def _scaled(self: Attention, part: Tensor, rotated: Tensor) -> Tensor:
    return Attention.join(self, part, rotated) * self.factor


def _heads_mixed(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Features lie between heads: feature h of head i, not the other way round."""
    heads = self.heads(latents).view(1, CONTEXT, PART + VALUE, HEADS).permute(0, 3, 1, 2)
    part, values = heads.split([PART, VALUE], -1)
    return part, values


def _heads_turned(self: Attention, latents: Tensor) -> tuple[Tensor, Tensor]:
    part, values = Attention.expand(self, latents)
    return part, values.flip(1)


OTHERS: dict[str, dict[str, Any]] = {
    "values by another weight": {"expand": _values_elsewhere},
    "a second part of each head": {"join": _rotated_by_head},
    "keys are scaled": {"join": _scaled},
    "features between heads": {"expand": _heads_mixed},
    "heads in another order": {"expand": _heads_turned},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_attention_stays(name: str) -> None:
    """What is not of this form is no latent attention to this rule, and computes what it did."""
    before = program(**OTHERS[name])
    fused = fuse_attention().run(before).program
    result = absorb_latents().run(fused)
    assert result.changed == 0
    assert result.program is fused
    check_equal(before, fused)
