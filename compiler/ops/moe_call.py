"""Fused MoE nodes as typed calls: base classes with the operands, sizes and eager result that all forms share.

The arithmetic itself is in `moe_math.py`.

N tokens, D model width, E experts, K experts per token, F expert width, S shared width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.call import Call, V, require, shape_of
from moec.compiler.ops.moe_math import apply_experts, choices, combine_weights, router_logits, shared_expert

WEIGHTS = ("w13", "w2", "shared_w13", "shared_w2")


@dataclass(frozen=True)
class MoeCall(Call[V]):
    """The first operands of every form, those of targets included. x, router_input [N, D]; router_weight float32 [E, D]
    (any other dtype is rejected: a rounded router selects other experts); router_bias [E] is part of the logits,
    selection_bias [E] changes the selection only."""

    x: V
    router_input: V
    router_weight: V
    router_bias: V | None
    selection_bias: V | None


@dataclass(frozen=True)
class MoeSizes:
    """`shared_width` is 0 without a shared expert."""

    experts: int
    d_model: int
    expert_width: int
    shared_width: int


class RoutedMoe(MoeCall[V]):
    """The forms of `compiler/ops`, whose attributes are texts: `FusedMoe` and `FusedMoeQ`, which add the fields."""

    b13: V | None
    b2: V | None
    shared_gate: V | None
    top_k: int
    routing: str
    experts: str

    @cached_property
    def selection(self) -> Routing:
        """`routing`, parsed."""
        return Routing.parse(self.routing)

    @cached_property
    def mlp(self) -> Experts:
        """`experts`, parsed."""
        return Experts.parse(self.experts)

    @property
    def has_shared(self) -> bool:
        return self.shape("shared_w2") is not None

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...] | None:
        """The logical shape of one of `WEIGHTS`; None if it is absent."""

    @property
    def sizes(self) -> MoeSizes:
        """Read from the router and the down projections: [E, D, F], or [E, F, D] for `layout=in_out`."""
        count, d = (int(s) for s in shape_of(self.router_weight))
        w2, shared = self.shape("w2"), self.shape("shared_w2")
        assert w2 is not None
        width = w2[1] if self.mlp.layout == "in_out" else w2[2]
        return MoeSizes(count, d, width, 0 if shared is None else shared[1])

    # ---- with tensors

    @abstractmethod
    def product(self: RoutedMoe[Tensor], name: str, expert: int, rows: Tensor) -> Tensor:
        """`rows` [n, in] times the weight `w13` or `w2` of one expert, without bias: [n, out]."""

    @abstractmethod
    def shared_product(self: RoutedMoe[Tensor], name: str, rows: Tensor) -> Tensor:
        """`rows` [n, in] times `shared_w13` or `shared_w2`: [n, out]."""

    def scores(self: RoutedMoe[Tensor], router_input: Tensor) -> tuple[Tensor, Tensor]:
        """(what top-k sees, what the weights are gathered from), both float32 [N, E]."""
        logits = router_logits(router_input, self.router_weight, self.router_bias)
        return choices(logits, self.selection_bias, self.selection)

    def output(self: RoutedMoe[Tensor], x: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The block's output float32 [N, D] with the routing given."""
        rows, mlp = x.to(torch.float32), self.mlp

        def linear(name: str, bias: Tensor | None, expert: int, at: Tensor) -> Tensor:
            y = self.product(name, expert, at)
            return y if bias is None else y + bias[expert].to(torch.float32)

        up, down = partial(linear, "w13", self.b13), partial(linear, "w2", self.b2)
        y = apply_experts(rows, indices_NK, weights_NK, up, down, self.selection, mlp)
        if not self.has_shared:
            return y
        up_shared, down_shared = (partial(self.shared_product, name) for name in ("shared_w13", "shared_w2"))
        return y + shared_expert(rows, up_shared, down_shared, self.shared_gate, mlp)

    def eager(self: RoutedMoe[Tensor]) -> Tensor:
        choice, scores = self.scores(self.router_input)
        indices = choice.topk(self.top_k, -1).indices
        return self.output(self.x, indices, combine_weights(scores, indices, self.selection))

    def check_shapes(self: RoutedMoe[Tensor], op: str) -> Tensor:
        """The result's shape; ValueError for a router, biases or a shared gate that do not fit the experts."""
        check_router(
            op, self.x, self.router_input, self.router_weight, self.router_bias, self.selection_bias, self.top_k,
            self.selection,
        )  # fmt: skip
        d, mlp, w13 = int(self.x.shape[1]), self.mlp, self.shape("w13")
        assert w13 is not None
        e, wide = w13[0], w13[1 if mlp.layout == "out_in" else 2]
        require(self.router_weight.shape[0] == e, op, "router and experts differ in their number")
        require(self.b13 is None or tuple(self.b13.shape) == (e, wide), op, "b13 must be [E, outputs of w13]")
        require(self.b2 is None or tuple(self.b2.shape) == (e, d), op, "b2 must be [E, D]")
        gate = self.shared_gate
        require(gate is None or self.has_shared, op, "a shared gate without a shared expert")
        require(gate is None or tuple(gate.shape) == (1, d), op, "shared_gate must be [1, D]")
        return self.x.new_empty(self.x.shape, dtype=torch.float32)


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
    biased = selection_bias is not None and routing.score == "sparsemixer"
    require(not biased, op, "sparsemixer has no selection bias")
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
