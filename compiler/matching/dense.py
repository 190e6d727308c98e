"""Read experts that all see all tokens, as products over their stacked weights.

    y[n] = sum_e  dense[n, e] * (act(x[n] W1[e]) W2[e])              einsum, bmm or matmul over all E
    y[n] = sum_e  act((dense[n, e] * x[n]) W1[e]) W2[e]                 the same, weighted before the experts

Outputs are [N, E, D] or [E, N, D]; what each dimension means is carried along as a text of `n`, `e` and `f` (feature).
N tokens, D model width, E experts, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from moec.compiler.matching.activation import MULTIPLY, read_activation
from moec.compiler.matching.contraction import ONE, Contraction, Product, contraction
from moec.compiler.matching.loops import OneExpert, Piece, Unrolled
from moec.compiler.matching.read import (
    Stuck,
    advises,
    aten,
    binary,
    dim_of,
    is_op,
    rank,
    same_shape,
    same_size,
    shape,
    static,
    token_rows,
    unview,
)
from moec.compiler.matching.selected import Dense, read_dense
from moec.compiler.program import Editor

TOKENS_FIRST, EXPERTS_FIRST = "nef", "enf"
MEANING = {TOKENS_FIRST: ("token", "expert"), EXPERTS_FIRST: ("expert", "token")}


@dataclass(frozen=True)
class _Product:
    """Every row times every expert's weight, plus its bias. `dims` are those of `rows`; None: all experts read x."""

    rows: Node
    dims: str | None
    weight: Node  # [E, ., .]
    in_out: bool
    bias: Node | None  # [E, out]
    node: Node


def read_all_experts(edit: Editor, end: Node) -> Unrolled | None:
    """The experts whose weighted outputs for all tokens are summed to `end` [N, D]; None when it is no such sum."""
    node = unview(end)
    found = contraction(node)
    if found is not None:
        return _by_product(edit, node, found)
    if not is_op(node, aten.sum.dim_IntList) or rank(node.args[0]) != 3:  # type: ignore[arg-type]
        return None
    dim = dim_of(node, 1, "dim", 3)
    summed = _same(node.args[0])
    pair = binary(summed, *MULTIPLY)
    for outputs, factor in () if pair is None else (pair, pair[::-1]):
        if not isinstance(outputs, Node) or not isinstance(factor, Node) or rank(factor) != 3 or rank(outputs) != 3:
            continue
        if static(shape(factor)[2]) != 1 or not same_shape(shape(outputs), shape(summed)):
            continue
        if dim == 1 and is_op(_same(outputs), aten.gather.default):
            return _gathered(edit, _same(outputs), factor)
        for dims in (TOKENS_FIRST, EXPERTS_FIRST):
            if dim == dims.index("e") and _is_product(edit, outputs):
                return _weighted(edit, outputs, dims, read_dense(factor), factor)
    if dim == 0 and _is_product(edit, summed):
        return _read(edit, summed, EXPERTS_FIRST, None)
    return None


def _by_product(edit: Editor, node: Node, found: Contraction) -> Unrolled | None:
    """A product of outputs, three letters, with dense weights, two of them, in any spelling."""
    product = found.split(lambda operand: rank(operand) == 3 and _is_product(edit, operand))
    if product is None:
        return None
    product = product.without_ones()
    if len(product.rows_term) != 2 or len(product.result) != 2:
        return None
    outputs, all_of, weights = product.weight, product.weight_term, product.rows_term
    n, f = product.result
    e = next((c for c in weights if c != n), "")
    if set(all_of) != {n, e, f} or set(weights) != {n, e} or len({n, e, f}) != 3:
        raise Stuck(node, "the product does not sum the weighted outputs of all experts")
    dense = read_dense(product.rows)
    if dense is not None and weights == e + n:
        dense = replace(dense, dims=dense.dims[::-1])
    dims = all_of.translate(str.maketrans(n + e + f, "nef"))
    return _weighted(edit, outputs, dims, dense, product.rows, ("token", "expert"))


def _weighted(
    edit: Editor, outputs: Node, dims: str, dense: Dense | None, at: Node, order: tuple[str, str] | None = None
) -> Unrolled:
    wanted = order or MEANING[dims]
    if dense is None or dense.expert is not None or dense.dims != wanted:
        raise Stuck(at, "the outputs of all experts are not multiplied by weights scattered over the experts")
    return _read(edit, outputs, dims, dense)


