"""Read experts that a loop (or a product over all experts) spells out one by one.

    y = sum_e  dense[t, e] * mlp_e(x[t])               every expert sees every token
    y[t_e] += weights[t_e, k_e] * mlp_e(x[t_e])              each expert sees its own tokens, t_e, k_e = nonzero(mask_e)

The terms may be added in any order, but each of the E experts must be there once, read weights of its own, and have
the same form; their weights are stacked (lazily) in the order of the router's rows. N tokens, D model width, E experts,
F expert width.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from moec.compiler.matching.activation import MULTIPLY, read_activation
from moec.compiler.matching.contraction import contraction
from moec.compiler.matching.read import (
    CASTS,
    Stuck,
    advises,
    arg,
    aten,
    binary,
    dim_of,
    is_op,
    rank,
    same_shape,
    same_size,
    shape,
    static,
    unpad,
    unview,
)
from moec.compiler.matching.selected import Dense, Positions, is_zeros, read_dense, read_positions
from moec.compiler.ops.attributes import Experts
from moec.compiler.program import Editor

ADD_ROWS = (aten.index_add.default, aten.index_put.default, aten.scatter_add.default)


@dataclass(frozen=True)
class Piece:
    """The weight of one expert: a weight of its own [., .], or the `index`-th of a stacked one [E, ., .]."""

    weight: Node
    index: int | None = None


@dataclass(frozen=True)
class OneExpert:
    """One expert's MLP: up projections (gate first, or both in one), their biases, and the down projection."""

    ups: tuple[Piece, ...]
    down: Piece
    up_biases: tuple[Piece | None, ...]
    down_bias: Piece | None
    experts: Experts  # the layout is that of the pieces
    node: Node  # its output


@dataclass(frozen=True)
class Unrolled:
    """What a loop over experts computes, by expert in the order of the router's rows."""

    x: Node  # [N, D]
    weights: Node  # [N, K]
    indices: Node  # [N, K]
    experts: tuple[OneExpert, ...]
    apply: str = "output"  # the weights multiply the experts' outputs, or their inputs


@dataclass(frozen=True)
class _Term:
    """One summand: the value of one expert, the rows it is computed for, and how it is weighted."""

    value: Node
    tokens: Positions | None  # None: all tokens
    at: Node


def is_unrolled(end: Node) -> bool:
    """Whether `end` is a running sum over experts rather than one operator over a stacked dimension."""
    node = unpad(end)
    if is_op(node, *ADD_ROWS):
        return True
    pair = binary(node, aten.add.Tensor)
    if pair is None:
        return False
    # a sum of two things that are weighted by experts: the last term at least is a product with dense weights
    return any(isinstance(n, Node) and (_weighted(n) is not None or is_unrolled(n)) for n in pair)


@advises("add to zeros, once for each expert, its output times the weight that selected it")
def read_unrolled(edit: Editor, end: Node) -> Unrolled:
    """The experts whose weighted outputs are added up to `end` [N, D]."""
    terms = _terms(end)
    found: dict[int, OneExpert] = {}
    x = weights = indices = None
    for term in terms:
        expert, source, term_weights, term_indices, mlp = _read_term(edit, term)
        if expert in found:
            raise Stuck(term.at, f"expert {expert} is added twice")
        found[expert] = mlp
        x, weights, indices = x or source, weights or term_weights, indices or term_indices
        if unview(source) is not unview(x):
            raise Stuck(term.at, f"expert {expert} reads {source.name}, the others {x.name}")
        if term_weights is not weights or term_indices is not indices:
            raise Stuck(term.at, f"expert {expert} is not weighted like the others")
    if x is None or weights is None or indices is None:
        raise Stuck(end, "no expert is added here")
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise Stuck(end, f"expert {missing[0]} is not among the {len(found)} that are added")
    ordered = tuple(found[e] for e in range(len(found)))
    check_alike(ordered)
    return Unrolled(x, weights, indices, ordered)


