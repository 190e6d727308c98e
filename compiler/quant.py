"""Quantization arithmetic, in one place: codes and scales, packing, and the simulated activation rounding.

Shape suffixes: N rows (output features), K reduction (input features), G groups, T tokens, E experts.

Weights are symmetric per group along the **last** dimension of the stored tensor (MobileMoE Eq. 6):
    s = 2 * max|w| / (2^bits - 1),   q = clamp(round(w / s), -2^(bits-1), 2^(bits-1) - 1),   w ~ s * q.
A linear [N, K] is thus grouped along its input; experts stored [E, K, N] are grouped along their output.

Activations are symmetric INT8, one scale per token, rounded half to even:
    a = max|x|,   s = a / 127,   q = clamp(rint(x * (127 / a)), -127, 127)   (q = 0 when a = 0).
The C++ kernels compute exactly this in fp32, so a reference built on `fake_quantize_rows` sees the same integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and scales of one weight. Groups of `group_size` lie along the last dimension of the logical shape.

    codes: uint8 [..., L/2] when bits == 4 (element 2i in the low nibble, two's complement), int8 [..., L] when bits == 8.
    scales: float16 or float32 [..., L/group_size].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        last = self.codes.shape[-1] * (2 if self.bits == 4 else 1)
        return (*self.codes.shape[:-1], last)

    def unpacked(self) -> torch.Tensor:
        """int8 codes of the logical shape."""
        return unpack_int4(self.codes) if self.bits == 4 else self.codes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        q = self.unpacked().to(torch.float32)
        grouped = q.view(*q.shape[:-1], -1, self.group_size) * self.scales.to(torch.float32).unsqueeze(-1)
        return grouped.view(q.shape).to(dtype)


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """int8 codes in [-8, 7], [..., L] -> uint8 [..., L/2]; element 2i goes to the low nibble."""
    u = q.to(torch.uint8) & 0xF
    return u[..., 0::2] | (u[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`: int8 [..., L]."""
    low = (packed & 0xF).to(torch.int8)
    high = (packed >> 4).to(torch.int8)
    both = torch.stack((low, high), dim=-1).flatten(-2)
    return torch.where(both > 7, both - 16, both)


def quantize_weight(w: torch.Tensor, *, bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    """Eq. 6, per group along the last dimension. The codes are rounded against the scale as it is stored."""
    if w.shape[-1] % group_size:
        raise ValueError(f"last dimension {w.shape[-1]} is not a multiple of the group size {group_size}")
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grouped = w.to(torch.float32).view(*w.shape[:-1], -1, group_size)
    scales = (2.0 * grouped.abs().amax(-1) / (2**bits - 1)).to(scale_dtype)
    divisor = scales.to(torch.float32).unsqueeze(-1)
    # a group of zeros (or one below the smallest scale) has scale 0: its codes are 0
    q = torch.where(divisor > 0, grouped / divisor, 0.0).round_().clamp_(qmin, qmax).to(torch.int8).view(w.shape)
    return QuantizedTensor(pack_int4(q) if bits == 4 else q, scales, bits, group_size)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 along the last dimension: (q as float32 integers [..., K], scale [..., 1])."""
    x = x.to(torch.float32)
    amax = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(amax > 0, 127.0 / amax, 0.0)
    return (x * inverse).round().clamp(-127, 127), amax / 127.0


def fake_quantize_rows(x: torch.Tensor) -> torch.Tensor:
    """What an INT8 kernel sees of `x`."""
    q, scale = quantize_rows(x)
    return q * scale
