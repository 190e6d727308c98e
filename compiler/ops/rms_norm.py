"""moec::rms_norm: y = x / sqrt(mean(x^2, -1) + eps) * weight, in fp32. x [..., D], weight [D]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.call import Call, V, register, require


@dataclass(frozen=True)
class RmsNorm(Call[V]):
    x: V
    weight: V | None
    eps: float

    def eager(self: RmsNorm[Tensor]) -> Tensor:
        value = self.x.to(torch.float32)
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            value = value * self.weight.to(torch.float32)
        return value.to(self.x.dtype)

    def fake(self: RmsNorm[Tensor]) -> Tensor:
        x, weight = self.x, self.weight
        if weight is not None:
            require(
                weight.dim() == 1 and weight.shape[0] == x.shape[-1], "rms_norm", "weight must be [last dimension of x]"
            )
        return torch.empty_like(x, memory_format=torch.contiguous_format)


rms_norm = register("rms_norm", RmsNorm)
