"""Read a router backwards: from the combine weights [N, K] and the expert indices [N, K] to the logits' linear.

The grammar is that of `ops.attributes.Routing`, steps 7 to 1. Each step is explained completely or `Stuck` names it.
N tokens, E experts, K experts per token, G groups.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.contraction import contraction
from moec.compiler.matching.read import (
    CASTS,
    SOFTMAX,
    Stuck,
    advises,
    arg,
    aten,
    binary,
    dim_of,
    is_op,
    rank,
    same_shape,
    scalar,
    shape,
    static,
    uncast,
    unview,
    value,
    with_scalar,
)
from moec.compiler.matching.sparsemixer import read_near_experts
from moec.compiler.ops.attributes import Routing
from moec.compiler.program import Editor

MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
DIVIDE = (aten.div.Tensor, aten.div.Scalar)
ADD = (aten.add.Tensor, aten.add.Scalar)


@dataclass(frozen=True)
class Router:
    """What a fused node needs of a router; `bias` is part of the logits, `selection_bias` of the choice only."""

    input: Node
    weight: Node  # [E, D], or [D, E] when `in_out`
    in_out: bool
    bias: Node | None
    selection_bias: Node | None
    top_k: int
    routing: Routing
    expert_scale: Node | None = None  # [E]: multiplies the weight of each chosen expert

    @property
    def experts(self) -> int:
        return int(shape(self.weight)[1 if self.in_out else 0])


@advises("write the router in float32 as linear, score, topk, then gather, normalise and scale the weights")
def read_router(edit: Editor, weights: Node, indices: Node) -> Router:
    """The router that gives `indices` and `weights`, both [N, K]."""
    routing, weights, expert_scale = _read_scale(edit, weights, indices)
    near = read_near_experts(weights, indices)
    if near is not None:
        routing = replace(routing, score="sparsemixer", threshold=near.threshold)
        source_input, weight, in_out, bias = _read_logits(edit, near.logits)
        return Router(source_input, weight, in_out, bias, None, near.top_k, routing, expert_scale)
    if indices.target is not operator.getitem or not is_op(indices.args[0], aten.topk.default) or indices.args[1] != 1:
        raise Stuck(indices, "the expert indices do not come from topk")
    topk: Node = indices.args[0]
    choice: Node = topk.args[0]
    if rank(choice) != 2 or dim_of(topk, 2, "dim", 2, -1) != 1 or arg(topk, 3, "largest", True) is not True:
        raise Stuck(topk, "topk does not take the largest over the experts")
    if not isinstance(topk.args[1], int):
        raise Stuck(topk, "the number of experts per token is not fixed")
    routing, source = _read_weights(weights, indices, topk, routing)
    choice, routing, fill = _read_groups(choice, routing)
    scores = source
    if source is topk:  # the weights are topk's own values: what topk saw
        if fill is not None and math.isfinite(fill) and routing.after_topk:
            raise Stuck(topk, "weights taken from masked logits differ from the logits' own")
        scores = choice
    selection_bias = None
    rising = None if scores is choice or routing.after_topk or routing.groups else _score_of(scores)
    if rising is not None and rising[1] is choice:  # chosen by logits, weighted by a score that rises with them
        if rising[0] == "softmax":  # over all experts: choosing by it is choosing by the logits
            choice = scores
        else:
            scores, routing = choice, replace(routing, score=rising[0], after_topk=True)
    if scores is not choice:
        routing, scores, selection_bias = _read_bias(edit, choice, scores, routing)
    routing, logits = _read_score(scores, routing)
    if source is topk and fill is not None and routing.score == "sqrtsoftplus":
        raise Stuck(topk, "weights taken from masked scores differ from the scores' own")
    source_input, weight, in_out, bias = _read_logits(edit, logits)
    return Router(source_input, weight, in_out, bias, selection_bias, topk.args[1], routing, expert_scale)


# ------------------------------------------------------------------------------------------- steps 7 to 4: the weights


def _read_scale(edit: Editor, node: Node, indices: Node) -> tuple[Routing, Node, Node | None]:
    """(scale and normalisation; the weights before them; a scale per expert)."""
    routing, expert_scale = Routing(), None
    scale = 1.0
    while True:
        node = uncast(node)
        scaled, divided = with_scalar(node, *MULTIPLY), with_scalar(node, *DIVIDE)
        by_expert = _scale_of_experts(edit, node, indices)
        if scaled is not None:
            node, scale = scaled[0], scale * scaled[1]
        elif divided is not None and divided[1] != 0:
            node, scale = divided[0], scale / divided[1]
        elif by_expert is not None and expert_scale is None:
            node, expert_scale = by_expert
        else:
            break
    routing = replace(routing, scale=scale)
    ratio = binary(node, aten.div.Tensor)
    if ratio is not None and isinstance(ratio[1], Node):
        node, total = uncast(ratio[0]), ratio[1]
        routing = _read_total(node, total, routing)
    return routing, node, expert_scale


def _read_weights(node: Node, indices: Node, topk: Node, routing: Routing) -> tuple[Routing, Node]:
    """(routing with a score after topk; the scores gathered from, or `topk` itself)."""
    if is_op(node, *SOFTMAX) and rank(node) == 2 and dim_of(node, 1, "dim", 2) == 1:
        _check_float(node)
        node, routing = uncast(node.args[0]), replace(routing, score="softmax", after_topk=True)
    elif is_op(node, aten.sigmoid.default):
        node, routing = uncast(node.args[0]), replace(routing, score="sigmoid", after_topk=True)
    if is_op(node, aten.gather.default):
        picks: Any = node.args[2]
        same = unview(picks) is indices and same_shape(shape(picks), shape(indices))
        if dim_of(node, 1, "dim", 2) != 1 or not same:
            raise Stuck(node, "the combine weights are not gathered with the experts' indices")
        return routing, node.args[0]  # type: ignore[return-value]
    if node.target is operator.getitem and node.args[0] is topk and node.args[1] == 0:
        return routing, topk
    raise Stuck(node, "this step from scores to combine weights is not one that the operator has")


def _scale_of_experts(edit: Editor, node: Node, indices: Node) -> tuple[Node, Node] | None:
    """(weights, scale [E]) of weights * scale[indices]."""
    pair = binary(node, aten.mul.Tensor)
    for weights, factor in () if pair is None else (pair, pair[::-1]):
        if not is_op(factor, aten.index.Tensor) or list(factor.args[1]) != [indices] or not isinstance(weights, Node):
            continue
        if edit.weight_of(factor.args[0]) is not None and rank(factor.args[0]) == 1:
            return weights, factor.args[0]
    return None


def _read_total(weights: Node, total: Node, routing: Routing) -> Routing:
    """weights / max(sum(weights) + eps, clamp_min). Weights are scores, none is negative: their 1-norm is their sum."""
    total = uncast(total)
    if is_op(total, aten.expand.default) and shape(total.args[0])[1:] == (1,):  # type: ignore[arg-type]
        total = uncast(total.args[0])
    if is_op(total, aten.clamp.default, aten.clamp_min.default) and arg(total, 2, "max") is None:
        low = scalar(arg(total, 1, "min"))
        if low is None or low <= 0:
            raise Stuck(total, "the clamp of the sum is not a positive number")
        routing, total = replace(routing, clamp_min=low), uncast(total.args[0])
    shifted = with_scalar(total, *ADD)
    if shifted is not None:
        total, eps = uncast(shifted[0]), shifted[1]
        routing = replace(routing, eps=eps)
    if is_op(total, aten.linalg_vector_norm.default):
        summed, dim = (
            arg(total, 1, "ord", 2) == 1 and arg(total, 3, "keepdim", False) is True,
            dim_of(total, 2, "dim", 2),
        )
    else:
        summed = is_op(total, aten.sum.dim_IntList) and arg(total, 2, "keepdim", False) is True
        dim = dim_of(total, 1, "dim", 2) if summed else None
    if not summed or dim != 1 or uncast(total.args[0]) is not weights:
        raise Stuck(total, "the combine weights are not divided by their own sum")
    return replace(routing, normalize="sum")


# ------------------------------------------------------------------------------------------- step 3: groups of experts


def _read_groups(choice: Node, routing: Routing) -> tuple[Node, Routing, float | None]:
    """(the choice before groups were masked, routing with its groups, the fill) of masked_fill or where over groups."""
    masked = _read_mask(choice)
    if masked is None:
        return choice, routing, None
    source, keep_mask, fill = masked
    count = static(shape(choice)[1])
    groups_kept = _read_kept(keep_mask, choice)
    topk: Node = groups_kept.args[0]
    group_scores: Node = topk.args[0]
    groups = static(shape(group_scores)[-1])
    if count is None or groups is None or rank(group_scores) != 2 or count % groups:
        raise Stuck(group_scores, "the scores of expert groups are not [N, groups]")
    if dim_of(topk, 2, "dim", 2, -1) != 1 or arg(topk, 3, "largest", True) is not True:
        raise Stuck(topk, "the kept groups are not those of the largest score")
    kind = _group_score(group_scores, source, groups, count // groups)
    if fill == 0.0:
        name = "zero"
    elif fill == -math.inf:
        name = "ninf"
    else:
        raise Stuck(choice, f"masked groups are filled with {fill}; the operator has 0 and -inf")
    routing = replace(routing, groups=groups, keep=int(topk.args[1]), group_score=kind, fill=name)
    return source, routing, fill


def _read_mask(choice: Node) -> tuple[Node, tuple[Node, bool], float] | None:
    """(source, (mask, True where kept), fill)."""
    choice = unview(choice)
    if is_op(choice, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        fill = scalar(choice.args[2])
        if fill is None:
            raise Stuck(choice, "masked groups are filled with a tensor")
        return unview(choice.args[0]), (choice.args[1], False), fill
    if is_op(choice, aten.where.ScalarOther):
        return unview(choice.args[1]), (choice.args[0], True), float(choice.args[2])
    if is_op(choice, aten.where.self):
        fill = _constant(choice.args[2])
        if fill is None:
            raise Stuck(choice, "masked groups are filled with a tensor")
        return unview(choice.args[1]), (choice.args[0], True), fill
    return None


def _constant(node: Any) -> float | None:
    if is_op(node, aten.full.default, aten.full_like.default, aten.scalar_tensor.default):
        return scalar(node.args[0] if node.target is aten.scalar_tensor.default else node.args[1])
    if is_op(node, aten.zeros_like.default, aten.zeros.default):
        return 0.0
    return None


def _read_kept(mask: tuple[Node, bool], at: Node) -> Node:
    """The indices of the kept groups, from a mask made by scattering ones and repeated over each group's experts."""
    node, kept = mask
    while True:
        node = unview(node)
        if is_op(node, *CASTS) and value(node).dtype == torch.bool:
            node = node.args[0]
        elif is_op(node, aten.bitwise_not.default, aten.logical_not.default):
            node, kept = node.args[0], not kept
        elif is_op(node, aten.expand.default, aten.repeat_interleave.self_int):
            node = _repeated(node)
        elif is_op(node, aten.eq.Scalar, aten.ne.Scalar) and node.args[1] == 0:
            kept = not kept if node.target is aten.eq.Scalar else kept
            node = node.args[0]
        else:
            break
    if not is_op(node, aten.scatter.value) or _constant(node.args[0]) != 0.0 or node.args[3] != 1:
        raise Stuck(node, "the mask of groups is not made by scattering ones into zeros")
    picks = node.args[2]
    from_topk = picks.target is operator.getitem and is_op(picks.args[0], aten.topk.default)
    if not from_topk or picks.args[1] != 1 or dim_of(node, 1, "dim", 2) != 1:
        raise Stuck(node, "the mask of groups does not come from a topk over group scores")
    if not kept:
        raise Stuck(at, "the best groups are masked, not kept")
    return picks


