"""The small modules of the trained decoder. Parameters are float32 and uninitialised; autocast chooses the types.

Norms and rotations are on every token's way in each layer: their gradients are written out, in a third of the passes
over memory that autograd needs for their single operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Role
from moec.sources.decoder.decoder import apply_rope
from moec.training.rounding import Rounding, round_to_bfloat16


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


def as_operand(x: Tensor) -> Tensor:
    """`x` in the type of the products, for all products that read it: autocast would convert it for each."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def rotate(x_BHTd: Tensor, cos_BTQ: Tensor, sin_BTQ: Tensor, interleaved: bool) -> Tensor:
    """`apply_rope`, differentiable in x. Float32 if the angles are."""
    return _Rotation.apply(x_BHTd, cos_BTQ, sin_BTQ, interleaved)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTd: Tensor, cos_BTQ: Tensor, sin_BTQ: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_BTQ, sin_BTQ)
        ctx.interleaved, ctx.dtype = interleaved, x_BHTd.dtype
        return apply_rope(x_BHTd, cos_BTQ, sin_BTQ, interleaved=interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos_BTQ, sin_BTQ = ctx.saved_tensors
        return apply_rope(grads[0], cos_BTQ, -sin_BTQ, interleaved=ctx.interleaved).to(ctx.dtype), None, None, None


class _RmsNorm(torch.autograd.Function):
    """y = w n with n = x r, r = 1 / sqrt(mean(x^2) + eps); so dx = r (w dy - n mean(w dy n)) and dw = sum of dy n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return F.rms_norm(x, (x.shape[-1],), weight_D, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D = ctx.saved_tensors
        grad, width = grads[0], x.shape[-1]
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(width).add_(ctx.eps).rsqrt_()
        n, wanted = x * r, grad * weight_D
        mean = torch.linalg.vecdot(wanted, n).unsqueeze(-1).div_(width)
        grad_x = wanted.addcmul_(n, mean, value=-1).mul_(r)
        return grad_x, n.mul_(grad).flatten(0, -2).sum(0), None


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
        return _RmsNorm.apply(x.float(), weight, self.eps)


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
            x = as_operand(x)
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        x = as_operand(self._round(x))
        return self.down_proj(self._round(F.silu(self.gate_proj(x)) * self.up_proj(x)))
