"""What a fused MoE node is, read from the graph: everything that its ONNX function depends on, and its weights.

N tokens, D model width, E experts, K experts per token, F expert width, S shared width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.ops import Experts, Routing, fused_moe_q


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


def operands(node: Node) -> dict[str, Any]:
    """The arguments of a fused node by the names of its operator's schema."""
    schema = node.target._schema  # type: ignore[union-attr]
    return dict(zip((a.name for a in schema.arguments), node.args, strict=True))


def form_of(node: Node) -> MoeForm:
    """The attributes and sizes of a fused node, read from its operands."""
    given = operands(node)
    quantized = node.target is fused_moe_q
    what = Experts.parse(given["experts"])
    bits = int(given["bits"]) if quantized else 0
    suffix = "_codes" if quantized else ""
    per = 2 if bits == 4 else 1

    def shape(name: str) -> tuple[int, ...]:
        value: torch.Tensor = given[name + suffix].meta["val"]
        dims = [int(d) for d in value.shape]
        return (*dims[:-1], dims[-1] * per)

    w2, shared = shape("w2"), given["shared_w2" + suffix] is not None
    optional = ("router_bias", "selection_bias", "b13", "b2", "shared_gate")
    return MoeForm(
        experts=w2[0],
        top_k=int(given["top_k"]),
        width=w2[1] if what.layout == "out_in" else w2[2],
        expert_width=w2[2] if what.layout == "out_in" else w2[1],
        shared_width=shape("shared_w2")[1] if shared else 0,
        routing=Routing.parse(given["routing"]),
        what=what,
        bits=bits,
        group_size=int(given["group_size"]) if quantized else 0,
        present=frozenset(name for name in optional if given[name] is not None),
    )
