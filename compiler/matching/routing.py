"""Read a router backwards: from the combine weights [N, K] and the expert indices [N, K] to its linear.

Every function explains one node completely or raises `Stuck` with the node and the reason. N tokens, E experts, K
experts per token.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from moec.compiler.matching.read import Stuck, arg, aten, binary, dim_of, is_op, rank, shape, value, with_scalar
from moec.compiler.ops.attributes import Routing
from moec.compiler.program import Editor

MULTIPLY = (aten.mul.Tensor,)
ADD = (aten.add.Tensor, aten.add.Scalar)
SOFTMAX = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True)
class Router:
    """The operands of a router and its attributes."""

    input: Node  # float32 [N, D]
    weight: Node  # float32 [E, D]
    bias: Node | None  # [E], part of the logits
    selection_bias: Node | None  # [E], shifts the choice only
    top_k: int
    routing: Routing


def read_router(edit: Editor, weights_NK: Node, indices: Node) -> Router:
    """The router that gives `indices` and `weights_NK`."""
    if indices.target is not operator.getitem or not is_op(indices.args[0], aten.topk.default) or indices.args[1] != 1:
        raise Stuck(indices, "the expert indices do not come from topk")
    topk: Node = indices.args[0]  # type: ignore[assignment]
    choice: Node = topk.args[0]  # type: ignore[assignment]
    top_k = topk.args[1]
    if rank(choice) != 2 or dim_of(topk, 2, "dim", 2, -1) != 1 or arg(topk, 3, "largest", True) is not True:
        raise Stuck(topk, "topk does not take the largest over the experts")
    if not isinstance(top_k, int):
        raise Stuck(topk, "the number of experts per token is not fixed")
    routing, scores = _read_weights(weights_NK, indices, topk)
    selection_bias = None
    if scores is None:  # the weights are topk's own values: what topk saw are the scores
        scores = choice
    elif scores is not choice:
        selection_bias = _selection_bias(edit, choice, scores)
    routing, logits = _read_score(scores, routing)
    router_input, weight, bias = _read_linear(edit, logits)
    return Router(router_input, weight, bias, selection_bias, top_k, routing)


def _selection_bias(edit: Editor, choice: Node, scores: Node) -> Node:
    """b of choice = scores + b, a weight [E]."""
    pair = binary(choice, aten.add.Tensor)
    other = None if pair is None else pair[1] if pair[0] is scores else pair[0] if pair[1] is scores else None
    fits = isinstance(other, Node) and edit.weight_of(other) is not None and shape(other) == (shape(choice)[1],)
    if not isinstance(other, Node) or not fits:
        raise Stuck(choice, "what topk sees is not the scores, nor the scores plus a bias per expert")
    return other


def _read_linear(edit: Editor, logits: Node) -> tuple[Node, Node, Node | None]:
    """(input, weight, bias) of the logits. The router is float32 throughout, or it selects other experts."""
    if not is_op(logits, aten.linear.default):
        raise Stuck(logits, "the router's logits do not come from a linear")
    router_input, weight, bias = logits.args[0], logits.args[1], arg(logits, 2, "bias")
    if not isinstance(router_input, Node) or rank(router_input) != 2:
        raise Stuck(logits, "the router does not score tokens [N, D]")
    for w in (weight, bias):
        if w is not None and edit.weight_of(w) is None:
            raise Stuck(logits, "the router's weight is computed")
    for operand in (router_input, weight):
        dtype = value(operand).dtype  # type: ignore[arg-type]
        if dtype != torch.float32:
            raise Stuck(logits, f"the router is computed in {_name(dtype)}: keep its weight and its input in float32")
    return router_input, weight, bias  # type: ignore[return-value]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_weights(node: Node, indices: Node, topk: Node) -> tuple[Routing, Node | None]:
    """(routing without its score, the scores gathered from; None when the weights are topk's values)."""
    routing = Routing()
    scaled = with_scalar(node, *MULTIPLY)
    if scaled is not None:
        node, scale = scaled
        routing = replace(routing, scale=scale)
    ratio = binary(node, aten.div.Tensor)
    if ratio is not None and isinstance(ratio[0], Node) and isinstance(ratio[1], Node):
        node, total = ratio
        routing = _read_total(node, total, routing)
    if is_op(node, *SOFTMAX) and dim_of(node, 1, "dim", 2) == 1:
        node = node.args[0]  # type: ignore[assignment]
        routing = replace(routing, score="softmax", after_topk=True)
    elif is_op(node, aten.sigmoid.default):
        node = node.args[0]  # type: ignore[assignment]
        routing = replace(routing, score="sigmoid", after_topk=True)
    if is_op(node, aten.gather.default):
        if dim_of(node, 1, "dim", 2) != 1 or node.args[2] is not indices:
            raise Stuck(node, "the combine weights are not gathered with the experts' indices")
        return routing, node.args[0]  # type: ignore[return-value]
    if node.target is operator.getitem and node.args[0] is topk and node.args[1] == 0:
        return routing, None
    raise Stuck(node, "this step from scores to combine weights is not one that the operator has")


def _read_total(weights: Node, total: Node, routing: Routing) -> Routing:
    """weights / (sum(weights) + eps), or / clamp(sum(weights), min)."""
    if is_op(total, aten.clamp.default, aten.clamp_min.default) and arg(total, 2, "max") is None:
        low = arg(total, 1, "min")
        if not isinstance(low, (int, float)):
            raise Stuck(total, "the clamp of the sum is not a number")
        routing, total = replace(routing, clamp_min=float(low)), total.args[0]  # type: ignore[assignment]
    shifted = with_scalar(total, *ADD)
    if shifted is not None:
        total, eps = shifted
        routing = replace(routing, eps=eps)
    summed = is_op(total, aten.sum.dim_IntList) and total.args[0] is weights and arg(total, 2, "keepdim", False) is True
    if not summed or dim_of(total, 1, "dim", 2) != 1:
        raise Stuck(total, "the combine weights are not divided by their own sum")
    return replace(routing, normalize="sum")


def _read_score(scores: Node, routing: Routing) -> tuple[Routing, Node]:
    """(routing with its score, logits)."""
    if routing.after_topk:
        return routing, scores
    if is_op(scores, aten.sigmoid.default):
        return replace(routing, score="sigmoid"), scores.args[0]  # type: ignore[return-value]
    if is_op(scores, *SOFTMAX) and dim_of(scores, 1, "dim", 2) == 1:
        return replace(routing, score="softmax"), scores.args[0]  # type: ignore[return-value]
    raise Stuck(scores, "the router's score is not a sigmoid or a softmax of a linear")
