"""Read a router that chooses its experts one at a time, each weighed among those that are left and near it.

    left_1 = logits                                      left_k+1 = left_k with -inf at i_k
    i_k = argmax(left_k)                                 best_k = max(left_k)
    far_k = (best_k - logits) / max(|logits|, best_k) > threshold
    weight_k = softmax(left_k with -inf where far_k)[i_k]

(sparsemixer at inference, arXiv 2409.12136; `ops.attributes.Routing`, step 5.) `left_j` for j <= k will do for `logits`
in far_k: they differ in experts only that are -inf in left_k already. N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import (
    SOFTMAX,
    VIEWS,
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
    uncast,
    unpad,
    value,
)

JOINS = (aten.cat.default, aten.concat.default, aten.stack.default)
MAXIMUM = (aten.maximum.default, aten.max.other)
# what a softmax in float32 gives no weight: the lowest number is as good as -inf
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class NearExperts:
    """What a router of this kind is; `logits` [N, E] are what it selects from."""

    logits: Node
    top_k: int
    threshold: float


@advises(
    "mask with logits.masked_fill((best - logits) / logits.abs().clamp(min=best) > threshold, -inf), take softmax and "
    "gather the best expert's; then scatter -inf at that expert and choose the next in the same way"
)
def read_near_experts(weights: Node, indices: Node) -> NearExperts | None:
    """The router whose K choices, one after the other, are joined to `indices` and `weights`, both [N, K].

    None if experts are not chosen in this way; Stuck where they are, and something differs from the equations above.
    """
    picks = [unpad(p) for p in _joined(indices)]
    shares = [unpad(uncast(w)) for w in _joined(weights)]
    if not all(_is_best(p) for p in picks):
        return None
    if len(picks) == 1 and not _has_threshold(shares[0]):
        return None
    if len(shares) != len(picks):
        raise Stuck(weights, f"{len(shares)} combine weights are joined for {len(picks)} experts")
    logits: Node = picks[0].args[0].args[0]  # type: ignore[union-attr,assignment]
    left, before, threshold = logits, [logits], None
    for number, (pick, share) in enumerate(zip(picks, shares, strict=True), 1):
        topk: Node = pick.args[0]  # type: ignore[assignment]
        if topk.args[0] is not left:
            raise Stuck(topk, f"expert {number} is not the best of those that are left")
        found = _threshold(share, pick, left, before)
        if threshold is not None and found != threshold:
            raise Stuck(share, f"expert {number} has the threshold {found}, the first {threshold}")
        threshold = found
        if number < len(picks):
            left = _without(picks[number].args[0].args[0], left, pick)  # type: ignore[union-attr]
            before.append(left)
    assert threshold is not None
    return NearExperts(logits, len(picks), threshold)


def _joined(node: Node) -> list[Node]:
    """The columns [N, 1] (or [N], of a stack) that are joined to [N, K]; `node` itself if none are."""
    parts: Any = node.args[0] if is_op(node, *JOINS) else None
    if parts is None or rank(node) != 2 or dim_of(node, 1, "dim", 2, 0) != 1:
        return [node]
    single = all(rank(p) == 1 or shape(p)[1] == 1 for p in parts)
    return list(parts) if single else [node]


def _is_best(node: Node) -> bool:
    """The index of topk(left [N, E], 1)."""
    topk: Any = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return (
        is_op(topk, aten.topk.default)
        and topk.args[1] == 1
        and rank(topk.args[0]) == 2
        and dim_of(topk, 2, "dim", 2, -1) == 1
        and arg(topk, 3, "largest", True) is True
    )


def _has_threshold(share: Node) -> bool:
    """Whether one choice is weighed by a softmax over those within a threshold, which no other router does."""
    masked = _masked(share.args[0]) if is_op(share, aten.gather.default) else None
    return masked is not None and is_op(masked[1], aten.gt.Scalar) and is_op(masked[1].args[0], aten.div.Tensor)


def _threshold(share: Node, pick: Node, left: Node, before: list[Node]) -> float:
    """Of the weight of one choice: softmax(left with -inf where far)[pick]."""
    picked = is_op(share, aten.gather.default) and dim_of(share, 1, "dim", 2) == 1 and unpad(share.args[2]) is pick  # type: ignore[arg-type]
    if not picked or not same_shape(shape(share.args[2]), shape(pick)):  # type: ignore[arg-type]
        raise Stuck(share, "an expert's weight is not gathered with its own index")
    masked = _masked(share.args[0])
    if masked is None:
        raise Stuck(share, "an expert's weight is not its share of a float32 softmax over the experts that are near it")
    scores, far = masked
    if scores is not left:
        raise Stuck(scores, "an expert's share is not taken of the experts that are left")
    if not is_op(far, aten.gt.Scalar):
        raise Stuck(far, "the experts that count for no weight are not those beyond a threshold")
    ratio = binary(far.args[0], aten.div.Tensor) if isinstance(far.args[0], Node) else None
    difference, size = ratio or (None, None)
    best = pick.args[0]
    if not _is_difference(difference, best, before) or not _is_size(size, best, before):
        raise Stuck(far, "what is compared with the threshold is not (best - logits) / max(|logits|, best)")
    limit = scalar(far.args[1])
    assert limit is not None
    return limit


def _masked(node: Any) -> tuple[Node, Node] | None:
    """(scores, far) of softmax(scores with -inf where far)."""
    node = uncast(node)
    if not is_op(node, *SOFTMAX) or rank(node) != 2 or dim_of(node, 1, "dim", 2) != 1:
        return None
    source = uncast(node.args[0])
    if value(node).dtype != torch.float32 or value(source).dtype != torch.float32:
        return None
    kept, lost = False, True  # what of the mask says that scores stay
    if is_op(source, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, mask, fill = source.args[:3]
    elif is_op(source, aten.where.self, aten.where.ScalarOther):
        (mask, scores, fill), kept, lost = source.args[:3], True, False
    elif is_op(source, aten.where.ScalarSelf):
        mask, fill, scores = source.args[:3]
    else:
        return None
    if _lowest(scores):
        scores, fill, kept, lost = fill, scores, lost, kept
    while is_op(mask, aten.logical_not.default, aten.bitwise_not.default):
        mask, kept, lost = mask.args[0], lost, kept  # type: ignore[union-attr]
    if kept or not _lowest(fill) or not isinstance(scores, Node) or not isinstance(mask, Node):
        return None
    whole = same_shape(shape(scores), shape(source)) and same_shape(shape(mask), shape(source))
    return (scores, mask) if whole else None


def _lowest(node: Any) -> bool:
    """-inf or the lowest float32, as a number or as a tensor that is filled with it."""
    while is_op(node, *VIEWS, aten.expand.default):
        node = node.args[0]
    if is_op(node, aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default):
        place = {aten.scalar_tensor.default: 0, aten.new_full.default: 2}.get(node.target, 1)
        node = node.args[place]
    number = scalar(node)
    return number is not None and number <= LOWEST


def _is_best_value(node: Any, topk: Any, before: list[Node]) -> bool:
    """[N, 1]: topk's own value, the maximum of what it saw, or the logit at its index."""
    if not isinstance(node, Node) or rank(node) != 2:
        return False
    if node.target is operator.getitem and node.args[0] is topk:
        return node.args[1] == 0
    if is_op(node, aten.amax.default):
        kept = arg(node, 2, "keepdim", False) is True
        return node.args[0] is topk.args[0] and kept and dim_of(node, 1, "dim", 2) == 1
    if not is_op(node, aten.gather.default) or node.args[0] not in before or dim_of(node, 1, "dim", 2) != 1:
        return False
    index: Any = unpad(node.args[2])  # type: ignore[arg-type]
    return index.target is operator.getitem and index.args == (topk, 1) and shape(node)[1] == 1


