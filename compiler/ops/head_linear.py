"""moec::head_linear: one small matrix for each head, cut out of a weight whose rows lie head after head.

Latent attention expands latents to keys and values by one weight W [H * U, R]. In the absorbed form the products with
it move to the side of the queries and of the results (DeepSeek-V2, arXiv 2405.04434, section 2.1.2), and each head
multiplies with its own rows W_h = W.view(H, U, R)[h, begin:end]:

    transposed   y[t, h] = W_h^T x[t, h]    x [1, T, H, end - begin] -> y [1, T, H, R]
    otherwise    y[t, h] = W_h x[t, h]      x [1, T, H, R] -> y [1, T, H, end - begin]

All float32. weight: float [H * U, R], or codes as of `linear_q`, grouped along R, with scales [H * U, R / group_size]:
groups lie along the outputs of a transposed product and along the inputs of the other, and activations are rounded as
`fused_moe_q` says of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.call import Call, V, register, require
from moec.compiler.ops.fused_moe_q import linear_out_groups
from moec.compiler.ops.linear_q import check_block, check_codes, linear_in_groups
from moec.compiler.quant import QuantizedTensor

_OP = "head_linear"


@dataclass(frozen=True)
class HeadLinear(Call[V]):
    x: V
    weight: V
    scales: V | None
    heads: int
    begin: int
    end: int
    transposed: bool
    bits: int = 0
    group_size: int = 0
    int8_activations: bool = False
    activation_block: int = 0
    levels: str = ""

    def eager(self: HeadLinear[Tensor]) -> Tensor:
        rows = self.weight.shape[0] // self.heads
        parts = []
        for h in range(self.heads):
            own = slice(h * rows + self.begin, h * rows + self.end)
            parts.append(self._product(self.x[0, :, h], own))
        return torch.stack(parts, 1)[None]

    def _product(self: HeadLinear[Tensor], x_TK: Tensor, rows: slice) -> Tensor:
        if self.scales is None:
            w = self.weight[rows].to(torch.float32)
            return x_TK @ w if self.transposed else x_TK @ w.t()
        codes, scales = self.weight[rows], self.scales[rows]
        weight = QuantizedTensor(codes, scales, self.bits, self.group_size, levels=self.levels)
        multiply = linear_out_groups if self.transposed else linear_in_groups
        return multiply(x_TK, weight, self.int8_activations, self.activation_block)

    def fake(self: HeadLinear[Tensor]) -> Tensor:
        """[1, T, H, outputs] without values; ValueError for shapes that are not those of the module's docstring."""
        require(self.weight.dim() == 2, _OP, "weight must have two dimensions")
        rows, rank = (int(s) for s in self.weight.shape)
        rank *= 2 if self.scales is not None and self.bits == 4 else 1
        require(self.heads > 0 and rows % self.heads == 0, _OP, f"{rows} rows are not those of {self.heads} heads")
        per = rows // self.heads
        require(0 <= self.begin < self.end <= per, _OP, f"rows {self.begin}..{self.end} of a head that has {per}")
        width = self.end - self.begin
        n, k = (rank, width) if self.transposed else (width, rank)
        require(self.x.dim() == 4, _OP, "x must have four dimensions")
        require(tuple(self.x.shape[2:]) == (self.heads, k), _OP, f"x must end in {self.heads} heads of {k}")
        if self.scales is not None:
            check_block(_OP, self.int8_activations, self.activation_block)
            shape = (rows, rank)
            check_codes(_OP, "weight", self.weight, self.scales, shape, self.bits, self.group_size, self.levels)
        return self.x.new_empty((self.x.shape[0], self.x.shape[1], self.heads, n), dtype=torch.float32)


head_linear = register(_OP, HeadLinear)
