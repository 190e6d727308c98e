"""moec::fused_moe_q: fused_moe with expert and shared weights held as codes and scales.

Shapes and legend as in fused_moe; every quantized weight is (codes, scales) grouped along its **last** dimension, so
`layout=out_in` groups along the input and `layout=in_out` along the output. Shared weights are grouped along the input.

Activation arithmetic with int8_activations (`quant.quantize_rows`; rows of x, and of the hidden per token and expert):
- groups along in:  y = s_x * sum_g s_w[g] * (integer dot product of group g)
- groups along out: for each group G of outputs z[k] = x[k] * s_w[k, G] in fp32, (zq, s_z) = quantize_rows(z),
  y[n] = s_z * sum_k zq[k] * q[k, n].
With `activation_block` x and z are rounded in blocks of so many inputs, and s_x or s_z stands inside the sum.
levels: as of linear_q, of every weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.call import V, register, require, shape_of
from moec.compiler.ops.linear_q import check_block, check_codes, linear_in_groups
from moec.compiler.ops.moe_call import WEIGHTS, RoutedMoe, expert_shapes
from moec.compiler.quant import QuantizedTensor, fake_quantize_rows, quantize_rows


def linear_out_groups(x: Tensor, weight: QuantizedTensor, int8_activations: bool, activation_block: int = 0) -> Tensor:
    """x [n, K] times a weight [K, N] grouped along N. Integer sums: exact in fp32 (|sum| < 2^24 up to K = 16,000)."""
    if not int8_activations:
        return x.to(torch.float32) @ weight.dequantize()
    q_KGn = weight.unpacked().to(torch.float32).unflatten(-1, (-1, weight.group_size))
    z_GTK = torch.einsum("tk,kg->gtk", x.to(torch.float32), weight.scales.to(torch.float32))
    if activation_block:
        y_GTn = torch.bmm(fake_quantize_rows(z_GTK, activation_block), q_KGn.permute(1, 0, 2))
        return y_GTn.permute(1, 0, 2).flatten(1)
    zq_GTK, scale_GT1 = quantize_rows(z_GTK)
    y_GTn = torch.bmm(zq_GTK, q_KGn.permute(1, 0, 2)) * scale_GT1
    return y_GTn.permute(1, 0, 2).flatten(1)


@dataclass(frozen=True)
class FusedMoeQ(RoutedMoe[V]):
    w13_codes: V
    w13_scales: V
    b13: V | None
    w2_codes: V
    w2_scales: V
    b2: V | None
    shared_w13_codes: V | None
    shared_w13_scales: V | None
    shared_w2_codes: V | None
    shared_w2_scales: V | None
    shared_gate: V | None
    top_k: int
    routing: str
    experts: str
    bits: int
    group_size: int
    int8_activations: bool
    activation_block: int = 0
    levels: str = ""

    def weight(self, name: str) -> tuple[V, V] | None:
        """(codes, scales) of one of `WEIGHTS`; None if it is absent."""
        codes, scales = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales")
        return None if codes is None else (codes, scales)

    def shape(self, name: str) -> tuple[int, ...] | None:
        weight = self.weight(name)
        if weight is None:
            return None
        *lead, last = shape_of(weight[0])
        return (*lead, last * (2 if self.bits == 4 else 1))

    def product(self: FusedMoeQ[Tensor], name: str, expert: int, rows: Tensor) -> Tensor:
        weight = self.weight(name)
        assert weight is not None
        one = self._tensor(weight[0][expert], weight[1][expert])
        multiply = linear_in_groups if self.mlp.layout == "out_in" else linear_out_groups
        return multiply(rows, one, self.int8_activations, self.activation_block)

    def shared_product(self: FusedMoeQ[Tensor], name: str, rows: Tensor) -> Tensor:
        weight = self.weight(name)
        assert weight is not None
        one = self._tensor(*weight)
        return linear_in_groups(rows, one, self.int8_activations, self.activation_block)

    def fake(self: FusedMoeQ[Tensor]) -> Tensor:
        op, mlp, d = "fused_moe_q", self.mlp, int(self.x.shape[-1])
        check_block(op, self.int8_activations, self.activation_block)
        require(self.w13_codes.dim() == 3, op, "w13_codes must have three dimensions")
        present = sum(t is not None for name in WEIGHTS[2:] for t in self._parts(name))
        require(present in (0, 4), op, "a shared expert needs codes and scales of both its weights")
        w13 = self.shape("w13")
        assert w13 is not None
        up_shape, down_shape = expert_shapes(op, w13, d, mlp)
        result = self.check_shapes(op)
        shapes = {"w13": up_shape, "w2": down_shape}
        shared = self.shape("shared_w2")
        if shared is not None:
            shapes |= {"shared_w13": (shared[1] * (2 if mlp.gated else 1), d), "shared_w2": (d, shared[1])}
        for name, shape in shapes.items():
            codes, scales = self._parts(name)
            assert codes is not None
            assert scales is not None
            check_codes(op, name, codes, scales, shape, self.bits, self.group_size, self.levels)
        return result

    def _tensor(self: FusedMoeQ[Tensor], codes: Tensor, scales: Tensor) -> QuantizedTensor:
        return QuantizedTensor(codes, scales, self.bits, self.group_size, levels=self.levels)

    def _parts(self, name: str) -> tuple[V | None, V | None]:
        return getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales")


fused_moe_q = register("fused_moe_q", FusedMoeQ)
