"""`MoeForm`: the sizes and attributes of a fused MoE node that its ONNX function depends on, and the node's weights.

Nothing is written to ONNX here: `moe_math.py` emits operators, `moe_standard.py` and `moe_ort.py` the functions.

N tokens, D model width, E experts, K experts per token, F expert width, S shared width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moec.compiler.ops import Experts, FusedMoeQ, RoutedMoe, Routing


@dataclass(frozen=True)
class MoeForm:
    """Equal forms share one function. `bits` 0: float weights. `present` names the optional operands that are there."""

    experts: int
    top_k: int
    width: int
    expert_width: int
    shared_width: int
    routing: Routing
    what: Experts
    bits: int
    group_size: int
    present: frozenset[str]

    @property
    def outer(self) -> int:
        """Outputs of an expert's first product: 2F when gated."""
        return self.expert_width * (2 if self.what.gated else 1)

    @property
    def shared_outer(self) -> int:
        return self.shared_width * (2 if self.what.gated else 1)

    def shape(self, stack: str) -> tuple[int, int]:
        """The shape of one expert's `w13` or `w2` as it is stored."""
        rows, columns = (self.outer, self.width) if stack == "w13" else (self.width, self.expert_width)
        return (rows, columns) if self.what.layout == "out_in" else (columns, rows)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the call: what the body computes, for readers that recognise the node."""
        return {
            "top_k": self.top_k,
            "experts": self.experts,
            "routing": str(self.routing),
            "expert": str(self.what),
            "bits": self.bits,
            "group_size": self.group_size,
        }


def form_of(moe: RoutedMoe[Node]) -> MoeForm:
    """The attributes and sizes of a fused node, read from its operands."""
    sizes = moe.sizes
    bits, group_size = (moe.bits, moe.group_size) if isinstance(moe, FusedMoeQ) else (0, 0)
    optional = ("router_bias", "selection_bias", "b13", "b2", "shared_gate")
    return MoeForm(
        experts=sizes.experts,
        top_k=moe.top_k,
        width=sizes.d_model,
        expert_width=sizes.expert_width,
        shared_width=sizes.shared_width,
        routing=moe.selection,
        what=moe.mlp,
        bits=bits,
        group_size=group_size,
        present=frozenset(name for name in optional if getattr(moe, name) is not None),
    )
