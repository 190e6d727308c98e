"""moec::short_conv: a causal convolution of each channel over the last tokens, whose inputs it carries on.

T tokens, C channels, K taps. x [1, T, C], weight [K, C] (its last row meets the token itself), bias [C],
state [1, K-1, C]: the inputs of the K-1 tokens before this call, oldest first, zero where start_pos is 0.

    z = state ++ x                              [1, K-1+T, C]
    y[t] = bias + sum over j of weight[j] * z[t+j], then y * sigmoid(y) where `silu`
    state = the last K-1 rows of z

The sum of an output is taken from j = 0 on, so a sequence cut anywhere gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.call import Call, V, Written, register, require
from moec.compiler.ops.recurrent import before, sized


@dataclass(frozen=True)
class ShortConv(Call[V]):
    x: V
    weight: V
    bias: V | None
    state: Written[V]
    start_pos: V
    silu: bool

    def eager(self: ShortConv[Tensor]) -> Tensor:
        taps, tokens = self.weight.shape[0], self.x.shape[1]
        rows = torch.cat((before("short_conv", self.state, self.start_pos), self.x), 1)
        y = torch.zeros_like(self.x) if self.bias is None else self.bias.expand_as(self.x)
        for j in range(taps):
            y = y + self.weight[j] * rows[:, j : j + tokens]
        self.state.copy_(rows[:, tokens:])
        return torch.nn.functional.silu(y) if self.silu else y

    def fake(self: ShortConv[Tensor]) -> Tensor:
        op = "short_conv"
        require(self.weight.dim() == 2 and self.weight.shape[0] >= 2, op, "weight must be [K, C] of two taps or more")
        taps, channels = self.weight.shape
        sized(op, "x", self.x, (1, None, channels))
        sized(op, "state", self.state, (1, taps - 1, channels))
        if self.bias is not None:
            sized(op, "bias", self.bias, (channels,))
        return torch.empty_like(self.x, memory_format=torch.contiguous_format)


short_conv = register("short_conv", ShortConv)
