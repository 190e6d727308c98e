"""The forms in which attention over caches is written: a call of sdpa, or its products spelled out, with sinks or not.

    sdpa(q, k, v, mask, scale)
    softmax(s) v                                       s = scale * q k^T + mask
                                                       s = cap * tanh(scale / cap * q k^T) + mask  (Gemma 2)
    softmax(cat((s, sink), -1))[..., :-1] v            a sink is one more score of each head, without a value (GPT-OSS)

q [1, H, T, d], k [1, H, S, d], v [1, H, S, e], mask [.., T, S], sink [1, H, T, 1]. The largest score may be subtracted
before the softmax, and the mask applied by add, masked_fill or where.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.contraction import ONE, Contraction, contraction, untransposed
from moec.compiler.matching.read import (
    VIEWS,
    Stuck,
    arg,
    binary,
    dim_of,
    is_op,
    only_user,
    piece,
    rank,
    same_size,
    scalar,
    shape,
    static,
    unview,
    value,
    with_scalar,
)

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
HIDDEN = torch.finfo(torch.float32).min / 2  # scores at or below it get weight 0


@dataclass(frozen=True)
class Side:
    """Keys or values: [1, H, S, d], or [1, S, H, d] where the heads do not come first."""

    node: Node
    heads_first: bool = True

    @property
    def heads(self) -> int:
        return int(shape(self.node)[1 if self.heads_first else 2])


@dataclass(frozen=True)
class AttentionForm:
    """One attention: `node` is its result [1, H, T, e]. mask: as sdpa takes it; with `hides`, True means hidden.

    readers: the nodes that read keys and values, with the operands by which they do.
    """

    node: Node
    q: Side
    keys: Side
    values: Side
    mask: Any
    hides: bool
    scale: float
    softcap: float  # 0: scores are not capped
    sinks: Node | None  # [H], or the last view of it
    readers: dict[Node, tuple[Node, ...]]


def attention_forms(nodes: Iterable[Node]) -> list[AttentionForm | Stuck]:
    """Every attention, in order; a Stuck with the reason for what is nearly one but has no known form."""
    found: list[AttentionForm | Stuck] = []
    for node in nodes:
        try:
            if is_op(node, SDPA):
                found.append(_of_sdpa(node))
            elif is_op(node, *SOFTMAX) and rank(node) == 4:
                form = _Spelled(node).form()
                found += [] if form is None else [form]
        except Stuck as stuck:
            found.append(stuck)
    return found


def _of_sdpa(node: Node) -> AttentionForm:
    if arg(node, 4, "dropout_p", 0.0) != 0.0 or arg(node, 5, "is_causal", False):
        raise Stuck(node, "dropout and is_causal are not expressible over a cache")
    q, k, v = (_node(operand) for operand in node.args[:3])
    scale = arg(node, 6, "scale")
    width = int(shape(q)[3])
    scale = float(width**-0.5 if scale is None else scale)
    mask = arg(node, 3, "attn_mask")
    return AttentionForm(node, Side(q), Side(k), Side(v), mask, False, scale, 0.0, None, {node: (k, v)})


class _Spelled:
    """Attention around a softmax of scores [1, H, T, S], or [1, H, T, S + 1] with a sink."""

    def __init__(self, softmax: Node) -> None:
        self._softmax = softmax

    def form(self) -> AttentionForm | None:
        """None if no product of four dimensions reads the softmax: it is not attention."""
        softmax = self._softmax
        weights = softmax
        kept = only_user(softmax)
        part = piece(kept) if kept is not None and is_op(kept, aten.slice.Tensor) else None
        if part is not None and kept is not None:
            weights = kept
        product = contraction(only_user(weights))
        if product is None or rank(product.node) != 4 or weights not in product.operands:
            return None
        values = self._values(product, weights)
        if dim_of(softmax, 1, "dim", 4) != 3 or value(softmax).dtype != torch.float32:
            raise Stuck(softmax, "the softmax is not over the positions, in float32")
        scores, sink = self._without_sink(self._without_largest(softmax.args[0]), part)
        scores, mask, hides = self._mask(scores)
        scores, scale = _unscaled(scores)
        softcap = 0.0
        if is_op(scores, aten.tanh.default):
            outer, softcap = scale, abs(scale)  # c * tanh(x) = -c * tanh(-x)
            if not 0 < softcap < math.inf:
                raise Stuck(scores, "the scores are tanh times a number that is no cap")
            _alone(scores)
            scores, scale = _unscaled(_node(scores.args[0]))
            scale *= outer
        q, keys, product_qk = self._keys(scores)
        readers = {product_qk.node: (product_qk.operands[1],), product.node: (product.operands[1],)}
        return AttentionForm(product.node, q, keys, values, mask, hides, scale, softcap, sink, readers)

    def _values(self, product: Contraction, weights: Node) -> Side:
        left, right = product.terms
        if product.operands[0] is not weights or product.operands[1] is weights or product.bias is not None:
            raise Stuck(product.node, "the softmax is not multiplied with values")
        if len(left) != 4 or left[:3] != product.result[:3] or product.summed != left[3]:
            raise Stuck(product.node, "the softmax is not multiplied with values along the positions")
        side = _side(product.operands[1], right, product.result[:2] + left[3] + product.result[3])
        if side is None:
            raise Stuck(product.node, "the softmax is not multiplied with values [1, H, S, e]")
        return side

    def _keys(self, scores: Node) -> tuple[Side, Side, Contraction]:
        product = contraction(scores)
        if product is None or rank(scores) != 4 or product.bias is not None or len(product.summed) != 1:
            raise Stuck(scores, "the scores are not scale * q k^T + mask")
        _alone(scores)
        b, h, t, s = product.result
        d = product.summed
        q = _side(product.operands[0], product.terms[0], b + h + t + d)
        keys = _side(product.operands[1], product.terms[1], b + h + s + d)
        if q is None or keys is None or q.heads != shape(scores)[1]:
            raise Stuck(scores, "the scores are not a product of queries [1, H, T, d] with keys [1, H, S, d]")
        return q, keys, product

    def _without_largest(self, scores: Any) -> Node:
        """x of x - max(x), which has the same softmax; without such a difference the scores themselves."""
        pair = binary(scores, aten.sub.Tensor)
        if pair is None or not isinstance(pair[0], Node) or not isinstance(pair[1], Node):
            return _checked(scores)
        x, largest = pair
        if is_op(largest, operator.getitem) and largest.args[1] == 0:
            largest = largest.args[0]
        if not is_op(largest, aten.max.dim, aten.amax.default) or largest.args[0] is not x:
            raise Stuck(scores, "something other than the largest score is subtracted from the scores")
        if dim_of(largest, 1, "dim", rank(x)) != rank(x) - 1 or arg(largest, 2, "keepdim", False) is not True:
            raise Stuck(scores, "the largest score is not taken for each query")
        _alone(scores)
        if set(x.users) != {scores, largest}:
            raise Stuck(x, "the scores have another reader than this attention")
        return x

    def _without_sink(self, scores: Node, part: tuple[Node, int, int, int, int] | None) -> tuple[Node, Node | None]:
        """(the scores of the keys, the sink [H] or None); the sink's weight is dropped after the softmax."""
        parts = scores.args[0] if is_op(scores, aten.cat.default) else None
        if not isinstance(parts, (list, tuple)) or dim_of(scores, 1, "dim", 4, 0) != 3:
            if part is not None:
                raise Stuck(self._softmax, "a part of the weights is dropped, and it is not a sink")
            return scores, None
        if len(parts) != 2 or static(shape(parts[1])[3]) != 1 or part is None:
            raise Stuck(scores, "something other than one sink is concatenated to the scores")
        size = int(shape(scores)[3])
        if part[1:] != (3, 0, size - 1, 1):
            raise Stuck(self._softmax, "what is dropped after the softmax is not the weight of the sink")
        return _checked(parts[0]), _of_each_head(parts[1])

    def _mask(self, scores: Node) -> tuple[Node, Any, bool]:
        """(scores without their mask, the mask or None, whether True in it means hidden)."""
        if is_op(scores, aten.masked_fill.Scalar) and _hides(scores.args[2]):
            return _node(scores.args[0]), scores.args[1], True
        if is_op(scores, aten.where.ScalarOther) and _hides(scores.args[2]):
            return _node(scores.args[1]), scores.args[0], False
        pair = binary(scores, aten.add.Tensor)
        if pair is None:
            return scores, None, False
        for x, mask in (pair, pair[::-1]):
            if _are_scores(x) and isinstance(mask, Node):
                return x, mask, False
        raise Stuck(scores, "the scores are not scale * q k^T + mask")