def _repeated(node: Node) -> Node:
    """Each of [N, G] repeated for the experts of its group."""
    source: Node = node.args[0]
    if is_op(node, aten.repeat_interleave.self_int):
        if dim_of(node, 2, "dim", 2) != 1:
            raise Stuck(node, "the mask of groups is not repeated over the experts of a group")
        return source
    if rank(node) != 3 or rank(source) != 3 or shape(source)[2] != 1 or not is_op(source, aten.unsqueeze.default):
        raise Stuck(node, "the mask of groups is not repeated over the experts of a group")
    return source


def _group_score(scores: Node, source: Node, groups: int, size: int) -> str:
    """max, or the sum of the two best, of `source` seen as [N, groups, size]."""
    inner: Node
    if is_op(scores, aten.amax.default) and dim_of(scores, 1, "dim", 3) == 2:
        kind, inner = "max", scores.args[0]
    elif scores.target is operator.getitem and is_op(scores.args[0], aten.max.dim) and scores.args[1] == 0:
        best: Node = scores.args[0]
        kind, inner = "max", best.args[0]
        if dim_of(best, 1, "dim", 3) != 2:
            raise Stuck(best, "the group score is not taken over the experts of a group")
    elif is_op(scores, aten.sum.dim_IntList) and dim_of(scores, 1, "dim", 3) == 2:
        values: Node = scores.args[0]
        top: Any = values.args[0] if values.target is operator.getitem and values.args[1] == 0 else None
        two_best = is_op(top, aten.topk.default) and top.args[1] == 2 and arg(top, 3, "largest", True) is True
        if not two_best or dim_of(top, 2, "dim", 3, -1) != 2:
            raise Stuck(scores, "the group score is not the sum of the two best experts of a group")
        kind, inner = "top2sum", top.args[0]
    else:
        raise Stuck(scores, "the group score is neither a maximum nor a sum of the two best")
    if rank(inner) != 3 or shape(inner)[1:] != (groups, size) or unview(inner) is not unview(source):
        raise Stuck(inner, "the groups are not consecutive experts of what topk selects from")
    return kind