@advises("stack the experts' outputs in their order and weigh them by the router's weights")
def read_stacked(edit: Editor, outputs: Node, weights: Node) -> Unrolled | None:
    """The experts of `outputs` = stack of every expert's rows, [N, E, D], or the K of each token gathered from it.

    `weights` [N, E, 1] or [N, K, 1] multiply them; None when `outputs` is no such stack.
    """
    outputs, weights = unpad(outputs), unpad(weights)
    source, indices = outputs, None
    if is_op(outputs, aten.gather.default) and rank(outputs) == 3 and dim_of(outputs, 1, "dim", 3) == 1:
        source, picks = unpad(outputs.args[0]), outputs.args[2]
        wide = picks.args[0] if is_op(picks, aten.expand.default) else None
        if not is_op(wide, aten.unsqueeze.default) or dim_of(wide, 1, "dim", 3) != 2:
            return None
        indices = wide.args[0]
    if not is_op(source, aten.stack.default) or dim_of(source, 1, "dim", 3, 0) != 1:
        return None
    if indices is None:
        dense = read_dense(weights)
        if dense is None or dense.dims != ("token", "expert"):
            raise Stuck(weights, "the outputs of all experts are not multiplied by weights scattered over the experts")
        weights, indices = dense.weights, dense.indices
    x = None
    experts = []
    for number, part in enumerate(source.args[0]):
        mlp, rows = read_mlp(edit, unpad(part))
        x = x or rows
        if unview(rows) is not unview(x):
            raise Stuck(part, f"expert {number} reads {rows.name}, the others {x.name}")
        experts.append(mlp)
    if x is None:
        return None
    check_alike(tuple(experts))
    return Unrolled(x, weights, indices, tuple(experts))


def check_alike(experts: tuple[OneExpert, ...]) -> None:
    """All experts have one form, one shape, and weights that no other one reads."""
    first = experts[0]
    seen: set[tuple[Node, int | None]] = set()
    for number, e in enumerate(experts):
        if e.experts != first.experts or len(e.ups) != len(first.ups):
            raise Stuck(e.node, f"expert {number} computes ({e.experts}), expert 0 ({first.experts})")
        pairs = zip((*e.ups, e.down), (*first.ups, first.down), strict=True)
        if any(piece_shape(a) != piece_shape(b) for a, b in pairs):
            raise Stuck(e.node, f"the weights of expert {number} have other shapes than those of expert 0")
        if [b is None for b in (*e.up_biases, e.down_bias)] != [b is None for b in (*first.up_biases, first.down_bias)]:
            raise Stuck(e.node, f"expert {number} and expert 0 do not have the same biases")
        for piece in (*e.ups, e.down, *e.up_biases, e.down_bias):
            if piece is None:
                continue
            if (piece.weight, piece.index) in seen:
                raise Stuck(e.node, f"expert {number} reads a weight that another projection reads already")
            seen.add((piece.weight, piece.index))


def piece_shape(piece: Piece) -> tuple[int, ...]:
    """The shape of one expert's weight: of the whole tensor, or of its slice along the first dimension."""
    full = shape(piece.weight)
    return tuple(int(s) for s in (full if piece.index is None else full[1:]))


# --------------------------------------------------------------------------------------------------------------- terms


def _terms(end: Node) -> list[_Term]:
    """The summands of a chain (or tree) of sums that starts from zeros."""
    terms: list[_Term] = []
    stack = [end]
    while stack:
        node = unpad(stack.pop())
        if static(shape(node)[-1]) != static(shape(end)[-1]):
            raise Stuck(node, "the terms of the sum are not rows as wide as the result")
        if is_zeros(node):
            continue
        if is_op(node, aten.add.Tensor, aten.add.Scalar) and 0 in [a for a in node.args[:2] if not isinstance(a, Node)]:
            stack.append(next(a for a in node.args[:2] if isinstance(a, Node)))
            continue
        pair = binary(node, aten.add.Tensor)
        if pair is not None and all(isinstance(n, Node) and same_shape(shape(n), shape(node)) for n in pair):
            stack += pair
            continue
        if is_op(node, *ADD_ROWS):
            into, tokens, value = _added_rows(node)
            terms.append(_Term(value, tokens, node))
            stack.append(into)
            continue
        terms.append(_Term(node, None, node))
    return terms


def _added_rows(node: Node) -> tuple[Node, Positions, Node]:
    """(what is added to, the tokens of the rows, the rows) of y[tokens] += rows."""
    into: Any = node.args[0]
    if is_op(node, aten.index_add.default) and node.kwargs.get("alpha", 1) == 1 and dim_of(node, 1, "dim", 2) == 0:
        where, rows = node.args[2], node.args[3]
    elif is_op(node, aten.index_put.default) and len(node.args[1]) == 1:
        where, rows = node.args[1][0], node.args[2]
        if arg(node, 3, "accumulate", False) is not True:
            rows = _plus_own_rows(node, into, where, rows)
    elif is_op(node, aten.scatter_add.default) and dim_of(node, 1, "dim", 2) == 0:
        where, rows = node.args[2], node.args[3]
        while is_op(where, aten.expand.default):
            where = where.args[0]
    else:
        raise Stuck(node, "rows are added in a way that no rule reads")
    tokens = read_positions(where)
    if tokens is None or tokens.meaning != "token":
        raise Stuck(node, "rows are added at tokens that are not those which select one expert")
    if rank(into) != 2:
        raise Stuck(node, "rows are added to what is not [N, D]")
    return into, tokens, rows


