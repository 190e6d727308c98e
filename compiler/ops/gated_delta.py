"""moec::gated_delta: the gated delta rule (Yang et al., arXiv 2412.06464), one token after the other.

T tokens, G key heads, H value heads (a multiple of G), d key width, e value width. q, k [1, T, G, d], v [1, T, H, e],
decay [1, T, H] (its logarithm, at most 0), beta [1, T, H]; state [1, H, d, e], zero where start_pos is 0. Value head h
reads key head h // (H/G). With `eps` >= 0 queries and keys are normalized first: x / sqrt(sum(x^2) + eps).

    S = exp(decay) S                            what is remembered fades
    S = S + k (beta (v - k^T S))^T              k's old value is replaced by v, as far as beta says
    y = scale q^T S                             [1, T, H*e]

A sequence cut anywhere gives the same state and outputs: tokens are taken one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.call import Call, V, Written, register, require
from moec.compiler.ops.recurrent import before, sized


@dataclass(frozen=True)
class GatedDelta(Call[V]):
    q: V
    k: V
    v: V
    decay: V
    beta: V
    state: Written[V]
    start_pos: V
    scale: float
    eps: float

    def eager(self: GatedDelta[Tensor]) -> Tensor:
        q, k = self._normalized(self.q), self._normalized(self.k)
        s = before("gated_delta", self.state, self.start_pos)
        outputs = []
        for t in range(q.shape[1]):
            s, y = delta_step(s, q[:, t] * self.scale, k[:, t], self.v[:, t], self.decay[:, t], self.beta[:, t])
            outputs.append(y)
        self.state.copy_(s)
        return torch.stack(outputs, 1).flatten(2) if outputs else self.v.flatten(2)

    def _normalized(self: GatedDelta[Tensor], x: Tensor) -> Tensor:
        """Per value head."""
        if self.eps >= 0:
            x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps)
        return x.repeat_interleave(self.v.shape[2] // x.shape[2], 2)

    def fake(self: GatedDelta[Tensor]) -> Tensor:
        op = "gated_delta"
        require(self.state.dim() == 4, op, "state must be [1, H, d, e]")
        _, heads, d, e = self.state.shape
        require(self.k.dim() == 4 and heads % self.k.shape[2] == 0, op, "value heads must be a multiple of key heads")
        for name in ("q", "k"):
            sized(op, name, getattr(self, name), (1, None, self.k.shape[2], d))
        sized(op, "v", self.v, (1, None, heads, e))
        for name in ("decay", "beta"):
            sized(op, name, getattr(self, name), (1, None, heads))
        sized(op, "state", self.state, (1, heads, d, e))
        return self.v.new_empty((1, self.v.shape[1], heads * e))


def delta_step(s: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """One token: state [1, H, d, e], q and k [1, H, d], v [1, H, e], decay and beta [1, H]. New state, y [1, H, e]."""
    s = s * decay.exp()[..., None, None]
    recalled = (s * k[..., None]).sum(-2)
    s = s + k[..., None] * ((v - recalled) * beta[..., None])[..., None, :]
    return s, (s * q[..., None]).sum(-2)


gated_delta = register("gated_delta", GatedDelta)