def _is_difference(node: Any, topk: Any, before: list[Node]) -> bool:
    """best - logits"""
    pair = binary(node, aten.sub.Tensor) if isinstance(node, Node) else None
    return pair is not None and _is_best_value(pair[0], topk, before) and pair[1] in before


def _is_size(node: Any, topk: Any, before: list[Node]) -> bool:
    """max(|logits|, best)"""
    if is_op(node, aten.clamp.Tensor, aten.clamp_min.Tensor):
        if arg(node, 2, "max") is not None:
            return False
        pair = (node.args[0], arg(node, 1, "min"))
    elif is_op(node, *MAXIMUM):
        pair = (node.args[0], node.args[1])
        if is_op(pair[1], aten.abs.default):
            pair = pair[::-1]
    else:
        return False
    size, best = pair
    return is_op(size, aten.abs.default) and size.args[0] in before and _is_best_value(best, topk, before)


def _without(node: Node, left: Node, pick: Node) -> Node:
    """`node`, which must be `left` with -inf at `pick`."""
    if is_op(node, aten.scatter.value, aten.scatter.src):
        same = node.args[0] is left and dim_of(node, 1, "dim", 2) == 1 and len(node.args) == 4
        index: Any = node.args[2]
        at = unpad(index) is pick and same_shape(shape(index), shape(pick))
        whole = node.target is aten.scatter.value or same_shape(shape(node.args[3]), shape(index))  # type: ignore[arg-type]
        if same and at and whole and _lowest(node.args[3]):
            return node
    raise Stuck(node, "the next expert is not chosen from what is left: scatter -inf at the one before")
