"""The router and the experts of a fused node as separate functions, so that routing can be forced.

For models without an eager reference: the node's own operands are the weights, and its attributes say how
the router and the experts work. T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from moec.analysis.verify.interpret import GraphRunner
from moec.compiler.ops import RoutedMoe
from moec.compiler.ops.moe_math import combine_weights
from moec.compiler.program import Program
from moec.compiler.reference import Routed


def fused_nodes(program: Program) -> list[Node]:
    """The fused nodes in the order they run."""
    return [n for n in program.graph.nodes if RoutedMoe.find(n) is not None]


def block_of(node: Node, runner: GraphRunner) -> FusedBlock:
    """The block of a fused node, its weights loaded. Operands that are computed, not weights, stay out of it."""
    moe = RoutedMoe[Node].of(node)
    values = moe.map(lambda operand: runner.value_of(operand) if operand.op == "placeholder" else operand)
    return FusedBlock(values, shared_input=moe.x is moe.router_input)


class FusedBlock:
    """One MoE layer, as the call of its fused node with its weights loaded.

    shared_input: whether router and experts read the same value, so that a trace of the experts' input can be routed.
    """

    def __init__(self, moe: RoutedMoe[Tensor], *, shared_input: bool) -> None:
        self._moe = moe
        self.shared_input = shared_input

    @property
    def top_k(self) -> int:
        return self._moe.top_k

    @torch.no_grad()
    def route(self, x_TD: np.ndarray, forced_TK: np.ndarray | None = None) -> Routed:
        """Select freely from `x_TD`; the combine weights are those of `forced_TK` if it is given."""
        choice_TE, scores_TE = self._moe.scores(torch.from_numpy(x_TD))
        free_TK = choice_TE.topk(self.top_k, -1).indices
        used_TK = free_TK if forced_TK is None else torch.from_numpy(forced_TK.astype(np.int64))
        weights_TK = combine_weights(scores_TE, used_TK, self._moe.selection)
        return Routed(choice_TE.numpy(), free_TK.numpy(), weights_TK.numpy())

    @torch.no_grad()
    def output(self, x_TD: np.ndarray, indices_TK: np.ndarray, weights_TK: np.ndarray | None = None) -> np.ndarray:
        """The block's output with the routing forced; `weights_TK` are computed from `x_TD` unless given."""
        x, indices = torch.from_numpy(x_TD), torch.from_numpy(indices_TK.astype(np.int64))
        if weights_TK is None:
            weights = combine_weights(self._moe.scores(x)[1], indices, self._moe.selection)
        else:
            weights = torch.from_numpy(weights_TK)
        return self._moe.output(x, indices, weights).numpy()