def _side(node: Node, term: str, wanted: str) -> Side | None:
    """`node`, or the input of its transposes, with the letters `wanted` [batch, heads, rows, width]; one head may be
    broadcast to all."""
    batch, heads, rows, width = wanted
    for candidate, letters in ((node, term), untransposed(node, term)):
        for head in (heads, ONE):
            if letters in (batch + head + rows + width, batch + rows + head + width):
                return Side(candidate, heads_first=letters[1] == head)
    return None


def _scaled(node: Node) -> tuple[Node, float]:
    """(x, c) of `node` = c * x, c a number."""
    scale = 1.0
    while True:
        if (pair := with_scalar(node, aten.mul.Tensor)) is not None:
            scale *= pair[1]
        elif (pair := with_scalar(node, aten.div.Tensor)) is not None and pair[1] != 0:
            scale /= pair[1]
        else:
            return node, scale
        node = pair[0]


def _unscaled(scores: Node) -> tuple[Node, float]:
    """(x, c) of `scores` = c * x, which nothing reads in between."""
    below, scale = _scaled(scores)
    while scores is not below:
        _alone(scores)
        scores = _node(scores.args[0] if isinstance(scores.args[0], Node) else scores.args[1])
    return below, scale


def _are_scores(node: Any) -> bool:
    if not isinstance(node, Node) or rank(node) != 4:
        return False
    below = _scaled(node)[0]
    if is_op(below, aten.tanh.default):
        below = _scaled(below.args[0])[0]
    return contraction(below) is not None


def _of_each_head(sink: Any) -> Node:
    """The values [H] that [1, H, T, 1] repeats over its tokens. Stuck if they differ between tokens."""
    source = sink
    if is_op(source, aten.expand.default):
        source = source.args[0]
    sizes = shape(source) if isinstance(source, Node) else ()
    if len(sizes) != 4 or any(static(size) != 1 for size in (sizes[0], *sizes[2:])):
        raise Stuck(sink, "the sink is not one score of each head")
    if not same_size(sizes[1], shape(sink)[1]) or value(source).dtype != torch.float32:
        raise Stuck(sink, "the sink is not one score of each head")
    below = unview(source) if is_op(source, *VIEWS) else source
    return below if rank(below) == 1 else source


def _node(operand: Any) -> Node:
    assert isinstance(operand, Node)
    return operand


def _hides(fill: Any) -> bool:
    number = scalar(fill)
    return number is not None and number <= HIDDEN


def _checked(node: Any) -> Node:
    _alone(_node(node))
    return _node(node)


def _alone(node: Node) -> None:
    """Stuck if anything else reads the scores, which fused attention does not return."""
    if len(node.users) != 1:
        raise Stuck(node, "the scores have another reader than this attention")
