"""Weights in MLX's affine form: Q = q + 2^(bits-1), S = s, B = -2^(bits-1) * s, so that S*Q + B = s*q exactly.

Codes are packed little end first into uint32 words; adding the offset to a two's complement code is flipping its top
bit, so a packed weight is its stored bytes with one bit of each code flipped, seen as words. B is not stored: it is
computed from S when the file is loaded (multiplying by a power of two is exact).

MLX takes groups of 32, 64 and 128. A larger group is a row of smaller ones with equal scales: the scales are repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.quant import unpack_int4

GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Encoding:
    """How a constant of the file is made from a weight of the program: `kind` codes, scales or plain."""

    weight: str
    kind: str
    dtype: torch.dtype
    bits: int = 0
    repeat: int = 1  # finer groups that share one stored scale

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The constant's shape from the stored tensor's."""
        if self.kind == "codes":
            return (*stored[:-1], stored[-1] // 4)  # one byte a stored element, four to a word
        if self.kind == "scales":
            return (*stored[:-1], stored[-1] * self.repeat)
        return stored

    def encode(self, stored: Tensor) -> Tensor:
        if self.kind == "codes":
            return pack_codes(stored, self.bits)
        if self.kind == "scales" and self.repeat > 1:
            stored = stored.repeat_interleave(self.repeat, dim=-1)
        return stored.to(self.dtype).contiguous()


def group_size_of(group_size: int) -> int | None:
    """The group size MLX is given for groups of `group_size`; None if it can hold none."""
    return next((g for g in GROUP_SIZES if group_size % g == 0), None)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes, two's complement (uint8 [..., L/2] or int8 [..., L]) -> uint32 [..., L*bits/32] of q + 2^(bits-1)."""
    flip = 0x88 if bits == 4 else 0x80
    return torch.bitwise_xor(codes.contiguous().view(torch.uint8), flip).view(torch.uint32)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: the stored codes, bit for bit."""
    flip = 0x88 if bits == 4 else 0x80
    bytes_ = torch.bitwise_xor(words.contiguous().view(torch.uint8), flip)
    return bytes_ if bits == 4 else bytes_.view(torch.int8)


def weight_sqnr_db(codes: Tensor, scales: Tensor, rounded: Tensor, bits: int, group_size: int) -> float:
    """Signal to noise, in dB, of a weight whose scales were rounded; infinite when no scale changed.

    Both weights have the same codes q, so signal and noise are sums over groups of s^2 and (s - s')^2 times sum q^2.
    """
    exact, other = scales.to(torch.float64), rounded.to(torch.float64)
    if torch.equal(exact, other):
        return math.inf
    q = unpack_int4(codes) if bits == 4 else codes
    energy = q.view(*q.shape[:-1], -1, group_size).to(torch.float32).square().sum(-1).to(torch.float64)
    noise = ((exact - other).square() * energy).sum().item()
    signal = (exact.square() * energy).sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
