"""A fused node taken apart: its router and its experts as separate functions, so that routing can be forced.

For models that no eager reference of ours knows: the node's own operands are the weights, and its attributes say how
the router and the experts work. T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from moec.analysis.verify.interpret import GraphRunner
from moec.compiler import ops
from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.fused_moe_q import linear_out_groups
from moec.compiler.ops.linear_q import linear_in_groups
from moec.compiler.ops.moe_math import apply_experts, choices, combine_weights, router_logits, shared_expert
from moec.compiler.program import Program
from moec.compiler.quant import QuantizedTensor
from moec.sources.decoder.simulate import Routed

FUSED = (ops.fused_moe, ops.fused_moe_q)


def fused_nodes(program: Program) -> list[Node]:
    """The fused nodes in the order they run."""
    return [n for n in program.graph.nodes if n.target in FUSED]


def block_of(node: Node, runner: GraphRunner) -> FusedBlock:
    """The block of a fused node, its weights loaded. Operands that are computed, not weights, stay out of it."""
    schema = node.target._schema  # type: ignore[union-attr]
    values: dict[str, Any] = {}
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if isinstance(value, Node) and value.op == "placeholder":
            values[argument.name] = runner.value_of(value)
        else:
            values[argument.name] = value
    return FusedBlock(values, shared_input=node.args[0] is node.args[1])


class FusedBlock:
    """One MoE layer as the arguments of its fused node, by the names of the operator's schema.

    shared_input: whether router and experts read the same value, so that a trace of the experts' input can be routed.
    """

    def __init__(self, values: dict[str, Any], *, shared_input: bool) -> None:
        self._values = values
        self.shared_input = shared_input
        self._routing, self._experts = Routing.parse(values["routing"]), Experts.parse(values["experts"])

    @property
    def top_k(self) -> int:
        return int(self._values["top_k"])

    @torch.no_grad()
    def route(self, x_TD: np.ndarray, forced_TK: np.ndarray | None = None) -> Routed:
        """Select freely from `x_TD`; the combine weights are those of `forced_TK` if it is given."""
        choice_TE, scores_TE = self._scores(torch.from_numpy(x_TD))
        free_TK = choice_TE.topk(self.top_k, -1).indices
        used_TK = free_TK if forced_TK is None else torch.from_numpy(forced_TK.astype(np.int64))
        weights_TK = combine_weights(scores_TE, used_TK, self._routing)
        return Routed(choice_TE.numpy(), free_TK.numpy(), weights_TK.numpy())

    @torch.no_grad()
    def output(self, x_TD: np.ndarray, indices_TK: np.ndarray, weights_TK: np.ndarray | None = None) -> np.ndarray:
        """The block's output with the routing forced; `weights_TK` are computed from `x_TD` unless given."""
        x, indices = torch.from_numpy(x_TD), torch.from_numpy(indices_TK.astype(np.int64))
        if weights_TK is None:
            weights = combine_weights(self._scores(x)[1], indices, self._routing)
        else:
            weights = torch.from_numpy(weights_TK)
        up, down = self._linear("w13", "b13"), self._linear("w2", "b2")
        y = apply_experts(x, indices, weights, up, down, self._routing, self._experts)
        if self._has("shared_w13") or self._has("shared_w13_codes"):
            y = y + shared_expert(
                x, self._shared("shared_w13"), self._shared("shared_w2"), self._values.get("shared_gate"), self._experts
            )
        return y.numpy()

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = self._values
        logits = router_logits(x, v["router_weight"], v.get("router_bias"))
        return choices(logits, v.get("selection_bias"), self._routing)

    def _has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def _quantized(self, name: str, expert: int | None = None) -> QuantizedTensor:
        codes, scales = self._values[f"{name}_codes"], self._values[f"{name}_scales"]
        if expert is not None:
            codes, scales = codes[expert], scales[expert]
        return QuantizedTensor(codes, scales, self._values["bits"], self._values["group_size"])

    def _linear(self, name: str, bias: str):  # type: ignore[no-untyped-def]
        layout, biases = self._experts.layout, self._values.get(bias)

        def linear(expert: int, rows: Tensor) -> Tensor:
            if self._has(f"{name}_codes"):
                multiply = linear_in_groups if layout == "out_in" else linear_out_groups
                y = multiply(rows, self._quantized(name, expert), self._values["int8_activations"])
            else:
                w = self._values[name][expert].to(torch.float32)
                y = functional.linear(rows, w if layout == "out_in" else w.t())
            return y if biases is None else y + biases[expert].to(torch.float32)

        return linear

    def _shared(self, name: str):  # type: ignore[no-untyped-def]
        if self._has(f"{name}_codes"):
            weight = self._quantized(name)
            return lambda rows: linear_in_groups(rows, weight, self._values["int8_activations"])
        w = self._values[name].to(torch.float32)
        return lambda rows: functional.linear(rows, w)
