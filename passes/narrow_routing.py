"""Narrow routing: a router's computation over all E experts becomes one over the K that topk chose, [N, E] -> [N, K].

With idx = topk(s, K).indices, chosen = 0.scatter(idx, 1) and v[idx] = 0.scatter(idx, v), over the last dimension:

    max(s), argmax(s), sort(s, descending)[:K]                                    ->  topk(s, 1), topk(s, K)
    s * chosen, where(chosen, s, 0), s.masked_fill(~chosen, 0)                    ->  gather(s, idx)[idx]
    f(s.masked_fill(~chosen, -inf)), f(-inf.scatter(idx, v)), f softmax, sigmoid  ->  f(gather(s, idx))[idx], f(v)[idx]
    v[idx] / (sum(v[idx]) + eps), v[idx] * c                                      ->  (v / (sum(v) + eps))[idx], ...

Exact except for the order of a sum, in which the other experts are zeros. The indices of a topk are distinct, so no
element is scattered to twice. Among equal scores max takes the first, topk any. fuse_moe reads the scattered form.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import CASTS, VIEWS, arg, aten, binary, dim_of, is_op, rank, scalar, shape, with_scalar
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Stage

LOWEST = torch.finfo(torch.float32).min
PICKS = {
    aten.eq.Scalar, aten.eq.Tensor, aten.one_hot.default, aten.index.Tensor, aten.index_select.default,
    aten.gather.default,
}  # fmt: skip
READERS = 60  # nodes between an index and what it picks


def narrow_routing() -> Pass:
    return Pass("narrow_routing", _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    changed = 0
    for node in list(edit.graph.nodes):
        if node.op == "call_function" and node.users:
            changed += _narrow(edit, node)
    return PassResult(edit.done(), changed) if changed else PassResult(program, 0)


def _narrow(edit: Editor, node: Node) -> bool:
    best = _best(edit, node)
    if best:
        return True
    found = _narrowed(edit, node)
    if found is None:
        return False
    values, indices = found
    with edit.graph.inserting_before(node):
        zeros = edit.call(aten.zeros_like.default, node, like=node)
        wide = edit.call(aten.scatter.src, zeros, rank(node) - 1, indices, values, like=node)
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not zeros)
    zeros.args = (_shape_of(node),)
    return True


def _shape_of(node: Node) -> Node:
    """An operand with the shape and type of `node`, so that `node` itself is read no more."""
    return next(n for n in node.all_input_nodes if _alike(n, node))


def _of_shape(mask: Any, node: Node) -> bool:
    """A mask of its own for every row: none is broadcast."""
    return isinstance(mask, Node) and str(shape(mask)) == str(shape(node))


def _alike(a: Any, b: Node) -> bool:
    x, y = (n.meta.get("val") if isinstance(n, Node) else None for n in (a, b))
    same = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    return same and x.dtype == y.dtype and str(tuple(x.shape)) == str(tuple(y.shape))


# ------------------------------------------------------------------------------------------------- the best, as a topk


def _best(edit: Editor, node: Node) -> bool:
    """max, argmax and sort as topk, where what they choose picks experts."""
    source: Any = node.args[0] if node.args else None
    if not is_op(node, aten.max.dim, aten.argmax.default, aten.sort.default) or rank(source) < 2:
        return False
    last = rank(source) - 1
    if not source.meta["val"].is_floating_point() or not isinstance(shape(source)[-1], int):
        return False
    if node.target is aten.sort.default:
        return _sorted(edit, node, source, last)
    if dim_of(node, 1, "dim", rank(source)) != last:
        return False
    keep = arg(node, 2, "keepdim", False) is True
    if node.target is aten.argmax.default:
        parts: dict[int, list[Node]] = {1: [node]}
    else:
        parts = {i: [u for u in node.users if u.args[1] == i] for i in (0, 1)}
    if not any(_picks(index) for index in parts[1]):
        return False
    with edit.graph.inserting_before(node):
        topk = edit.call(aten.topk.default, source, 1, last, like=node)
    for which, olds in parts.items():
        for old in olds:
            with edit.graph.inserting_before(old):
                new = _item(edit, topk, which)
                new = new if keep else edit.call(aten.squeeze.dim, new, last, like=old)
            old.replace_all_uses_with(new)
    return True


def _item(edit: Editor, topk: Node, which: int) -> Node:
    return edit.call(operator.getitem, topk, which, like=topk)


def _sorted(edit: Editor, node: Node, source: Node, last: int) -> bool:
    """sort(s, descending) of which only the first K are read."""
    if arg(node, 2, "descending", False) is not True or dim_of(node, 1, "dim", rank(source), -1) != last:
        return False
    cuts = [cut for item in node.users for cut in item.users]
    ends = {arg(c, 3, "end") if is_op(c, aten.slice.Tensor) else None for c in cuts}
    first = all(
        is_op(c, aten.slice.Tensor)
        and dim_of(c, 1, "dim", rank(source), 0) == last
        and arg(c, 2, "start") in (None, 0)
        and arg(c, 4, "step", 1) == 1
        for c in cuts
    )
    end = next(iter(ends)) if len(ends) == 1 else None
    if not first or not isinstance(end, int) or not 0 < end < shape(source)[-1]:
        return False
    if not any(_picks(c) for item in node.users if item.args[1] == 1 for c in item.users):
        return False
    with edit.graph.inserting_before(node):
        topk = edit.call(aten.topk.default, source, end, last, like=node)
    for item in list(node.users):
        for cut in list(item.users):
            with edit.graph.inserting_before(cut):
                new = _item(edit, topk, int(item.args[1]))  # type: ignore[call-overload]
            cut.replace_all_uses_with(new)
    return True


def _picks(index: Node) -> bool:
    """An index that is compared with experts, or with which something is picked."""
    seen, queue = {index}, [index]
    while queue and len(seen) < READERS:
        for user in queue.pop().users:
            if user.target in PICKS:
                return True
            if is_op(user, *VIEWS, *CASTS, aten.expand.default) and user not in seen:
                seen.add(user)
                queue.append(user)
    return False


# ------------------------------------------------------------------------------------------- weights of chosen experts


def _narrowed(edit: Editor, node: Node) -> tuple[Node, Node] | None:
    """(values [.., K], indices [.., K]) of a value that is zero but for the experts that topk chose."""
    if not _is_scores(node):
        return None
    last = rank(node) - 1
    if is_op(node, aten.softmax.int, aten._softmax.default, aten.sigmoid.default):
        if node.target is not aten.sigmoid.default and dim_of(node, 1, "dim", rank(node)) != last:
            return None
        hidden = _masked(edit, node, node.args[0], -math.inf)
        if hidden is None:
            return None
        with edit.graph.inserting_before(node):
            rest = node.args[1:]
            return edit.call(node.target, hidden[0], *rest, like=node, **node.kwargs), hidden[1]
    if is_op(node, aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _masked(edit, node, node, 0.0)
    scaled = with_scalar(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
    if scaled is not None:
        wide = _scattered(scaled[0])
        if wide is None or scaled[1] == 0:
            return None
        with edit.graph.inserting_before(node):
            return edit.call(node.target, wide[0], scaled[1], like=node), wide[1]
    ratio = binary(node, aten.div.Tensor)
    if ratio is not None:
        return _normalized(edit, node, *ratio)
    pair = binary(node, aten.mul.Tensor)
    for scores, mask in () if pair is None else (pair, pair[::-1]):
        chosen = _chosen(mask)
        if chosen is not None and chosen[1] and _of_shape(mask, node) and _alike(scores, node):
            return _gathered(edit, node, scores, chosen[0]), chosen[0]
    return None


def _is_scores(node: Node) -> bool:
    result = node.meta.get("val")
    return isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.dim() >= 2


def _gathered(edit: Editor, at: Node, scores: Node, indices: Node) -> Node:
    with edit.graph.inserting_before(at):
        return edit.call(aten.gather.default, scores, rank(scores) - 1, indices, like=at)


def _masked(edit: Editor, at: Node, node: Any, fill: float) -> tuple[Node, Node] | None:
    """(values, indices) of scores that were filled with `fill` where no expert was chosen."""
    if is_op(node, aten.scatter.src) and fill != 0.0:
        wide = _scattered(node, fill)
        return wide
    if is_op(node, aten.where.self, aten.where.ScalarOther):
        mask, scores, other, kept = node.args[0], node.args[1], node.args[2], True
    elif is_op(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        mask, scores, other, kept = node.args[1], node.args[0], node.args[2], False
    else:
        return None
    chosen = _chosen(mask)
    if chosen is None or chosen[1] is not kept or not _is(other, fill):
        return None
    if not _of_shape(mask, node) or not _alike(scores, node):
        return None
    return _gathered(edit, at, scores, chosen[0]), chosen[0]


def _normalized(edit: Editor, node: Node, weights: Any, total: Any) -> tuple[Node, Node] | None:
    """weights / clamp(sum(weights) + eps) of scattered weights."""
    wide = _scattered(weights)
    steps: list[Node] = []
    below = total
    while isinstance(below, Node) and (
        is_op(below, aten.clamp.default, aten.clamp_min.default)
        or with_scalar(below, aten.add.Tensor, aten.add.Scalar) is not None
    ):
        steps.append(below)
        below = below.args[0]
    if wide is None or not is_op(below, aten.sum.dim_IntList) or below.args[0] is not weights:
        return None
    if dim_of(below, 1, "dim", rank(node)) != rank(node) - 1 or arg(below, 2, "keepdim", False) is not True:
        return None
    with edit.graph.inserting_before(node):
        result = edit.call(below.target, wide[0], *below.args[1:], like=below, **below.kwargs)
        for step in reversed(steps):
            result = edit.call(step.target, result, *step.args[1:], like=step, **step.kwargs)
        return edit.call(node.target, wide[0], result, like=node), wide[1]


def _scattered(node: Any, fill: float = 0.0) -> tuple[Node, Node] | None:
    """(values, indices) of `fill` but for values at the indices that topk gives."""
    if not is_op(node, aten.scatter.src) or dim_of(node, 1, "dim", rank(node)) != rank(node) - 1:
        return None
    indices, values = node.args[2], node.args[3]
    if not _from_topk(indices, node) or not _is(node.args[0], fill) or not isinstance(values, Node):
        return None
    return (values, indices) if shape(values) == shape(indices) else None


def _chosen(mask: Any) -> tuple[Node, bool] | None:
    """(indices, True) of a mask that is one for the experts that topk chose; (indices, False) of its complement."""
    kept = True
    while isinstance(mask, Node):
        positive = is_op(mask, aten.ne.Scalar, aten.gt.Scalar) and mask.args[1] == 0
        inverse = is_op(mask, aten.logical_not.default, aten.bitwise_not.default) and _is_bool(mask)
        inverse = inverse or (is_op(mask, aten.eq.Scalar) and mask.args[1] == 0)
        if not (positive or inverse or is_op(mask, *CASTS)):
            break
        mask, kept = mask.args[0], kept is not inverse
    if is_op(mask, aten.scatter.value, aten.scatter.src):
        if dim_of(mask, 1, "dim", rank(mask)) != rank(mask) - 1 or not _from_topk(mask.args[2], mask):
            return None
        if mask.target is aten.scatter.src and shape(mask.args[3]) != shape(mask.args[2]):
            return None
        if _is(mask.args[0], 0.0) and _is(mask.args[3], 1.0):
            return mask.args[2], kept
        if _is(mask.args[0], 1.0) and _is(mask.args[3], 0.0):
            return mask.args[2], not kept
        return None
    over = is_op(mask, aten.sum.dim_IntList, aten.any.dim, aten.amax.default)
    if not over or arg(mask, 2, "keepdim", False) is True:
        return None
    hot = mask.args[0]
    while is_op(hot, *CASTS):
        hot = hot.args[0]
    if not is_op(hot, aten.one_hot.default) or dim_of(mask, 1, "dim", rank(hot)) != rank(hot) - 2:
        return None
    return (hot.args[0], kept) if _from_topk(hot.args[0], mask) else None


def _is_bool(node: Node) -> bool:
    return node.meta["val"].dtype == torch.bool


def _from_topk(indices: Any, wide: Node) -> bool:
    """Indices that topk chose among the experts of `wide`: different ones, of as many."""
    getitem = isinstance(indices, Node) and is_op(indices.args[0] if indices.args else None, aten.topk.default)
    if not getitem or indices.args[1] != 1:
        return False
    topk: Any = indices.args[0]
    source = topk.args[0]
    last = dim_of(topk, 2, "dim", rank(source), -1) == rank(source) - 1
    return last and str(shape(source)) == str(shape(wide))


def _is(value: Any, number: float) -> bool:
    """A number, or a tensor filled with it; any of the lowest numbers will do for -inf."""
    if isinstance(value, bool):
        value = float(value)
    found = scalar(value)
    if found is None and isinstance(value, Node):
        while is_op(value, *VIEWS, *CASTS, aten.expand.default):
            value = value.args[0]
        if is_op(value, aten.full.default, aten.full_like.default, aten.new_full.default):
            found = scalar(value.args[2] if value.target is aten.new_full.default else value.args[1])
            found = float(value.args[1]) if found is None and isinstance(value.args[1], bool) else found
        elif is_op(value, aten.scalar_tensor.default):
            found = scalar(value.args[0])
        elif is_op(value, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
            found = 0.0
        elif is_op(value, aten.ones.default, aten.ones_like.default, aten.new_ones.default):
            found = 1.0
    if found is None:
        return False
    return found <= LOWEST if number == -math.inf else found == number
