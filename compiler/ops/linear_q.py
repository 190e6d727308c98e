"""moec::linear_q: y = x W^T + bias with W held as codes and scales, groups along the input.

x [..., K] float32; codes [N, K/2] uint8 (bits 4) or [N, K] int8 (bits 8); scales [N, K/group_size]; y [..., N] float32.
levels: the table of `compiler/levels.py` whose values the codes number, "" for codes that are numbers.
int8_activations: y = s_x * sum_g s_w[g] * (integer dot product of the group), x rounded per row by
`quant.quantize_rows`; with `activation_block` there is a scale s_x for each so many inputs, inside the sum. Otherwise
fp32 arithmetic on the dequantized weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.levels import LEVELS
from moec.compiler.ops.call import Call, V, register, require
from moec.compiler.quant import ACTIVATION_BLOCK, QuantizedTensor, fake_quantize_rows, quantize_rows


def linear_in_groups(x: Tensor, weight: QuantizedTensor, int8_activations: bool, activation_block: int = 0) -> Tensor:
    """x [..., K] times a weight [N, K] grouped along K. The integers are the kernel's; only the fp32 summation order of
    the scaled group products is torch's own."""
    w = weight.dequantize()
    if not int8_activations:
        return torch.nn.functional.linear(x.to(torch.float32), w)
    if activation_block:
        return torch.nn.functional.linear(fake_quantize_rows(x, activation_block), w)
    q, scale = quantize_rows(x)
    return torch.nn.functional.linear(q, w) * scale


def check_block(op: str, int8_activations: bool, activation_block: int) -> None:
    """Blocks are of 32 inputs, and only rounded activations have them."""
    allowed = (0, ACTIVATION_BLOCK) if int8_activations else (0,)
    require(activation_block in allowed, op, f"activation_block must be one of {allowed}, not {activation_block}")


def check_codes(
    op: str, name: str, codes: Tensor, scales: Tensor, shape: tuple[int, ...], bits: int, group_size: int, levels: str
) -> None:
    """Codes and scales of a weight of logical `shape`, grouped along its last dimension."""
    require(bits in (4, 8), op, f"bits must be 4 or 8, not {bits}")
    require(not levels or (bits == 4 and levels in LEVELS), op, f"no levels {levels!r} for codes of {bits} bits")
    require(
        group_size > 0 and shape[-1] % group_size == 0,
        op,
        f"{name}: {shape[-1]} is not a multiple of group size {group_size}",
    )
    require(codes.dtype == (torch.uint8 if bits == 4 else torch.int8), op, f"{name} codes have dtype {codes.dtype}")
    packed = (*shape[:-1], shape[-1] // 2) if bits == 4 else shape
    require(tuple(codes.shape) == packed, op, f"{name} codes must be {list(packed)}, not {list(codes.shape)}")
    grouped = (*shape[:-1], shape[-1] // group_size)
    require(tuple(scales.shape) == grouped, op, f"{name} scales must be {list(grouped)}, not {list(scales.shape)}")
    require(scales.dtype in (torch.float16, torch.float32), op, f"{name} scales have dtype {scales.dtype}")


@dataclass(frozen=True)
class LinearQ(Call[V]):
    x: V
    codes: V
    scales: V
    bias: V | None
    bits: int
    group_size: int
    int8_activations: bool
    activation_block: int = 0
    levels: str = ""

    def eager(self: LinearQ[Tensor]) -> Tensor:
        weight = QuantizedTensor(self.codes, self.scales, self.bits, self.group_size, levels=self.levels)
        y = linear_in_groups(self.x, weight, self.int8_activations, self.activation_block)
        return y if self.bias is None else y + self.bias.to(torch.float32)

    def fake(self: LinearQ[Tensor]) -> Tensor:
        n = self.codes.shape[0]
        check_block("linear_q", self.int8_activations, self.activation_block)
        shape = (n, int(self.x.shape[-1]))
        check_codes("linear_q", "weight", self.codes, self.scales, shape, self.bits, self.group_size, self.levels)
        return self.x.new_empty((*self.x.shape[:-1], n), dtype=torch.float32)


linear_q = register("linear_q", LinearQ)
