"""The fused MoE block in the delegate's instructions.

N tokens, D width, E experts, K selected experts, F expert width.

    router (fp32) -> score -> + bias -> top-k -> normalise -> [sort by expert when N*K >= 64]
      -> gate and up in one gathered product -> activation -> down in a second one -> combine (fp32) + shared expert

Sorting makes tokens of one expert neighbours, so that a weight is read once for all of them; below 64 pairs it costs
more than it saves. The file holds both branches, and one is chosen at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.fx import Node

import moec.compiler.ops as ops
from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.call import shape_of
from moec.targets.metal.context import Context, Tap
from moec.targets.metal.emitter import Emitter, Slot
from moec.targets.metal.handlers import slot_of

SORT_FROM = 64  # pairs of token and expert from which sorting pays; the threshold of mlx-lm

Product = Callable[[Slot, Slot, bool], Slot]  # (x [.., 1, in], expert indices, sorted) -> [.., 1, out]
Linear = Callable[[Slot], Slot]
Shared = tuple[Linear, Linear]  # up, down


def fused_moe(c: Context, n: Node) -> Slot:
    moe = ops.FusedMoe[Node].of(n)
    in_out = moe.mlp.layout == "in_out"

    def product(weight: Node, bias: Node | None) -> Product:
        slot = c.plain(weight)
        # gathered products take [E, in, out]; the other layout is read through a transposed view
        b = slot if in_out else c.e.transpose(slot, (0, 2, 1))
        return lambda v, i, is_sorted: _with_bias(
            c, c.e.emit("GatherMm", a=v, b=b, rhs_indices=i, sorted_indices=is_sorted), bias, i
        )

    def linear(weight: Node) -> Linear:
        w = c.e.transpose(c.plain(weight), (1, 0))
        return lambda v: c.e.emit("Addmm", mat1=v, mat2=w)

    shared = None
    if moe.shared_w13 is not None and moe.shared_w2 is not None:
        shared = (linear(moe.shared_w13), linear(moe.shared_w2))
    return _block(c, n, moe, product(moe.w13, moe.b13), product(moe.w2, moe.b2), shared)


def fused_moe_q(c: Context, n: Node) -> Slot:
    moe = ops.FusedMoeQ[Node].of(n)
    out_in = moe.mlp.layout == "out_in"

    def product(codes: Node, scales: Node, bias: Node | None) -> Product:
        weight = c.quantized_weight(codes, scales, moe.bits, moe.group_size)
        # out_in is grouped along the input, in_out along the output: both are layouts of MLX's own, read untransposed
        return lambda v, i, is_sorted: _with_bias(
            c,
            c.e.emit(
                "GatherQmm",
                x=v,
                rhs_indices=i,
                sorted_indices=is_sorted,
                transpose=out_in,
                **weight.fields,
            ),
            bias,
            i,
        )

    def linear(codes: Node, scales: Node) -> Linear:
        weight = c.quantized_weight(codes, scales, moe.bits, moe.group_size)
        return lambda v: c.e.emit("QuantizedMatmul", x=v, transpose=True, **weight.fields)

    shared = None
    up, down = moe.weight("shared_w13"), moe.weight("shared_w2")
    if up is not None and down is not None:
        shared = (linear(*up), linear(*down))
    w13, w2 = product(moe.w13_codes, moe.w13_scales, moe.b13), product(moe.w2_codes, moe.w2_scales, moe.b2)
    return _block(c, n, moe, w13, w2, shared)


def _with_bias(c: Context, y: Slot, bias: Node | None, indices: Slot) -> Slot:
    """Add each expert's bias [E, out] to y [.., 1, out]."""
    if bias is None:
        return y
    rows = c.e.take(c.plain(bias), indices, 0)
    return c.e.add(y, c.e.emit("ExpandDims", x=rows, axis=-2))


