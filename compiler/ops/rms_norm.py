"""moec::rms_norm: y = x / sqrt(mean(x^2, -1) + eps) * weight, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ops.define import define, require


def _eager(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    value = x.to(torch.float32)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        value = value * weight.to(torch.float32)
    return value.to(x.dtype)


def _fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is not None:
        require(
            weight.dim() == 1 and weight.shape[0] == x.shape[-1], "rms_norm", "weight must be [last dimension of x]"
        )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


rms_norm = define("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor", _eager, _fake)
