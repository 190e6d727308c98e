"""moec::selective_scan: the selective state space of Mamba-2 (Dao and Gu, arXiv 2405.21060), token by token.

T tokens, H heads, p head width, G groups (H a multiple), n state width. x [1, T, H, p], dt [1, T, H] (the step, after
softplus and limits), a [H, n] or [H, 1] (negative), b and c [1, T, G, n], d [H]; state [1, H, p, n], zero where
start_pos is 0. Head h reads group h // (H/G).

    S = exp(dt a) S + (dt x) b^T
    y = S c + d x                               [1, T, H*p]

A sequence cut anywhere gives the same state and outputs: tokens are taken one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.call import Call, V, Written, register, require
from moec.compiler.ops.recurrent import before, sized


@dataclass(frozen=True)
class SelectiveScan(Call[V]):
    x: V
    dt: V
    a: V
    b: V
    c: V
    d: V | None
    state: Written[V]
    start_pos: V

    def eager(self: SelectiveScan[Tensor]) -> Tensor:
        per = self.x.shape[2] // self.b.shape[2]
        b, c = (value.repeat_interleave(per, 2) for value in (self.b, self.c))
        s = before("selective_scan", self.state, self.start_pos)
        outputs = []
        for t in range(self.x.shape[1]):
            s, y = scan_step(s, self.x[:, t], self.dt[:, t], self.a, b[:, t], c[:, t])
            outputs.append(y if self.d is None else y + self.d[:, None] * self.x[:, t])
        self.state.copy_(s)
        return torch.stack(outputs, 1).flatten(2) if outputs else self.x.flatten(2)

    def fake(self: SelectiveScan[Tensor]) -> Tensor:
        op = "selective_scan"
        require(self.state.dim() == 4, op, "state must be [1, H, p, n]")
        _, heads, p, n = self.state.shape
        require(self.b.dim() == 4 and heads % self.b.shape[2] == 0, op, "heads must be a multiple of groups")
        require(
            self.a.dim() == 2 and self.a.shape[0] == heads and self.a.shape[1] in (1, n), op, "a must be [H, n or 1]"
        )
        sized(op, "x", self.x, (1, None, heads, p))
        sized(op, "dt", self.dt, (1, None, heads))
        for name in ("b", "c"):
            sized(op, name, getattr(self, name), (1, None, self.b.shape[2], n))
        if self.d is not None:
            sized(op, "d", self.d, (heads,))
        sized(op, "state", self.state, (1, heads, p, n))
        return self.x.new_empty((1, self.x.shape[1], heads * p))


def scan_step(s: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One token: state [1, H, p, n], x [1, H, p], dt [1, H], a [H, n or 1], b and c [1, H, n]. State, y [1, H, p]."""
    s = s * (dt[..., None] * a).exp()[..., None, :] + (dt[..., None] * x)[..., None] * b[..., None, :]
    return s, (s * c[..., None, :]).sum(-1)


selective_scan = register("selective_scan", SelectiveScan)