def _block(
    c: Context,
    n: Node,
    moe: ops.RoutedMoe[Node],
    up: Product,
    down: Product,
    shared: Shared | None,
) -> Slot:
    e, sizes, experts, top_k = c.e, moe.sizes, moe.mlp, moe.top_k
    x_ND = slot_of(c, moe.x)
    indices_NK, weights_NK = _route(c, moe)
    weights_NK1 = e.emit("ExpandDims", x=weights_NK, axis=-1)
    y_NKD = e.tensor()
    width = int(shape_of(moe.x)[-1])
    on_input = moe.selection.apply == "input"

    def mlp(rows: Slot, indices: Slot, is_sorted: bool) -> Slot:
        return down(activate(c, up(rows, indices, is_sorted), sizes.expert_width, experts), indices, is_sorted)

    def by_expert() -> None:
        flat_P = e.reshape(indices_NK, (-1,))
        order_P = e.cast(e.emit("Argsort", x=flat_P, axis=0), torch.int32)
        back_P = e.emit("Argsort", x=order_P, axis=0)
        token_P = e.cast(e.binary("FloorDivide", order_P, _int_scalar(c, top_k)), torch.int32)
        rows_P1D = e.emit("ExpandDims", x=e.take(x_ND, token_P, 0), axis=-2)
        if on_input:
            factor = e.take(e.reshape(weights_NK, (-1, 1, 1)), order_P, 0)
            rows_P1D = _multiply_cast(c, rows_P1D, factor)
        sorted_P = e.take(flat_P, order_P, 0)
        y_P1D = mlp(rows_P1D, sorted_P, True)
        e.reshape(e.take(y_P1D, back_P, 0), (-1, top_k, width), y_NKD)

    def as_they_come() -> None:
        rows = e.reshape(x_ND, (-1, 1, 1, width))
        if on_input:
            rows = _multiply_cast(c, rows, e.emit("ExpandDims", x=weights_NK1, axis=-1))
        e.reshape(mlp(rows, indices_NK, False), (-1, top_k, width), y_NKD)

    pairs = e.multiply_int(e.size(x_ND, 0), top_k)
    e.when(e.floor_divide_int(pairs, SORT_FROM), by_expert, as_they_come)

    # the weights are fp32, and so is the sum over experts whatever the type of activations
    y_ND = e.sum(y_NKD if on_input else e.multiply(y_NKD, weights_NK1), 1)
    if shared is not None:
        y_ND = e.add(y_ND, _shared(c, x_ND, shared, moe.shared_gate, sizes.shared_width, experts))
    out = c.finish(n, y_ND)
    c.taps.append(
        Tap(
            layer=len(c.taps),
            after=len(c.P._chains[0]) - 1,
            x=e.tid(x_ND),
            indices=e.tid(indices_NK),
            weights=e.tid(weights_NK),
            y=e.tid(out),
        )
    )
    return out


def _route(c: Context, moe: ops.RoutedMoe[Node]) -> tuple[Slot, Slot]:
    """(indices uint32 [N, K], weights float32 [N, K]), all in fp32: `Routing`, steps 1 to 7."""
    e, routing = c.e, moe.selection
    x_ND = slot_of(c, moe.router_input)
    if c.dtype != torch.float32:
        x_ND = e.cast(x_ND, torch.float32)
    w_DE = e.transpose(c.plain(moe.router_weight, torch.float32), (1, 0))
    bias = None if moe.router_bias is None else c.plain(moe.router_bias, torch.float32)
    logits = e.emit("Addmm", mat1=x_ND, mat2=w_DE, bias=bias)
    scores = logits if routing.selects_logits else _score(e, logits, routing.score)
    choice = scores
    if moe.selection_bias is not None:
        shift = c.plain(moe.selection_bias, torch.float32)
        if routing.bias_on == "scores" or routing.after_topk:
            choice = e.add(scores, shift)
        else:
            choice = _score(e, e.add(logits, shift), routing.score)
    if routing.groups:
        choice = _keep_groups(c, choice, moe.sizes.experts, routing)
    indices_NK = _top_k(e, choice, moe.top_k)
    if routing.score == "sparsemixer":
        weights = _near_weights(c, scores, indices_NK, moe.sizes.experts, moe.top_k, routing.threshold)
    else:
        weights = e.emit("TakeAlongAxis", x=scores, indices=indices_NK, axis=-1)
    if routing.after_topk:
        weights = _score(e, weights, routing.score)
    if routing.normalize == "sum":
        total = e.sum(weights, -1, keepdims=True)
        if routing.eps:
            total = e.add(total, e.scalar(routing.eps))
        if routing.clamp_min:
            total = e.binary("Maximum", total, e.scalar(routing.clamp_min))
        weights = e.binary("Divide", weights, total)
    if routing.scale != 1.0:
        weights = e.multiply(weights, e.scalar(routing.scale))
    return indices_NK, weights


def _near_weights(c: Context, logits_NE: Slot, indices_NK: Slot, experts: int, top_k: int, threshold: float) -> Slot:
    """`Routing`, step 5, with sparsemixer: `moe_math.near_weights`, for all ranks at once."""
    e = c.e
    best_NK1 = e.emit("ExpandDims", x=e.emit("TakeAlongAxis", x=logits_NE, indices=indices_NK, axis=-1), axis=-1)
    logits_N1E = e.emit("ExpandDims", x=logits_NE, axis=1)
    size_NKE = e.binary("Maximum", e.unary("Abs", logits_N1E), best_NK1)
    ratio_NKE = e.binary("Divide", e.binary("Subtract", best_NK1, logits_N1E), size_NKE)
    far_NKE = e.binary("Greater", ratio_NKE, e.scalar(threshold))
    places = c.P.make_or_get_constant(f"range.{experts}", torch.arange(experts, dtype=torch.int32))
    lowest, left = e.scalar(-math.inf), logits_N1E
    rows = []
    for k in range(top_k):
        at = [e.slice(x, 1, k, k + 1) for x in (far_NKE, indices_NK)]
        near = e.emit("Where", condition=at[0], x=lowest, y=left)
        shares_N1E = e.emit("Softmax", x=near, axis=-1, precise=True)
        index_N11 = e.emit("ExpandDims", x=at[1], axis=-1)
        rows.append(e.emit("TakeAlongAxis", x=shares_N1E, indices=index_N11, axis=-1))
        if k + 1 < top_k:
            picked = e.binary("Equal", e.cast(index_N11, torch.int32), places)
            left = e.emit("Where", condition=picked, x=lowest, y=left)
    return e.reshape(e.emit("Concatenate", tensors=[e.tid(row) for row in rows], axis=1), (-1, top_k))