# --------------------------------------------------------------------------------------- steps 2 and 1: bias and score


def _read_bias(edit: Editor, choice: Node, scores: Node, routing: Routing) -> tuple[Routing, Node, Node]:
    """choice = scores + bias, or score(logits + bias) where scores = score(logits)."""
    bias = _plus_bias(edit, choice, scores)
    if bias is not None:
        return routing, scores, bias
    if not routing.after_topk:
        with_bias, logits = _score_of(choice), _score_of(scores)
        if with_bias is not None and logits is not None and with_bias[0] == logits[0]:
            bias = _plus_bias(edit, with_bias[1], logits[1])
            if bias is not None:
                return replace(routing, bias_on="logits"), scores, bias
    raise Stuck(choice, "what topk sees is not the scores, nor the scores plus a bias per expert")


def _plus_bias(edit: Editor, total: Node, scores: Node) -> Node | None:
    pair = binary(total, aten.add.Tensor)
    if pair is None:
        return None
    experts = shape(total)[1]
    for a, b in (pair, pair[::-1]):
        if a is scores and isinstance(b, Node):
            bias = unview(b)
            flat = tuple(s for s in shape(bias) if s != 1)  # one row is the same values
            if edit.weight_of(bias) is not None and flat == (() if experts == 1 else (experts,)):
                return bias
    return None