def _plus_own_rows(node: Node, into: Node, where: Any, rows: Any) -> Any:
    """r of y[t] = y[t] + r. The tokens of one expert are distinct: topk selects K different experts for each."""
    pair = binary(rows, aten.add.Tensor)
    for own, other in () if pair is None else (pair, pair[::-1]):
        if is_op(own, aten.index.Tensor) and own.args[0] is into and list(own.args[1]) == [where]:
            return other
    raise Stuck(node, "rows are overwritten, not added to")


def _weighted(node: Node) -> tuple[Node, Dense] | None:
    """(value, dense weights) of value * dense, for all tokens."""
    pair = binary(unpad(node), *MULTIPLY)
    for value, factor in () if pair is None else (pair, pair[::-1]):
        if not isinstance(factor, Node) or not isinstance(value, Node) or rank(factor) != 2 or rank(value) != 2:
            continue
        dense = read_dense(factor)
        if dense is not None and static(shape(factor)[-1]) == 1 and dense.dims == ("token",):
            return value, dense
    return None


def _read_term(edit: Editor, term: _Term) -> tuple[int, Node, Node, Node, OneExpert]:
    """(expert, x, weights [N, K], indices [N, K], its MLP)."""
    if term.tokens is None:
        found = _weighted(term.value)
        if found is None or found[1].expert is None:
            raise Stuck(term.value, "it is added to the experts' outputs and is not one expert times its weight")
        value, dense = found
        mlp, rows = read_mlp(edit, unpad(value))
        return found[1].expert, rows, dense.weights, dense.indices, mlp
    value, weights = _row_weighted(term)
    mlp, rows = read_mlp(edit, unpad(value))
    return term.tokens.expert, _rows_of(rows, term.tokens), weights, term.tokens.indices, mlp


def _row_weighted(term: _Term) -> tuple[Node, Node]:
    """(rows before they are weighted, weights [N, K]) of rows * weights[tokens, ranks]."""
    tokens = term.tokens
    assert tokens is not None
    value = unpad(term.value)
    while is_op(value, *CASTS):
        value = unpad(value.args[0])
    pair = binary(value, *MULTIPLY)
    for rows, factor in () if pair is None else (pair, pair[::-1]):
        if not isinstance(rows, Node) or not isinstance(factor, Node) or rank(rows) != 2 or rank(factor) != 2:
            continue
        if static(shape(factor)[-1]) != 1 or not same_size(shape(factor)[0], shape(rows)[0]):
            continue
        weights = _weights_of_rows(unpad(factor), tokens)
        if weights is not None:
            return rows, weights
    raise Stuck(value, f"the rows of expert {tokens.expert} are not multiplied by the weight that selected them")


def _weights_of_rows(factor: Node, tokens: Positions) -> Node | None:
    """weights [N, K] when `factor` is weights[t, k] of the pairs of one expert, or dense[t, e]."""
    if is_op(factor, aten.index.Tensor):
        source, picks = factor.args[0], list(factor.args[1])
        dense = read_dense(source)
        if len(picks) == 1 and dense is not None and dense.dims == ("token",):
            same = _same_tokens(picks[0], tokens) and dense.expert == tokens.expert and dense.indices is tokens.indices
            return dense.weights if same else None
        if len(picks) == 1 and static(shape(tokens.indices)[1]) == 1 and _same_tokens(picks[0], tokens):
            one = unview(source)  # one expert a token: its weights as [N], or [N, 1]
            fits = rank(one) == 2 and static(shape(one)[1]) == 1 and rank(source) <= 2  # type: ignore[arg-type]
            return one if fits else None
        if rank(source) == 3 and static(shape(source)[2]) == 1:
            source = unpad(source)  # the weights of the pairs as a column
        if len(picks) == 2 and rank(source) == 2 and _same_tokens(picks[0], tokens):
            ranks = read_positions(picks[1])
            same = ranks is not None and replace(ranks, meaning="token") == tokens  # listed in one order
            return source if same and ranks is not None and ranks.meaning == "rank" else None  # type: ignore[return-value]
    if is_op(factor, aten.select.int) and is_op(factor.args[0], aten.index.Tensor) and dim_of(factor, 1, "dim", 2) == 1:
        gathered: Any = factor.args[0]
        dense = read_dense(gathered.args[0])
        whole = dense is not None and dense.dims == ("token", "expert") and factor.args[2] == tokens.expert
        if whole and dense is not None and len(gathered.args[1]) == 1 and _same_tokens(gathered.args[1][0], tokens):
            return dense.weights if dense.indices is tokens.indices else None
    return None


