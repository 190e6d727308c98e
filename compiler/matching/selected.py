"""Which tokens an expert of an unrolled loop serves, and with which weight: masks, their positions, dense weights.

N tokens, E experts, K experts per token, n tokens of one expert.

    indices == e, one_hot(indices)[..., e]         bool or 0/1 [N, K] (in either order): token t selects e at rank k
    (t, k) = nonzero(mask); t = nonzero(any(mask)) int64 [n]: the tokens of e, and the rank at which each selects it
    dense[t, e] = sum_k weights[t, k] (indices[t, k] == e)       [N, E]: scatter, or a product with one_hot and a sum
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import (
    CASTS,
    VIEWS,
    arg,
    aten,
    binary,
    dim_of,
    is_op,
    rank,
    same_size,
    scalar,
    shape,
    static,
    unview,
    value,
)

TOKENS, RANKS, EXPERTS = "token", "rank", "expert"
MULTIPLY = (aten.mul.Tensor,)


@dataclass(frozen=True)
class Mask:
    """True (or 1) where a token selects an expert; `dims` names the dimensions, `expert` is set once it is fixed."""

    indices: Node  # [N, K]
    dims: tuple[str, ...]
    expert: int | None


@dataclass(frozen=True)
class Positions:
    """One column of nonzero(mask): the token (or the rank) of every pair of an expert.

    Equal ones are equal values: the dimensions of the mask, in their order, say in which order the pairs are listed.
    """

    dims: tuple[str, ...]
    meaning: str
    expert: int
    indices: Node


@dataclass(frozen=True)
class Dense:
    """weights scattered over the experts, [N, E] in the order of `dims`; `expert` when one column was taken."""

    weights: Node  # [N, K]
    indices: Node  # [N, K]
    dims: tuple[str, ...]
    expert: int | None = None


# ---------------------------------------------------------------------------------------------------- masks of experts


def read_mask(node: Any) -> Mask | None:
    """None when `node` does not compare expert indices with experts."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if is_op(node, *CASTS):
        return read_mask(node.args[0])
    if is_op(node, aten.eq.Scalar) and rank(node) == 2:
        expert = node.args[1]
        return Mask(node.args[0], (TOKENS, RANKS), expert) if isinstance(expert, int) else None  # type: ignore[arg-type]
    if is_op(node, aten.eq.Scalar) and rank(node) == 1:
        one, expert = _one_rank(node.args[0]), node.args[1]
        return Mask(one, (TOKENS,), expert) if one is not None and isinstance(expert, int) else None
    if is_op(node, aten.one_hot.default) and rank(node) == 2:
        one = _one_rank(node.args[0])
        return None if one is None else Mask(one, (TOKENS, EXPERTS), None)
    if is_op(node, aten.one_hot.default) and rank(node) == 3:
        return Mask(node.args[0], (TOKENS, RANKS, EXPERTS), None)
    if is_op(node, aten.eq.Tensor):
        return _one_hot(node)
    if is_op(node, aten.eq.Scalar, aten.gt.Scalar, aten.ne.Scalar, aten.ge.Scalar):
        return None
    return _moved(node, read_mask)


def _one_rank(node: Any) -> Node | None:
    """[N, 1] of what is read as [N]: the indices, or the weights, of routers that choose one expert."""
    source = unview(node)
    one = rank(source) == 2 and static(shape(source)[1]) == 1 and same_size(shape(source)[0], shape(node)[0])
    return source if one else None


def _one_hot(node: Node) -> Mask | None:
    """indices[..., None] == arange(E)."""
    pair = binary(node, aten.eq.Tensor)
    if pair is None or rank(node) != 3:
        return None
    for picks, counted in (pair, pair[::-1]):
        if not isinstance(picks, Node) or not is_op(picks, aten.unsqueeze.default) or rank(picks.args[0]) != 2:
            continue
        if dim_of(picks, 1, "dim", 3) == 2 and _counts(counted, shape(node)[2]):
            return Mask(picks.args[0], (TOKENS, RANKS, EXPERTS), None)
    return None


def _counts(node: Any, size: Any) -> bool:
    """0, 1, ..., size - 1 along the last dimension."""
    while is_op(node, *VIEWS, *CASTS):
        node = node.args[0]
    if is_op(node, aten.arange.default):
        return node.args[0] == size
    return (
        is_op(node, aten.arange.start, aten.arange.start_step)
        and tuple(node.args[:2]) == (0, size)
        and node.args[2:] in ((), (1,))
    )