def _read_score(scores: Node, routing: Routing) -> tuple[Routing, Node]:
    """(routing with its score, logits)."""
    if routing.after_topk:
        return routing, scores
    found = _score_of(scores)
    if found is None:
        raise Stuck(scores, "the router's score is not a sigmoid, a softmax or sqrt(softplus) of a linear")
    return replace(routing, score=found[0]), found[1]


def _score_of(node: Node) -> tuple[str, Node] | None:
    node = uncast(node)
    if is_op(node, aten.sigmoid.default):
        return "sigmoid", node.args[0]
    if is_op(node, *SOFTMAX) and rank(node) == 2 and dim_of(node, 1, "dim", 2) == 1:
        _check_float(node)
        return "softmax", node.args[0]
    if is_op(node, aten.sqrt.default) and is_op(node.args[0], aten.softplus.default) and len(node.args[0].args) == 1:
        return "sqrtsoftplus", node.args[0].args[0]
    return None


def _read_logits(edit: Editor, logits: Node) -> tuple[Node, Node, bool, Node | None]:
    """(input [N, D], weight [E, D], or [D, E] when the third is true, bias [E])."""
    logits = unview(uncast(logits))
    total = binary(logits, aten.add.Tensor)
    for product, bias in () if total is None else (total, total[::-1]):
        flat = isinstance(bias, Node) and edit.weight_of(unview(bias)) is not None and rank(unview(bias)) == 1
        if flat and isinstance(product, Node) and shape(product)[1:] == shape(unview(bias)):
            source, weight, in_out, none = _read_logits(edit, product)
            if none is not None or value(bias).dtype != torch.float32:
                break
            return source, weight, in_out, unview(bias)
    found = _linear(edit, logits)
    if found is None:
        raise Stuck(logits, "the router's logits do not come from a linear")
    source, weight, in_out, bias = found
    if rank(source) != 2:
        raise Stuck(logits, "the router does not score tokens [N, D]")
    for w in (weight, bias):
        if w is not None and edit.weight_of(w) is None:
            raise Stuck(logits, "the router's weight is computed")
    for operand in (source, weight):
        dtype = value(operand).dtype
        if dtype != torch.float32:
            name = str(dtype).removeprefix("torch.")
            raise Stuck(logits, f"the router is computed in {name}: keep its weight and its input in float32")
    return source, weight, in_out, bias


def _linear(edit: Editor, node: Node) -> tuple[Node, Node, bool, Node | None] | None:
    """(rows, weight, whether the weight is [in, out], bias) of a product of rows with a matrix."""
    found = contraction(node)
    if found is None:
        return None
    # a second operand that is no weight is taken for one: what is wrong with it is said there
    product = found.split(lambda operand: edit.weight_of(operand) is not None) or found.split(lambda operand: True)
    if product is None or product.matrix is None:
        return None
    return product.rows, product.weight, product.matrix, found.bias


def _check_float(node: Node) -> None:
    if value(node).dtype != torch.float32:
        raise Stuck(node, "the router's softmax is not computed in float32")