def _score(e: Emitter, logits: Slot, kind: str) -> Slot:
    if kind == "softmax":
        return e.emit("Softmax", x=logits, axis=-1, precise=True)
    if kind == "sigmoid":
        return e.unary("Sigmoid", logits)
    return e.unary("Sqrt", e.binary("LogAddExp", logits, e.scalar(0.0)))


def _top_k(e: Emitter, choice: Slot, count: int) -> Slot:
    """Indices of the `count` largest along the last axis, largest first."""
    order = e.emit("Argsort", x=e.unary("Neg", choice), axis=-1)
    return e.slice(order, -1, 0, count)


def _keep_groups(c: Context, choice_NE: Slot, count: int, routing: Routing) -> Slot:
    """`Routing`, step 3: the choices of all but the best `keep` groups become `fill`."""
    e, size = c.e, count // routing.groups
    grouped = e.reshape(choice_NE, (-1, routing.groups, size))
    if routing.group_score == "max":
        score_NG = e.emit("Max", x=grouped, axes=[-1], keepdims=False)
    else:
        ranked = e.emit("Sort", x=grouped, axis=-1)
        score_NG = e.sum(e.slice(ranked, -1, size - 2, size), -1)
    best = e.emit("ExpandDims", x=_top_k(e, score_NG, routing.keep), axis=-1)
    ids = c.P.make_or_get_constant(f"range.{routing.groups}", torch.arange(routing.groups, dtype=torch.int32))
    hit_NKG = e.binary("Equal", e.cast(best, torch.int32), ids)
    kept_NG1 = e.emit("ExpandDims", x=e.emit("Any", x=hit_NKG, axes=[1], keepdims=False), axis=-1)
    fill = e.scalar(0.0 if routing.fill == "zero" else -math.inf)
    return e.reshape(e.emit("Where", condition=kept_NG1, x=grouped, y=fill), (-1, count))


def activate(c: Context, hidden: Slot, width: int, experts: Experts) -> Slot:
    """[.., 2*width] (or [.., width] when not gated) -> [.., width]."""
    e = c.e
    if not experts.gated:
        return _activation(c, _clamp(c, hidden, experts.gate_min, experts.gate_max), experts)
    if experts.interleaved:
        gate, up = (e.slice(hidden, -1, first, 2 * width, step=2) for first in (0, 1))
    else:
        gate, up = e.split_halves(hidden, width)
    gate = _clamp(c, gate, experts.gate_min, experts.gate_max)
    up = _clamp(c, up, experts.up_min, experts.up_max)
    if experts.up_offset:
        up = e.add(up, e.scalar(experts.up_offset, c.dtype))
    return e.multiply(_activation(c, gate, experts), up)


def _clamp(c: Context, x: Slot, low: float, high: float) -> Slot:
    bounds = {
        name: c.e.scalar(value, c.dtype) for name, value in (("a_min", low), ("a_max", high)) if not math.isinf(value)
    }
    return c.e.emit("Clip", x=x, **bounds) if bounds else x


def _activation(c: Context, x: Slot, experts: Experts) -> Slot:
    e = c.e
    if experts.activation == "silu":
        if experts.alpha == 1.0:
            return e.unary("Silu", x)
        return e.multiply(x, e.unary("Sigmoid", e.multiply(x, e.scalar(experts.alpha, c.dtype))))
    if experts.activation in ("relu", "relu2"):
        y = e.binary("Maximum", x, e.scalar(0.0, c.dtype))
        return e.unary("Square", y) if experts.activation == "relu2" else y
    return e.emit("Gelu", x=x, approximate="tanh" if experts.activation == "gelu_tanh" else "none")


def _shared(c: Context, x_ND: Slot, shared: Shared, gate: Node | None, width: int, experts: Experts) -> Slot:
    """The always-on expert: halves, gate first, the same activation; scaled by sigmoid(gate x) when there is a gate."""
    up, down = shared
    y_ND = down(activate(c, up(x_ND), width, replace(experts, layout="out_in", interleaved=False)))
    if gate is None:
        return y_ND
    gate_D1 = c.e.transpose(c.plain(gate), (1, 0))
    return c.e.multiply(c.e.unary("Sigmoid", c.e.emit("Addmm", mat1=x_ND, mat2=gate_D1)), y_ND)


def _multiply_cast(c: Context, x: Slot, factor: Slot) -> Slot:
    """x * factor (fp32) in the type of activations."""
    y = c.e.multiply(x, factor)
    return y if c.dtype == torch.float32 else c.e.cast(y, c.dtype)


def _int_scalar(c: Context, value: int) -> Slot:
    return c.P.make_or_get_constant(f"scalar.int32.{value}", torch.tensor(value, dtype=torch.int32))


HANDLERS = {ops.fused_moe: fused_moe, ops.fused_moe_q: fused_moe_q}
