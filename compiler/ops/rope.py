"""moec::rope: rotary position embedding of heads.

T tokens, H heads, d head width; x [1, T, H, d], cos and sin [T, d/2]. For each pair (a, b):
(a, b) -> (a*cos - b*sin, b*cos + a*sin). `interleaved`: the pairs are (2i, 2i+1); otherwise (i, i + d/2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.call import Call, V, register, require


@dataclass(frozen=True)
class Rope(Call[V]):
    x: V
    cos: V
    sin: V
    interleaved: bool

    def eager(self: Rope[Tensor]) -> Tensor:
        c, s = self.cos[None, :, None, :], self.sin[None, :, None, :]
        if self.interleaved:
            a, b = self.x[..., 0::2], self.x[..., 1::2]
            return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        a, b = self.x.chunk(2, -1)
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    def fake(self: Rope[Tensor]) -> Tensor:
        x, cos, sin = self.x, self.cos, self.sin
        require(x.dim() == 4, "rope", "x must be [1, T, H, d]")
        require(cos.dim() == 2 and sin.dim() == 2, "rope", "cos and sin must be [T, d/2]")
        require(x.shape[-1] == 2 * cos.shape[-1] == 2 * sin.shape[-1], "rope", "cos and sin must have d/2 columns")
        return torch.empty_like(x, memory_format=torch.contiguous_format)


rope = register("rope", Rope)
