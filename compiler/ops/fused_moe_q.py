"""moec::fused_moe_q: fused_moe with expert and shared weights held as codes and scales.

Shapes and legend as in fused_moe; every quantized weight is (codes, scales) grouped along its **last** dimension, so
`layout=out_in` groups along the input and `layout=in_out` along the output. Shared weights are grouped along the input.

Activation arithmetic with int8_activations (`quant.quantize_rows`; rows of x, and of the hidden per token and expert):
- groups along in:  y = s_x * sum_g s_w[g] * (integer dot product of group g)
- groups along out: for each group G of outputs z[k] = x[k] * s_w[k, G] in fp32, (zq, s_z) = quantize_rows(z),
  y[n] = s_z * sum_k zq[k] * q[k, n].
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.define import define, require
from moec.compiler.ops.fused_moe import check_biases, check_router, check_shared_gate, expert_shapes
from moec.compiler.ops.linear_q import check_codes, linear_in_groups
from moec.compiler.ops.moe_math import apply_experts, route, shared_expert
from moec.compiler.quant import QuantizedTensor, quantize_rows


def linear_out_groups(x: Tensor, weight: QuantizedTensor, int8_activations: bool) -> Tensor:
    """x [n, K] times a weight [K, N] grouped along N. Integer sums: exact in fp32 (|sum| < 2^24 up to K = 16,000)."""
    if not int8_activations:
        return x.to(torch.float32) @ weight.dequantize()
    q_KGn = weight.unpacked().to(torch.float32).unflatten(-1, (-1, weight.group_size))
    z_GTK = torch.einsum("tk,kg->gtk", x.to(torch.float32), weight.scales.to(torch.float32))
    zq_GTK, scale_GT1 = quantize_rows(z_GTK)
    y_GTn = torch.bmm(zq_GTK, q_KGn.permute(1, 0, 2)) * scale_GT1
    return y_GTn.permute(1, 0, 2).flatten(1)


def _eager(
    x: Tensor,
    router_input: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    w13_codes: Tensor,
    w13_scales: Tensor,
    b13: Tensor | None,
    w2_codes: Tensor,
    w2_scales: Tensor,
    b2: Tensor | None,
    shared_w13_codes: Tensor | None,
    shared_w13_scales: Tensor | None,
    shared_w2_codes: Tensor | None,
    shared_w2_scales: Tensor | None,
    shared_gate: Tensor | None,
    top_k: int,
    routing: str,
    experts: str,
    bits: int,
    group_size: int,
    int8_activations: bool,
) -> Tensor:
    how, what = Routing.parse(routing), Experts.parse(experts)
    indices, weights = route(router_input, router_weight, router_bias, selection_bias, top_k, how)
    multiply = linear_in_groups if what.layout == "out_in" else linear_out_groups

    def linear(codes: Tensor, scales: Tensor, bias: Tensor | None, expert: int, rows: Tensor) -> Tensor:
        y = multiply(rows, QuantizedTensor(codes[expert], scales[expert], bits, group_size), int8_activations)
        return y if bias is None else y + bias[expert].to(torch.float32)

    rows = x.to(torch.float32)
    y = apply_experts(
        rows,
        indices,
        weights,
        lambda e, r: linear(w13_codes, w13_scales, b13, e, r),
        lambda e, r: linear(w2_codes, w2_scales, b2, e, r),
        how,
        what,
    )
    if shared_w13_codes is None or shared_w13_scales is None or shared_w2_codes is None or shared_w2_scales is None:
        return y
    up = QuantizedTensor(shared_w13_codes, shared_w13_scales, bits, group_size)
    down = QuantizedTensor(shared_w2_codes, shared_w2_scales, bits, group_size)
    return y + shared_expert(
        rows,
        lambda r: linear_in_groups(r, up, int8_activations),
        lambda r: linear_in_groups(r, down, int8_activations),
        shared_gate,
        what,
    )


def _fake(
    x: Tensor,
    router_input: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    w13_codes: Tensor,
    w13_scales: Tensor,
    b13: Tensor | None,
    w2_codes: Tensor,
    w2_scales: Tensor,
    b2: Tensor | None,
    shared_w13_codes: Tensor | None,
    shared_w13_scales: Tensor | None,
    shared_w2_codes: Tensor | None,
    shared_w2_scales: Tensor | None,
    shared_gate: Tensor | None,
    top_k: int,
    routing: str,
    experts: str,
    bits: int,
    group_size: int,
    int8_activations: bool,
) -> Tensor:
    op = "fused_moe_q"
    how, what = Routing.parse(routing), Experts.parse(experts)
    check_router(op, x, router_input, router_weight, router_bias, selection_bias, top_k, how)
    require(w13_codes.dim() == 3, op, "w13_codes must have three dimensions")
    d, per = int(x.shape[1]), 2 if bits == 4 else 1
    logical = (*w13_codes.shape[:2], w13_codes.shape[2] * per)
    up_shape, down_shape = expert_shapes(op, logical, d, what)
    check_codes(op, "w13", w13_codes, w13_scales, up_shape, bits, group_size)
    check_codes(op, "w2", w2_codes, w2_scales, down_shape, bits, group_size)
    require(router_weight.shape[0] == up_shape[0], op, "router and experts differ in their number")
    check_biases(op, b13, b2, up_shape[0], up_shape[1 if what.layout == "out_in" else 2], d)
    shared = (shared_w13_codes, shared_w13_scales, shared_w2_codes, shared_w2_scales)
    present = sum(t is not None for t in shared)
    require(present in (0, 4), op, "a shared expert needs codes and scales of both its weights")
    if shared_w13_codes is not None and shared_w13_scales is not None and shared_w2_codes is not None:
        assert shared_w2_scales is not None
        s = shared_w2_codes.shape[1] * per
        check_codes(
            op, "shared_w13", shared_w13_codes, shared_w13_scales, (s * (2 if what.gated else 1), d), bits, group_size
        )
        check_codes(op, "shared_w2", shared_w2_codes, shared_w2_scales, (d, s), bits, group_size)
    check_shared_gate(op, shared_gate, d, present == 4)
    return x.new_empty(x.shape, dtype=torch.float32)


fused_moe_q = define(
    "fused_moe_q(Tensor x, Tensor router_input, Tensor router_weight, Tensor? router_bias, Tensor? selection_bias, "
    "Tensor w13_codes, Tensor w13_scales, Tensor? b13, Tensor w2_codes, Tensor w2_scales, Tensor? b2, "
    "Tensor? shared_w13_codes, Tensor? shared_w13_scales, Tensor? shared_w2_codes, Tensor? shared_w2_scales, "
    "Tensor? shared_gate, int top_k, str routing, str experts, int bits, int group_size, bool int8_activations) "
    "-> Tensor",
    _eager,
    _fake,
)