def _moved(node: Node, read: Any) -> Any:
    """Through permutations, and through taking one expert, of something that has `dims` and `expert`."""
    source: Any = node.args[0] if node.args else None
    if is_op(node, aten.permute.default, aten.transpose.int, aten.t.default):
        inner = read(source)
        if inner is None:
            return None
        order = list(range(len(inner.dims)))
        if node.target is aten.permute.default:
            turns: Any = node.args[1]
            order = [d % len(order) for d in turns]
        elif node.target is aten.transpose.int:
            a, b = (d % len(order) for d in node.args[1:3])
            order[a], order[b] = order[b], order[a]
        else:
            order.reverse()
        return _with(inner, dims=tuple(inner.dims[d] for d in order))
    if is_op(node, aten.select.int):
        inner = read(source)
        dim, index = dim_of(node, 1, "dim", rank(source)), node.args[2]
        if inner is None or dim is None or inner.dims[dim] != EXPERTS or not isinstance(index, int):
            return None
        return _with(inner, dims=_without(inner.dims, dim), expert=index % int(shape(source)[dim]))
    if node.target is operator.getitem and is_op(source, aten.unbind.int):
        inner = read(source.args[0])
        dim = dim_of(source, 1, "dim", rank(source.args[0]), 0)
        if inner is None or dim is None or inner.dims[dim] != EXPERTS:
            return None
        return _with(inner, dims=_without(inner.dims, dim), expert=int(node.args[1]))
    return None


def _with(inner: Any, **changes: Any) -> Any:
    return replace(inner, **changes)


def _without(dims: tuple[str, ...], dim: int) -> tuple[str, ...]:
    return dims[:dim] + dims[dim + 1 :]


def read_hit(node: Any) -> Mask | None:
    """bool [N] of the tokens that select an expert: any(mask over ranks), or sum(mask) > 0."""
    if is_op(node, aten.gt.Scalar, aten.ne.Scalar) and node.args[1] == 0:
        node = node.args[0]
        if not is_op(node, aten.sum.dim_IntList):
            return None
    elif not is_op(node, aten.any.dim, aten.any.dims):
        return None
    inner = read_mask(node.args[0])
    dim = dim_of(node, 1, "dim", rank(node.args[0]))
    if inner is None or dim is None or inner.expert is None or inner.dims[dim] != RANKS:
        return None
    return None if arg(node, 2, "keepdim", False) else Mask(inner.indices, _without(inner.dims, dim), inner.expert)


# ------------------------------------------------------------------------------------------------ positions of a mask


def read_positions(node: Any) -> Positions | None:
    """A column of nonzero(mask), or the mask of tokens itself: rows picked by it are those, in the same order."""
    column: int | None = 0
    while is_op(node, *VIEWS):
        node = node.args[0]
    if isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor) and value(node).dtype == torch.bool:
        hit = read_mask(node) or read_hit(node)
        whole = hit is not None and hit.expert is not None and hit.dims == (TOKENS,)
        return Positions(hit.dims, TOKENS, hit.expert, hit.indices) if whole else None  # type: ignore[union-attr,arg-type]
    source = node
    if is_op(node, aten.select.int) and dim_of(node, 1, "dim", 2) == 1:
        column, source = node.args[2], node.args[0]
    elif getattr(node, "target", None) is operator.getitem:
        column, source = node.args[1], node.args[0]
        if is_op(source, aten.unbind.int) and dim_of(source, 1, "dim", 2, 0) == 1:
            source = source.args[0]
        elif not is_op(source, aten.nonzero_numpy.default, aten.where.default):
            return None
    if not is_op(source, aten.nonzero.default, aten.nonzero_numpy.default, aten.where.default):
        return None
    mask = _truth(source.args[0])
    found = read_mask(mask) or read_hit(mask)
    if found is None or found.expert is None or not isinstance(column, int) or column >= len(found.dims):
        return None
    if len(found.dims) > 1 and source is node:
        return None  # all columns at once
    return Positions(found.dims, found.dims[column], found.expert, found.indices)


def _truth(node: Any) -> Any:
    """Below casts and comparisons that keep a 0/1 mask as it is: != 0, > 0."""
    while True:
        positive = is_op(node, aten.ne.Scalar, aten.gt.Scalar) and node.args[1] == 0
        if not is_op(node, *CASTS) and not (positive and read_mask(node.args[0]) is not None):
            return node
        node = node.args[0]


# ------------------------------------------------------------------------------------------------------- dense weights


