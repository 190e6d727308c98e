"""Layers with a state in many spellings: a short convolution, a gated delta rule, a selective scan.

T tokens, C channels, K taps; G key heads, H heads, d key width, e value width, n state width; all sizes differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from moec.compiler.program import Program
from tests.harness import VOCABULARY, export_toy, replace_steps
from tests.passes.moe_zoo import Linear, parameter

C, K = 10, 4
G, H, D, E, N = 2, 4, 6, 5, 7


class Toy(nn.Module):
    """Tokens in, logits out; a variant replaces some of its steps."""

    def __init__(self, **steps: Callable[..., Any]) -> None:
        super().__init__()
        self.table = parameter(VOCABULARY, C)
        self.build()
        replace_steps(self, steps)

    def build(self) -> None:
        raise NotImplementedError  # abstract: each model of this file has its own

    def fresh(self, state: Tensor, start: Tensor) -> Tensor:
        return torch.where(start == 0, torch.zeros(()), state)

    def mix(self, x: Tensor, start: Tensor) -> Tensor:
        raise NotImplementedError  # abstract: each model of this file has its own

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        x = F.embedding(tokens, self.table)
        return F.linear(x + self.mix(x, start), self.table)


class Conv(Toy):
    conv_cache: Tensor
    kept = K - 1

    def build(self) -> None:
        self.inner, self.outer = Linear(C, 2 * C), Linear(C, C)
        self.taps, self.bias = parameter(C, 1, K), parameter(C)
        self.register_buffer("conv_cache", torch.zeros(1, C, self.kept))

    def join(self, state: Tensor, x: Tensor) -> Tensor:
        return torch.cat((state, x), -1)

    def keep(self, z: Tensor) -> Tensor:
        return z[..., -self.kept :]

    def convolve(self, z: Tensor) -> Tensor:
        return F.conv1d(z, self.taps, self.bias, groups=C)

    def act(self, y: Tensor) -> Tensor:
        return F.silu(y)

    def mix(self, x: Tensor, start: Tensor) -> Tensor:
        x, gate = self.inner(x).transpose(1, 2).chunk(2, 1)
        z = self.join(self.fresh(self.conv_cache, start), x)
        self.conv_cache.copy_(self.keep(z))
        y = self.act(self.convolve(z))[..., -x.shape[2] :]
        return self.outer((y * gate).transpose(1, 2))


class Delta(Toy):
    state_cache: Tensor

    def build(self) -> None:
        self.q, self.k, self.v = Linear(C, G * D), Linear(C, G * D), Linear(C, H * E)
        self.a, self.b, self.o = Linear(C, H), Linear(C, H), Linear(H * E, C)
        self.register_buffer("state_cache", torch.zeros(1, H, D, E))

    def normal(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def heads(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(H // G, 1)

    def step(self, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.heads(self.normal(q)) * D**-0.5, self.heads(self.normal(k))
        state = state * g.exp()[..., None, None]
        recalled = (state * k[..., None]).sum(-2)
        state = state + k[..., None] * ((v - recalled) * beta[..., None])[..., None, :]
        return state, (state * q[..., None]).sum(-2)

    def decay(self, x: Tensor) -> Tensor:
        return -F.softplus(self.a(x))

    def mix(self, x: Tensor, start: Tensor) -> Tensor:
        q, k = (w(x).unflatten(-1, (G, D)) for w in (self.q, self.k))
        given = (q, k, self.v(x).unflatten(-1, (H, E)), self.decay(x), self.b(x).sigmoid())
        state, y = scan(lambda s, t: self.step(s, *t), self.fresh(self.state_cache, start), given, dim=1)
        self.state_cache.copy_(state)
        return self.o(y.flatten(2))


class Selective(Toy):
    state_cache: Tensor

    def build(self) -> None:
        self.x, self.dt, self.o = Linear(C, H * E), Linear(C, H), Linear(H * E, C)
        self.b, self.c = Linear(C, G * N), Linear(C, G * N)
        self.log, self.skip = parameter(H), parameter(H)
        self.register_buffer("state_cache", torch.zeros(1, H, E, N))

    def heads(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(H // G, 1)

    def step(self, s: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        b, c = self.heads(b), self.heads(c)
        s = s * (dt * a).exp()[..., None, None] + (dt[..., None] * x)[..., None] * b[..., None, :]
        return s, (s * c[..., None, :]).sum(-1) + self.skip[:, None] * x

    def mix(self, x: Tensor, start: Tensor) -> Tensor:
        b, c = (w(x).unflatten(-1, (G, N)) for w in (self.b, self.c))
        given = (self.x(x).unflatten(-1, (H, E)), F.softplus(self.dt(x)), b, c)
        a = -self.log.exp()
        state, y = scan(lambda s, t: self.step(s, *t, a), self.fresh(self.state_cache, start), given, dim=1)
        self.state_cache.copy_(state)
        return self.o(y.flatten(2))


def zoo(kind: type[Toy], **steps: Callable[..., Any]) -> Program:
    return export_toy(lambda: kind(**steps))
