"""The rounding of quantization-aware training: torchao's quantizer with the scales that checkpoints store.

    s = fp16(2 max|w| / (2^bits - 1)),  w~ = s * clamp(round(w / s), -2^(bits-1), 2^(bits-1) - 1)

per group along the last dimension (`compiler/quant.py`, MobileMoE Eq. 6). Gradients pass straight through the rounding
and stop where the clamp cuts, as torchao defines it. The scale is computed and *stored* in float16 but divides in
float32: torchao's own path takes the reciprocal in float16, which moves about one code in 200.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moec.compiler.program import Role
from moec.compiler.quant import QuantizedTensor, fake_quantize_rows, pack_int4, quantize_weight
from moec.compiler.spec.quantization import Quantization

_TYPES = {bits: getattr(torch, f"int{bits}") for bits in range(2, 9)}


class WeightRounding:
    """Rounds one weight of any shape. `transposed`: groups lie along the last dimension but one (experts, axis in)."""

    def __init__(self, bits: int, group_size: int, *, transposed: bool = False) -> None:
        # torchao takes a second to import, which only QAT should pay for
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        self.bits, self.group_size, self.transposed = bits, group_size, transposed
        config = IntxFakeQuantizeConfig(_TYPES[bits], group_size=group_size, is_symmetric=True, is_dynamic=False)
        self._quantizer = IntxFakeQuantizer(config)

    def __call__(self, w: Tensor) -> Tensor:
        """`w` as the codes and scales hold it, float32."""
        grouped = w.transpose(-1, -2) if self.transposed else w
        rows_NL = grouped.reshape(-1, grouped.shape[-1])
        self._quantizer.scale = self._divisor(self.scales(rows_NL))
        self._quantizer.zero_point = torch.zeros_like(self._quantizer.scale)
        rounded = self._quantizer(rows_NL).view(grouped.shape)
        self._quantizer.scale = self._quantizer.zero_point = None  # they belong to this step only
        return rounded.transpose(-1, -2) if self.transposed else rounded

    @torch.no_grad()
    def scales(self, rows_NL: Tensor) -> Tensor:
        """float16 [N, L / group_size]."""
        from torchao.quantization.utils import get_group_qparams_symmetric

        scale, _ = get_group_qparams_symmetric(rows_NL, self.bits, self.group_size, torch.float16)
        return scale

    @torch.no_grad()
    def quantized(self, w: Tensor) -> QuantizedTensor:
        """The codes and scales that `self(w)` is made of, bits 4 or 8; groups along the last dimension."""
        assert not self.transposed
        assert self.bits in (4, 8)
        rounded = self(w)
        scales = self.scales(w.reshape(-1, w.shape[-1])).view(*w.shape[:-1], -1)
        divisor = self._divisor(scales).unsqueeze(-1)
        # exact: rounded is code * scale to within one rounding of float32
        codes = (rounded.unflatten(-1, (-1, self.group_size)) / divisor).round().to(torch.int8).flatten(-2)
        return QuantizedTensor(pack_int4(codes) if self.bits == 4 else codes, scales, self.bits, self.group_size)

    @staticmethod
    def _divisor(scales: Tensor) -> Tensor:
        """A group of zeros has scale 0 and codes 0: divided by 1 it stays so."""
        scales = scales.to(torch.float32)
        return torch.where(scales > 0, scales, 1.0)


class _Straight(torch.autograd.Function):
    """Any rounding forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@dataclass(frozen=True)
class LevelRounding:
    """Rounds one weight of any shape to the levels of a table (`compiler/levels.py`), scales by the largest magnitude.

    Gradients pass straight through. transposed: as of `WeightRounding`.
    """

    levels: str
    group_size: int
    transposed: bool = False

    def __call__(self, w: Tensor) -> Tensor:
        """`w` as codes and scales hold it, float32."""
        grouped = w.transpose(-1, -2) if self.transposed else w
        rounded = _Straight.apply(grouped, lambda w: self.quantized(w).dequantize())
        return rounded.transpose(-1, -2) if self.transposed else rounded

    @torch.no_grad()
    def quantized(self, w: Tensor) -> QuantizedTensor:
        """The codes and scales of `w`, groups along its last dimension."""
        return quantize_weight(w, bits=4, group_size=self.group_size, levels=self.levels)


def round_activations(x: Tensor, block: int = 0) -> Tensor:
    """Symmetric INT8 of each row, or of each `block` values of it, as the kernels see their input (torchao has only the
    asymmetric form)."""
    return _Straight.apply(x, lambda x: fake_quantize_rows(x, block).to(x.dtype))


def round_to_bfloat16(x: Tensor) -> Tensor:
    """float32 values that BF16 holds: how checkpoints store norms and the selection bias."""
    return _Straight.apply(x, lambda x: x.to(torch.bfloat16).to(x.dtype))


@dataclass(frozen=True)
class Rounding:
    """How a model with the spec's `quantization` rounds, by role.

    bits: another width for every quantized weight, a stress test that no artifact holds.
    """

    quantization: Quantization
    bits: int | None = None

    @property
    def is_int4(self) -> bool:
        """Whether the codes are whole numbers of four bits, as the packed layout holds them."""
        schemes = (self.quantization.scheme(role) for role in Role)
        return self.bits in (None, 4) and not (self.bits is None and any(s is not None and s.levels for s in schemes))

    def weight(self, role: Role) -> WeightRounding | LevelRounding | None:
        """None for roles that stay float: the router and the norms always do."""
        scheme = self.quantization.scheme(role)
        if scheme is None:
            return None
        transposed = role is Role.EXPERT and scheme.axis == "in"
        if scheme.levels and self.bits is None:
            return LevelRounding(scheme.levels, scheme.group_size, transposed=transposed)
        return WeightRounding(self.bits or scheme.bits, scheme.group_size, transposed=transposed)

    def activations(self, role: Role) -> Callable[[Tensor], Tensor] | None:
        """The rounding of what weights of `role` are multiplied with."""
        if not self.quantization.int8_activations or self.quantization.scheme(role) is None:
            return None
        return partial(round_activations, block=self.quantization.activation_block(role))

    @property
    def cache(self) -> Callable[[Tensor], Tensor] | None:
        """The rounding of keys and values, one scale per token and head."""
        return None if self.quantization.cache_codes is None else round_activations
