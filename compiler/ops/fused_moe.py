"""moec::fused_moe: router, routed experts and shared expert of one layer as one node, float weights.

N tokens, D model width, E experts, F expert width, S shared width. x [N, D] -> [N, D], fp32 arithmetic; the router is
that of `MoeCall`. w13, b13, w2, b2 and activation: `Experts`; the way from logits to weights: `Routing`.
shared_w13 [2S, D] (gate rows first; [S, D] when not gated), shared_w2 [D, S], shared_gate [1, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moec.compiler.ops.call import V, register, require, shape_of
from moec.compiler.ops.moe_call import RoutedMoe, expert_shapes


@dataclass(frozen=True)
class FusedMoe(RoutedMoe[V]):
    w13: V
    b13: V | None
    w2: V
    b2: V | None
    shared_w13: V | None
    shared_w2: V | None
    shared_gate: V | None
    top_k: int
    routing: str
    experts: str

    def weight(self, name: str) -> V | None:
        """One of `WEIGHTS`."""
        value: V | None = getattr(self, name)
        return value

    def shape(self, name: str) -> tuple[int, ...] | None:
        weight = self.weight(name)
        return None if weight is None else shape_of(weight)

    def product(self: FusedMoe[Tensor], name: str, expert: int, rows: Tensor) -> Tensor:
        weight = self.weight(name)
        assert weight is not None
        w = weight[expert].to(torch.float32)
        return functional.linear(rows, w if self.mlp.layout == "out_in" else w.t())

    def shared_product(self: FusedMoe[Tensor], name: str, rows: Tensor) -> Tensor:
        weight = self.weight(name)
        assert weight is not None
        return functional.linear(rows, weight.to(torch.float32))

    def fake(self: FusedMoe[Tensor]) -> Tensor:
        op, d, mlp = "fused_moe", int(self.x.shape[-1]), self.mlp
        up_shape, down_shape = expert_shapes(op, tuple(self.w13.shape), d, mlp)
        result = self.check_shapes(op)
        for name, weight, shape in (("w13", self.w13, up_shape), ("w2", self.w2, down_shape)):
            require(tuple(weight.shape) == shape, op, f"{name} must be {list(shape)}, not {list(weight.shape)}")
        up, down = self.shared_w13, self.shared_w2
        require((up is None) == (down is None), op, "a shared expert needs both shared_w13 and shared_w2")
        if up is not None and down is not None:
            wide = down.shape[1] * (2 if mlp.gated else 1)
            require(tuple(up.shape) == (wide, d), op, "shared_w13 must be [2S, D]")
            require(down.shape[0] == d, op, "shared_w2 must be [D, S]")
        return result


fused_moe = register("fused_moe", FusedMoe)