def _gathered(edit: Editor, node: Node, weights: Node) -> Unrolled | None:
    """outputs [N, E, D] of which each token's K are gathered, times weights [N, K, 1]."""
    outputs, picks = node.args[0], node.args[2]
    wide = picks.args[0] if is_op(picks, aten.expand.default) else None  # type: ignore[union-attr]
    if dim_of(node, 1, "dim", 3) != 1 or not _is_product(edit, outputs):
        return None
    if not is_op(wide, aten.unsqueeze.default) or dim_of(wide, 1, "dim", 3) != 2:  # type: ignore[arg-type]
        raise Stuck(node, "the outputs are not gathered by the indices of the experts")
    if not same_size(shape(picks)[2], shape(outputs)[2]):  # type: ignore[arg-type]
        raise Stuck(node, "only a part of the outputs is gathered")
    found = Dense(unview(weights), wide.args[0], ("token", "expert"))  # type: ignore[union-attr,arg-type]
    return _read(edit, outputs, TOKENS_FIRST, found)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- the experts


@advises("let all experts have one form, their weights stacked [E, in, out] or [E, out, in]")
def _read(edit: Editor, outputs: Node, dims: str, dense: Dense | None) -> Unrolled:
    """The experts of `outputs`, of dimensions `dims`; their weights are `dense`, or were multiplied to their rows."""
    down = _product(edit, outputs, dims)
    if down.dims is None or not down.dims.endswith("f"):
        raise Stuck(down.node, "the down projection does not read the features of every expert")
    activation = read_activation(_same(down.rows))
    ups = [_product(edit, n, down.dims) for n in (activation.gate, activation.up) if n is not None]
    gate = ups[0]
    for up in ups:
        if up.rows is not gate.rows or up.dims != gate.dims:
            raise Stuck(up.node, "gate and up do not read the same rows")
        if up.in_out != down.in_out:
            raise Stuck(down.node, "one projection is stored [E, in, out], the other [E, out, in]")
        if shape(up.weight)[0] != shape(down.weight)[0]:
            raise Stuck(up.node, "the projections have different numbers of experts")
        if (up.bias is None) != (gate.bias is None):
            raise Stuck(gate.node, "only one of gate and up has a bias")
    if len({up.weight for up in ups} | {down.weight}) != len(ups) + 1:
        raise Stuck(gate.node, "two projections read one weight")
    inner = shape(down.weight)[1 if down.in_out else 2]
    wide = shape(gate.weight)[2 if down.in_out else 1]
    if wide != (2 * inner if activation.experts.gated and len(ups) == 1 else inner):
        raise Stuck(gate.node, f"the up projection is {wide} wide, the down projection reads {inner}")
    x, apply = gate.rows, "output"
    if gate.dims is not None:
        x, found = _weighted_rows(edit, gate)
        if dense is not None:
            raise Stuck(gate.rows, "the experts are weighted both before and after")
        dense, apply = found, "input"
    if dense is None:
        raise Stuck(outputs, "the experts' outputs are not multiplied by combine weights")
    experts = replace(activation.experts, layout="in_out" if down.in_out else "out_in")
    each = tuple(
        OneExpert(
            tuple(Piece(up.weight, e) for up in ups),
            Piece(down.weight, e),
            tuple(None if up.bias is None else Piece(up.bias, e) for up in ups),
            None if down.bias is None else Piece(down.bias, e),
            experts,
            outputs,
        )
        for e in range(int(shape(down.weight)[0]))
    )
    return Unrolled(x, dense.weights, dense.indices, each, apply)


def _weighted_rows(edit: Editor, product: _Product) -> tuple[Node, Dense]:
    """(x [N, D], dense weights) of rows [E, N, D] = dense[n, e] * x[n]."""
    rows = unview(product.rows)
    pair = binary(rows, *MULTIPLY)
    for source, factor in () if pair is None or product.dims != EXPERTS_FIRST else (pair, pair[::-1]):
        if not isinstance(source, Node) or not isinstance(factor, Node) or static(shape(factor)[-1]) != 1:
            continue
        x = _repeated(source, int(shape(product.weight)[0]))
        dense = read_dense(unview(factor))
        if x is not None and dense is not None and dense.expert is None and dense.dims == MEANING[EXPERTS_FIRST]:
            return x, dense
    raise Stuck(rows, "the experts do not all read the same rows, nor those times their weights")


def _repeated(node: Node, count: int) -> Node | None:
    """x [N, D] of x repeated for `count` experts, [E, N, D] or [E * N, D] in this order."""
    node = unview(node)
    source: Any = node.args[0] if node.args else None
    if is_op(node, aten.repeat.default):
        times = list(node.args[1])  # type: ignore[arg-type]
        once = rank(source) == 2 or (rank(source) == 3 and static(shape(source)[0]) == 1)
        if not once or len(times) != rank(source) or times[0] != count or any(t != 1 for t in times[1:]):
            return None
    elif is_op(node, aten.expand.default):
        wide = rank(node) == 3 and rank(source) == 3 and static(shape(node)[0]) == count
        if not wide or static(shape(source)[0]) != 1 or not same_shape(shape(source)[1:], shape(node)[1:]):
            return None
    else:
        return None
    x = token_rows(source, shape(source)[-1])
    return x if rank(x) == 2 and same_size(shape(x)[1], shape(source)[-1]) else None