def read_dense(node: Any) -> Dense | None:
    """Weights by expert: [N, E] in either order, or the column of one expert [N]; reshapes in between are skipped."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if is_op(node, *CASTS) and value(node).dtype == torch.float32:
        return read_dense(node.args[0])
    if is_op(node, *VIEWS) and _inserts_one(node):
        return read_dense(node.args[0])
    if is_op(node, aten.scatter.src, aten.scatter_add.default):
        base, dim, picks, weights = node.args[0], dim_of(node, 1, "dim", 2), node.args[2], node.args[3]
        if rank(node) == 2 and dim == 1 and _zeros(base):
            return Dense(weights, picks, (TOKENS, EXPERTS))
        return None
    if is_op(node, aten.sum.dim_IntList):
        return _summed(node)
    if is_op(node, aten.slice.Tensor):
        return _column(node)
    if is_op(node, *MULTIPLY):
        return _one_chosen(node)
    return _moved(node, read_dense)


def _one_chosen(node: Node) -> Dense | None:
    """weights * mask, both [N] (or [N, 1]), of a router that chooses one expert."""
    pair = binary(node, *MULTIPLY)
    for weights, picked in () if pair is None else (pair, pair[::-1]):
        while is_op(picked, *CASTS, *VIEWS):
            picked = picked.args[0]
        mask = read_mask(picked)
        if (
            mask is None
            or mask.dims != (TOKENS,)
            or not isinstance(weights, Node)
            or not _inserts_one_of(node, weights)
        ):
            continue
        one = _one_rank(weights)
        if one is not None:
            return Dense(one, mask.indices, (TOKENS,), mask.expert)
    return None


def _inserts_one(node: Node) -> bool:
    """A reshape that adds or drops dimensions of size one."""
    return _inserts_one_of(node, node.args[0])  # type: ignore[arg-type]


def _inserts_one_of(node: Node, source: Node) -> bool:
    """Two values of the same sizes, but for dimensions of size one."""
    return [s for s in map(str, shape(node)) if s != "1"] == [s for s in map(str, shape(source)) if s != "1"]


def _column(node: Node) -> Dense | None:
    """dense[:, e:e+1]"""
    source: Any = node.args[0]
    inner = read_dense(source)
    dim = dim_of(node, 1, "dim", rank(source), 0)
    first, last, step = arg(node, 2, "start", 0), arg(node, 3, "end"), arg(node, 4, "step", 1)
    if (
        inner is None
        or inner.expert is not None
        or dim is None
        or rank(source) != 2
        or inner.dims[dim] != EXPERTS
        or step != 1
    ):
        return None
    if not isinstance(first, int) or static(shape(node)[dim]) != 1:
        return None
    size = int(shape(source)[dim])
    begin = slice(first, last, 1).indices(size)[0]
    return _with(inner, dims=_without(inner.dims, dim), expert=begin)


def _summed(node: Node) -> Dense | None:
    """sum over ranks of weights * mask, or of where(mask, weights, 0)."""
    term: Any = node.args[0]
    options: list[tuple[Any, Any]] = []
    pair = binary(term, *MULTIPLY)
    if pair is not None:
        options = [pair, pair[::-1]]
    elif is_op(term, aten.where.self, aten.where.ScalarOther) and (term.args[2] == 0 or _zeros(term.args[2])):
        options = [(term.args[1], term.args[0])]
    for weights, picked in options:
        mask = read_mask(picked)
        if mask is None or not isinstance(weights, Node):
            continue
        dim = dim_of(node, 1, "dim", rank(term))
        if dim is None or len(mask.dims) != rank(term) or mask.dims[dim] != RANKS:
            continue
        flat = _aligned(weights, mask)
        if flat is None:
            continue
        return Dense(flat, mask.indices, _without(mask.dims, dim), mask.expert)
    return None


def _aligned(weights: Node, mask: Mask) -> Node | None:
    """weights [N, K], when they are broadcast so that they lie on the mask's tokens and ranks."""
    if mask.dims == (TOKENS, RANKS) and rank(weights) == 2:
        return weights
    if mask.dims == (TOKENS, RANKS, EXPERTS) and is_op(weights, aten.unsqueeze.default) and rank(weights) == 3:
        return weights.args[0] if dim_of(weights, 1, "dim", 3) == 2 else None
    return None


def _zeros(node: Any) -> bool:
    if is_op(node, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return True
    if is_op(node, aten.full.default, aten.full_like.default):
        return scalar(node.args[1]) == 0.0
    return is_op(node, aten.scalar_tensor.default) and scalar(node.args[0]) == 0.0


def is_zeros(node: Any) -> bool:
    """A tensor of zeros, through reshapes."""
    while is_op(node, *VIEWS, *CASTS):
        node = node.args[0]
    return _zeros(node)