def _same_tokens(node: Any, tokens: Positions) -> bool:
    """The tokens of the same expert, listed in the same order."""
    found = read_positions(node)
    return found is not None and found == tokens


def _rows_of(rows: Node, tokens: Positions) -> Node:
    """x [N, D] of x[tokens]."""
    node = unpad(rows)
    if is_op(node, aten.index.Tensor):
        source, picks = node.args[0], [p for p in node.args[1] if p is not None]
        lead = len(node.args[1]) - len(picks)
        ones = all(static(s) == 1 for s in shape(source)[:lead])
        if len(picks) == 1 and node.args[1][-1] is picks[0] and ones and _same_tokens(picks[0], tokens):
            while rank(source) > 2 and is_op(source, aten.unsqueeze.default):
                source = source.args[0]
            return source
    elif (
        is_op(node, aten.index_select.default) and dim_of(node, 1, "dim", 2) == 0 and _same_tokens(node.args[2], tokens)
    ):
        return node.args[0]
    raise Stuck(node, f"expert {tokens.expert} does not read the tokens that select it")


# ----------------------------------------------------------------------------------------------------- one expert's MLP


@dataclass(frozen=True)
class _Linear:
    rows: Node
    piece: Piece
    bias: Piece | None
    in_out: bool


@advises("give every expert linears of its own: down(act(gate(x)) * up(x))")
def read_mlp(edit: Editor, output: Node) -> tuple[OneExpert, Node]:
    """(the MLP, the rows it reads) of one expert's output."""
    down = _linear(edit, output)
    activation = read_activation(unpad(down.rows))
    ups = [_linear(edit, unpad(n)) for n in (activation.gate, activation.up) if n is not None]
    gate = ups[0]
    if any(u.rows is not gate.rows or u.in_out != gate.in_out for u in ups):
        raise Stuck(output, "gate and up do not read the same rows in the same layout")
    if gate.in_out != down.in_out:
        raise Stuck(output, "one projection is stored [in, out], the other [out, in]")
    if any((u.bias is None) != (gate.bias is None) for u in ups):
        raise Stuck(gate.rows, "only one of gate and up has a bias")
    inner = piece_shape(down.piece)[0 if gate.in_out else 1]
    wide = [piece_shape(u.piece)[1 if gate.in_out else 0] for u in ups]
    expected = 2 * inner if activation.experts.gated and len(ups) == 1 else inner
    if any(w != expected for w in wide):
        raise Stuck(output, f"the up projection is {wide[0]} wide, the down projection reads {inner}")
    experts = replace(activation.experts, layout="in_out" if gate.in_out else "out_in")
    mlp = OneExpert(tuple(u.piece for u in ups), down.piece, tuple(u.bias for u in ups), down.bias, experts, output)
    return mlp, gate.rows


def _linear(edit: Editor, node: Node) -> _Linear:
    """rows times one expert's weight, plus its bias."""
    pair = binary(node, aten.add.Tensor)
    for product, bias in () if pair is None else (pair, pair[::-1]):
        if isinstance(product, Node) and isinstance(bias, Node) and _piece(edit, unpad(bias), 1) is not None:
            inner = _linear(edit, unpad(product))
            if inner.bias is None:
                return replace(inner, bias=_bias(edit, bias, node))
    found = contraction(node)
    own = None if found is None else found.split(lambda operand: _piece(edit, operand, 2) is not None)
    if found is None or own is None or own.matrix is None:
        raise Stuck(node, "expected a linear of one expert's own weight")
    piece = _piece(edit, own.weight, 2)
    assert piece is not None
    return _Linear(own.rows, piece, _bias(edit, found.bias, node), own.matrix)


def _bias(edit: Editor, node: Any, at: Node) -> Piece | None:
    if node is None:
        return None
    piece = _piece(edit, unpad(node), 1)
    if piece is None:
        raise Stuck(at, "the bias is not a weight")
    return piece


def _piece(edit: Editor, node: Any, dims: int) -> Piece | None:
    """A weight with `dims` dimensions, or one that is taken from a stack."""
    if not isinstance(node, Node):
        return None
    if edit.weight_of(node) is not None:
        return Piece(node) if rank(node) == dims else None
    source: Any = node.args[0] if node.args else None
    index: Any = None
    if is_op(node, aten.select.int) and dim_of(node, 1, "dim", dims + 1) == 0:
        index = node.args[2]
    elif node.target is operator.getitem and is_op(source, aten.unbind.int):
        if dim_of(source, 1, "dim", dims + 1, 0) != 0:
            return None
        index, source = node.args[1], source.args[0]
    if not isinstance(index, int) or not isinstance(source, Node) or edit.weight_of(source) is None:
        return None
    if rank(source) != dims + 1:
        return None
    return Piece(source, index % int(shape(source)[0]))