# ------------------------------------------------------------------------------------------------------- products


def _same(node: Any) -> Node:
    """Through reshapes that end in the shape they began with."""
    inner = unview(node)
    return inner if same_shape(shape(inner), shape(node)) else node


def _is_product(edit: Editor, node: Any) -> bool:
    """Whether `node` is a product over the stacked weights of all experts, with or without a bias."""
    if not isinstance(node, Node) or rank(node) != 3:
        return False
    node = _same(node)
    if is_op(node, aten.permute.default, aten.transpose.int):
        return _is_product(edit, node.args[0])
    if is_op(node, aten.add.Tensor):
        return any(_is_product(edit, n) for n in node.args)
    found = contraction(node)
    return found is not None and _over_stack(edit, found) is not None


def _over_stack(edit: Editor, found: Contraction) -> Product | None:
    """The product as rows times a weight [E, ., .]; None for any other."""
    return found.split(lambda operand: edit.weight_of(operand) is not None and rank(operand) == 3)


def _product(edit: Editor, node: Node, dims: str) -> _Product:
    node = _same(node)
    if is_op(node, aten.permute.default, aten.transpose.int) and rank(node) == 3:
        order = [0, 1, 2]
        if node.target is aten.permute.default:
            order = [int(d) % 3 for d in node.args[1]]  # type: ignore[union-attr,arg-type]
        else:
            a, b = (d % 3 for d in node.args[1:3])  # type: ignore[operator]
            order[a], order[b] = order[b], order[a]
        return _product(edit, node.args[0], "".join(dims[order.index(d)] for d in range(3)))  # type: ignore[arg-type]
    total = binary(node, aten.add.Tensor)
    for value, bias in () if total is None else (total, total[::-1]):
        if isinstance(value, Node) and isinstance(bias, Node) and _is_product(edit, value):
            inner = _product(edit, value, dims)
            if inner.bias is None:
                return replace(inner, bias=_bias(edit, bias, inner, dims))
    found = contraction(node)
    product = None if found is None else _over_stack(edit, found)
    if product is not None:
        return _contracted(node, product, dims)
    raise Stuck(node, "expected a product with the stacked weights of all experts (einsum, bmm or matmul)")


def _bias(edit: Editor, node: Node, product: _Product, dims: str) -> Node:
    """The bias [E, out], broadcast over the tokens."""
    bias = unview(node)
    count, out = shape(product.weight)[0], shape(product.weight)[2 if product.in_out else 1]
    sizes = {"e": count, "n": 1, "f": out}
    broadcast = (1,) * (3 - rank(node)) + shape(node)
    if edit.weight_of(bias) is None or shape(bias) != (count, out) or broadcast != tuple(sizes[d] for d in dims):
        raise Stuck(node, "what is added to the product is not a bias of each expert")
    return bias


def _contracted(node: Node, product: Product, dims: str) -> _Product:
    """[N, D], or [N, E, F] in any order, with weights [E, ., .]; the result is `dims`."""
    wrong = Stuck(node, "the product does not multiply every token with every expert")
    weight, rows, result = product.weight_term, product.rows_term.replace(ONE, ""), product.result
    if len(result) != 3 or len(rows) not in (2, 3):
        raise wrong
    n, e, f = (result[dims.index(d)] for d in "nef")
    inner = set(rows) - {n, e}
    if weight[0] != e or len(inner) != 1 or set(weight) != {e, f, *inner} or n not in rows:
        raise wrong
    (summed,) = inner
    if summed in result or (len(rows) == 2 and rows != n + summed) or (len(rows) == 3 and e not in rows):
        raise wrong
    in_out = weight[1] == summed
    if len(rows) == 2:
        x = token_rows(product.rows, product.of.size(summed))
        if rank(x) != 2 or not same_size(shape(x)[1], product.of.size(summed)):
            raise Stuck(product.rows, "the experts do not read tokens [N, D]")
        return _Product(x, None, product.weight, in_out, None, node)
    of_rows = rows.translate(str.maketrans(n + e + summed, "nef"))
    x_of_all = _repeated(product.rows, int(shape(product.weight)[0])) if of_rows == EXPERTS_FIRST else None
    if x_of_all is not None:
        return _Product(x_of_all, None, product.weight, in_out, None, node)
    return _Product(product.rows, of_rows, product.weight, in_out, None, node)
