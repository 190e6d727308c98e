"""The small modules of the trained decoder. Parameters are float32 and uninitialised; autocast chooses the types."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Role
from moec.training.rounding import Rounding, round_to_bfloat16


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


class Weight(nn.Module):
    """One matrix, rounded as its role says: `forward()` gives it as the products see it."""

    def __init__(self, shape: tuple[int, ...], role: Role, rounding: Rounding | None) -> None:
        super().__init__()
        self.weight = parameter(*shape)
        self.rounding = rounding.weight(role) if rounding else None

    def forward(self) -> Tensor:
        return self.weight if self.rounding is None else self.rounding(self.weight)


class Linear(nn.Module):
    """`x @ weight.T`. Who calls it rounds `x`: one input often serves several of them."""

    def __init__(self, width_in: int, width_out: int, role: Role, rounding: Rounding | None) -> None:
        super().__init__()
        self.weight = parameter(width_out, width_in)
        self.rounding = rounding.weight(role) if rounding else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.rounding is None else self.rounding(self.weight))


class RmsNorm(nn.Module):
    """Computed in float32; with rounding its weight is what BF16 holds, as checkpoints store it."""

    def __init__(self, width: int, eps: float, rounding: Rounding | None) -> None:
        super().__init__()
        self.weight = parameter(width)
        self.eps, self.stored = eps, rounding is not None

    def forward(self, x: Tensor) -> Tensor:
        weight = round_to_bfloat16(self.weight) if self.stored else self.weight
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.eps)


class GatedMlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). It rounds its input."""

    def __init__(self, d_model: int, width: int, role: Role, rounding: Rounding | None) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, width, role, rounding)
        self.up_proj = Linear(d_model, width, role, rounding)
        self.down_proj = Linear(width, d_model, role, rounding)
        self._round = rounding.activations(role) if rounding else None

    def forward(self, x: Tensor) -> Tensor:
        if self._round is None:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        x = self._round(x)
        return self.down_proj(self._round(F.silu(self.gate_proj(x)) * self.up_proj(x)))
