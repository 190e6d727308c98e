"""moec::fused_moe: router, routed experts and shared expert of one layer as one node, float weights.

N tokens, D model width, E experts, F expert width, S shared width. x, router_input [N, D] -> [N, D], fp32 arithmetic.
router_weight float32 [E, D] (any other dtype is rejected: a rounded router selects other experts), router_bias [E] is
part of the logits, selection_bias [E] shifts the selection only; w13, b13, w2, b2 and activation: `Experts`; the way
from logits to weights: `Routing`. shared_w13 [2S, D] (gate rows first; [S, D] when not gated), shared_w2 [D, S],
shared_gate [1, D].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.define import define, require
from moec.compiler.ops.moe_math import apply_experts, route, shared_expert


def _eager(
    x: Tensor,
    router_input: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    w13: Tensor,
    b13: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    shared_gate: Tensor | None,
    top_k: int,
    routing: str,
    experts: str,
) -> Tensor:
    how, what = Routing.parse(routing), Experts.parse(experts)
    indices, weights = route(router_input, router_weight, router_bias, selection_bias, top_k, how)

    def linear(weight: Tensor, bias: Tensor | None, expert: int, rows: Tensor) -> Tensor:
        w = weight[expert].to(torch.float32)
        y = functional.linear(rows, w if what.layout == "out_in" else w.t())
        return y if bias is None else y + bias[expert].to(torch.float32)

    rows = x.to(torch.float32)
    y = apply_experts(
        rows, indices, weights, lambda e, r: linear(w13, b13, e, r), lambda e, r: linear(w2, b2, e, r), how, what
    )
    if shared_w13 is None or shared_w2 is None:
        return y
    w_up, w_down = shared_w13.to(torch.float32), shared_w2.to(torch.float32)
    return y + shared_expert(
        rows, lambda r: functional.linear(r, w_up), lambda r: functional.linear(r, w_down), shared_gate, what
    )


def check_router(
    op: str,
    x: Tensor,
    router_input: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    top_k: int,
    routing: Routing,
) -> None:
    """x, router_input [N, D]; router_weight float32 [E, D]; biases [E]; groups divide E."""
    require(x.dim() == 2 and router_input.dim() == 2, op, "x and router_input must be [N, D]")
    require(
        router_weight.dim() == 2 and router_weight.shape[1] == router_input.shape[1], op, "router_weight must be [E, D]"
    )
    require(router_weight.dtype == torch.float32, op, f"the router must be float32, not {router_weight.dtype}")
    require(router_input.dtype == torch.float32, op, f"the router's input must be float32, not {router_input.dtype}")
    count = router_weight.shape[0]
    for name, bias in (("router_bias", router_bias), ("selection_bias", selection_bias)):
        require(bias is None or tuple(bias.shape) == (count,), op, f"{name} must be [E]")
    require(0 < top_k <= count, op, f"top_k {top_k} of {count} experts")
    if routing.groups:
        require(count % routing.groups == 0, op, f"{count} experts do not form {routing.groups} groups")
        require(top_k <= count // routing.groups * routing.keep, op, "the kept groups hold fewer than top_k experts")
        require(routing.group_score == "max" or count // routing.groups >= 2, op, "top2sum needs two experts a group")


def expert_shapes(
    op: str, w13_shape: tuple[int, ...], d: int, experts: Experts
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes w13 and w2 must have, from w13's own expert count and width."""
    require(len(w13_shape) == 3, op, "w13 must have three dimensions")
    e = w13_shape[0]
    wide = w13_shape[1] if experts.layout == "out_in" else w13_shape[2]
    require(not experts.gated or wide % 2 == 0, op, "a gated w13 must have an even number of outputs")
    f = wide // 2 if experts.gated else wide
    return ((e, wide, d), (e, d, f)) if experts.layout == "out_in" else ((e, d, wide), (e, f, d))


def check_biases(op: str, b13: Tensor | None, b2: Tensor | None, e: int, wide: int, d: int) -> None:
    """b13 [E, wide], b2 [E, D]."""
    require(b13 is None or tuple(b13.shape) == (e, wide), op, "b13 must be [E, outputs of w13]")
    require(b2 is None or tuple(b2.shape) == (e, d), op, "b2 must be [E, D]")


def check_shared_gate(op: str, shared_gate: Tensor | None, d: int, has_shared: bool) -> None:
    """shared_gate [1, D], and only beside a shared expert."""
    require(shared_gate is None or has_shared, op, "a shared gate without a shared expert")
    require(shared_gate is None or tuple(shared_gate.shape) == (1, d), op, "shared_gate must be [1, D]")


def _fake(
    x: Tensor,
    router_input: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    w13: Tensor,
    b13: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    shared_gate: Tensor | None,
    top_k: int,
    routing: str,
    experts: str,
) -> Tensor:
    op = "fused_moe"
    how, what = Routing.parse(routing), Experts.parse(experts)
    check_router(op, x, router_input, router_weight, router_bias, selection_bias, top_k, how)
    d = int(x.shape[1])
    up_shape, down_shape = expert_shapes(op, tuple(w13.shape), d, what)
    require(tuple(w13.shape) == up_shape, op, f"w13 must be {list(up_shape)}, not {list(w13.shape)}")
    require(tuple(w2.shape) == down_shape, op, f"w2 must be {list(down_shape)}, not {list(w2.shape)}")
    require(router_weight.shape[0] == up_shape[0], op, "router and experts differ in their number")
    check_biases(op, b13, b2, up_shape[0], up_shape[1 if what.layout == "out_in" else 2], d)
    require((shared_w13 is None) == (shared_w2 is None), op, "a shared expert needs both shared_w13 and shared_w2")
    if shared_w13 is not None and shared_w2 is not None:
        wide = shared_w2.shape[1] * (2 if what.gated else 1)
        require(tuple(shared_w13.shape) == (wide, d), op, "shared_w13 must be [2S, D]")
        require(shared_w2.shape[0] == d, op, "shared_w2 must be [D, S]")
    check_shared_gate(op, shared_gate, d, shared_w13 is not None)
    return x.new_empty(x.shape, dtype=torch.float32)


fused_moe = define(
    "fused_moe(Tensor x, Tensor router_input, Tensor router_weight, Tensor? router_bias, Tensor? selection_bias, "
    "Tensor w13, Tensor? b13, Tensor w2, Tensor? b2, Tensor? shared_w13, Tensor? shared_w2, Tensor? shared_gate, "
    "int top_k, str routing, str experts) -> Tensor",
    _eager,
    _fake,
)
