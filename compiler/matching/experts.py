"""Read routed experts backwards: from their outputs, one row for each (token, rank), to x, weights and indices.

Every function explains one node completely or raises `Stuck` with the node and the reason. N tokens, D model width, E
experts, K experts per token, F expert width; a value "of the pairs" is [N, K, .], or [N*K, .] in the same order, or
[N*K, .] sorted by expert (`Pairs.order`).

Spellings of a product with a row's own expert: einsum, bmm or matmul with gathered weights; grouped matrix products of
sorted rows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from moec.compiler.matching.activation import MULTIPLY, read_activation
from moec.compiler.matching.contraction import Contraction, contraction, untransposed
from moec.compiler.matching.read import (
    Stuck,
    advises,
    arg,
    aten,
    binary,
    dim_of,
    is_op,
    rank,
    same_size,
    shape,
    static,
    token_rows,
    unview,
)
from moec.compiler.ops.attributes import Experts
from moec.compiler.program import Editor

GROUPED = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}


@dataclass(frozen=True)
class Pairs:
    """The (token, rank) pairs of a block: K, and the sort by expert that their rows are in, if any."""

    top_k: int
    order: Node | None = None  # int64 [N*K]: row i holds pair order[i]


@dataclass(frozen=True)
class RoutedExperts:
    """Operands and attributes of the expert MLPs. `up` is the up projection of experts whose gate is a weight apart."""

    x: Node  # [N, D]
    w13: Node
    b13: Node | None
    w2: Node
    b2: Node | None
    indices: Node  # [N, K]
    experts: Experts
    up: Node | None = None
    input_weights: Node | None = None  # of the pairs: the rows were multiplied by them before the experts


@dataclass(frozen=True)
class _Product:
    """Rows times the stacked weight of each row's expert, plus its bias."""

    rows: Node
    repeated: bool  # the rows are [N, D], one for the K experts of a token
    weight: Node  # [E, ., .]
    in_out: bool  # the weight is [E, in, out]
    bias: Node | None  # [E, out]
    indices: Node  # [N, K]
    node: Node


def expert_indexed(edit: Editor, node: Node) -> bool:
    """`node` reads a stacked weight [E, ., .] expert by expert: the mark of a dispatch."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if is_op(node, aten.index.Tensor, aten.index_select.default, aten.select.int):
        return _stacked(edit, node.args[0])
    return is_grouped(node) and _stacked(edit, untransposed(node.args[1], "ekn")[0])


def is_grouped(node: Any) -> bool:
    """Whether a node is a grouped matrix product: rows [T, K] sorted by expert, weights [E, K, N]."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    return schema is not None and schema.name in GROUPED


def _stacked(edit: Editor, node: Any) -> bool:
    """Whether `node` is a weight [E, ., .]."""
    return isinstance(node, Node) and edit.weight_of(node) is not None and rank(node) == 3


@advises("give every expert the same form, its weights stacked [E, in, out] or [E, out, in]")
def read_experts(edit: Editor, outputs: Node, pairs: Pairs) -> RoutedExperts:
    """The experts whose outputs, of the pairs, are `outputs`."""
    down = _product(edit, outputs, pairs)
    if down.repeated:
        raise Stuck(down.node, "the down projection does not read a row of its own for each expert")
    activation = read_activation(unview(down.rows))
    ups = [_product(edit, n, pairs) for n in (activation.gate, activation.up) if n is not None]
    gate = ups[0]
    for product in ups:
        _check_alike(product, down, gate)
    experts = replace(activation.experts, layout="in_out" if gate.in_out else "out_in")
    inner = shape(down.weight)[1 if gate.in_out else 2]
    for product in ups:
        wide = shape(product.weight)[2 if gate.in_out else 1]
        expected = 2 * inner if experts.gated and len(ups) == 1 else inner
        if wide != expected:
            raise Stuck(product.node, f"the up projection is {wide} wide, the down projection reads {inner}")
    if len(ups) == 2 and (ups[0].bias is None) != (ups[1].bias is None):
        raise Stuck(gate.node, "only one of gate and up has a bias")
    if len(ups) == 2 and ups[0].bias is not None:
        raise Stuck(gate.node, "gate and up are weights apart and have biases")
    x, input_weights = _token_rows(gate, pairs)
    up = ups[1].weight if len(ups) == 2 else None
    return RoutedExperts(
        x, gate.weight, gate.bias, down.weight, down.bias, gate.indices, experts, up=up, input_weights=input_weights
    )


def _check_alike(product: _Product, down: _Product, gate: _Product) -> None:
    if product.rows is not gate.rows or product.repeated != gate.repeated:
        raise Stuck(product.node, "gate and up do not read the same rows")
    if product.indices is not down.indices:
        raise Stuck(down.node, "the projections use different expert indices")
    if product.in_out != down.in_out:
        raise Stuck(down.node, "one projection is stored [E, in, out], the other [E, out, in]")
    if shape(product.weight)[0] != shape(down.weight)[0]:
        raise Stuck(product.node, "the projections have different numbers of experts")


def _token_rows(product: _Product, pairs: Pairs) -> tuple[Node, Node | None]:
    """(x [N, D], weights of the pairs that multiply the rows) of what the up projection reads."""
    if product.repeated:
        return product.rows, None
    rows = unview(product.rows)
    x = _repeated(rows, pairs)
    if x is not None:
        return x, None
    pair = binary(rows, *MULTIPLY)
    if pair is not None:
        for source, weights in (pair, pair[::-1]):
            x = _repeated(unview(source), pairs) if isinstance(source, Node) else None
            if x is None and isinstance(source, Node) and _broadcast(source, weights, pairs):
                x = token_rows(source, shape(source)[2])
            if x is not None and isinstance(weights, Node) and shape(weights)[-1] == 1:
                return x, weights
    raise Stuck(rows, "the experts of one token do not read the same row")


def _broadcast(source: Node, weights: Any, pairs: Pairs) -> bool:
    """rows [N, 1, D] times weights [N, K, 1]: one row for the experts of a token."""
    three = pairs.order is None and isinstance(weights, Node) and rank(source) == rank(weights) == 3
    if not three or static(shape(source)[1]) != 1 or static(shape(weights)[1]) != pairs.top_k:
        return False
    rows = token_rows(source, shape(source)[2])
    return rank(rows) == 2 and same_size(shape(rows)[0], shape(source)[0])


def _repeated(node: Node, pairs: Pairs) -> Node | None:
    """x [N, D] of its rows for each pair."""
    k = pairs.top_k
    if pairs.order is not None:
        if not is_op(node, aten.index.Tensor) or len(node.args[1]) != 1 or rank(node.args[0]) != 2:
            return None
        token = node.args[1][0]
        divided = is_op(token, aten.floor_divide.default) or (
            is_op(token, aten.div.Tensor_mode, aten.div.Scalar_mode) and token.kwargs.get("rounding_mode") == "floor"
        )
        return node.args[0] if divided and tuple(token.args[:2]) == (pairs.order, k) else None
    if is_op(node, aten.repeat_interleave.self_int):
        x, dim = node.args[0], arg(node, 2, "dim")
        fits = isinstance(x, Node) and rank(x) == 2 and dim is not None and dim % 2 == 0 and node.args[1] == k
        return x if fits else None
    if is_op(node, aten.expand.default) and is_op(node.args[0], aten.unsqueeze.default):
        one = node.args[0]
        x = one.args[0]
        if not isinstance(x, Node) or rank(x) != 2 or rank(node) != 3:
            return None
        inner = static(shape(node)[1]) == k and shape(one)[1] == 1
        kept = same_size(shape(node)[0], shape(x)[0]) and same_size(shape(node)[2], shape(x)[1])
        return x if inner and kept else None
    return None


# ------------------------------------------------------------------------------------------------------- products


def _product(edit: Editor, node: Node, pairs: Pairs) -> _Product:
    product = unview(node)
    total = binary(product, aten.add.Tensor)
    if total is not None:
        for value, bias in (total, total[::-1]):
            if isinstance(value, Node) and is_op(bias, aten.index.Tensor) and rank(bias.args[0]) == 2:
                inner = _product(edit, value, pairs)
                return replace(inner, bias=_bias(edit, bias, inner, pairs))
        raise Stuck(product, "what is added to the product is not the bias of each row's expert")
    found = contraction(product)
    if found is not None:
        if is_op(product, aten.einsum.default) and product is not node and rank(node) == rank(product):
            raise Stuck(node, "the expert products are reshaped")
        return _contracted(edit, product, found, pairs)
    if is_grouped(product):
        return _grouped(edit, product, pairs)
    raise Stuck(product, "expected a product with each row's own expert (einsum, bmm, matmul or a grouped product)")


def _bias(edit: Editor, node: Node, product: _Product, pairs: Pairs) -> Node:
    """The bias [E, out] gathered for each row."""
    source, picks = node.args[0], node.args[1]
    if edit.weight_of(source) is None or len(picks) != 1:
        raise Stuck(node, "the bias is not a weight [E, out] gathered by the expert indices")
    chosen = unview(picks[0]) if pairs.order is None else _sorted_indices(picks[0], pairs)
    out = shape(product.weight)[2 if product.in_out else 1]
    if chosen is not product.indices or shape(source) != (shape(product.weight)[0], out):
        raise Stuck(node, "the bias does not belong to the row's expert")
    return source


def _sorted_indices(ids: Any, pairs: Pairs) -> Node | None:
    """indices [N, K] when `ids` is their sort, of which `pairs.order` is the permutation."""
    order = pairs.order
    if order is None or ids.target is not operator.getitem or ids.args != (order.args[0], 0):
        return None
    return unview(ids.args[0].args[0])


def _contracted(edit: Editor, node: Node, found: Contraction, pairs: Pairs) -> _Product:
    """[N, D] or [N, K, F] with gathered weights [N, K, ., .] (or [N*K, F] with [N*K, ., .]), in any spelling."""
    whole = found.split(lambda operand: _is_gathered(operand) and rank(operand) in (3, 4))
    if whole is None:
        return _not_gathered(edit, found)
    product = whole.below_transposes().without_ones()
    lead, (a, b) = product.weight_term[:-2], product.weight_term[-2:]
    inner = product.rows_term[-1:]
    repeated = len(lead) == 2 and product.rows_term == lead[0] + inner
    if (product.rows_term != lead + inner and not repeated) or inner not in (a, b):
        raise Stuck(node, "it does not multiply each token with its own experts")
    if product.result != lead + (b if inner == a else a):
        raise Stuck(node, "the product does not keep the order [token, rank, feature]")
    stack, picked = _gathered(edit, product.weight)
    if rank(picked) != len(lead):
        raise Stuck(product.weight, "the experts are not gathered by indices [N, K]")
    # one row for the K experts of a token, or one for each pair
    rows = token_rows(product.rows, found.size(inner)) if repeated else unview(product.rows)
    return _Product(rows, repeated, stack, inner == a, None, _indices(picked, pairs), node)


def _not_gathered(edit: Editor, found: Contraction) -> _Product:
    """Stuck, with the reason that the operand which is most like gathered weights gives."""
    wide = max(found.operands, key=rank)
    _gathered(edit, untransposed(wide, "?" * rank(wide))[0])
    raise Stuck(found.node, "it does not multiply each token with its own experts")


def _is_gathered(node: Any) -> bool:
    return is_op(node, aten.index_select.default, aten.index.Tensor) and rank(node.args[0]) == 3


def _gathered(edit: Editor, node: Any) -> tuple[Node, Node]:
    """(stacked weight, indices) of weights gathered by one index tensor."""
    if is_op(node, aten.index_select.default) and _stacked(edit, node.args[0]) and dim_of(node, 1, "dim", 3) == 0:
        return node.args[0], node.args[2]
    picks = node.args[1] if is_op(node, aten.index.Tensor) else None
    if picks is None or not _stacked(edit, node.args[0]):
        raise Stuck(node, "expected expert weights [E, ., .] gathered by index")
    if len(picks) != 1 or not isinstance(picks[0], Node):
        raise Stuck(node, "the experts are not gathered by indices [N, K]")
    return node.args[0], picks[0]


def _indices(picked: Node, pairs: Pairs) -> Node:
    """indices [N, K] of the experts of unsorted pairs."""
    indices = unview(picked)
    if pairs.order is not None:
        raise Stuck(picked, "rows sorted by expert are multiplied with gathered weights")
    if rank(indices) != 2 or static(shape(indices)[1]) != pairs.top_k:
        raise Stuck(picked, "the experts are not gathered by indices [N, K] in their order")
    return indices


def _grouped(edit: Editor, node: Node, pairs: Pairs) -> _Product:
    """grouped_mm(rows sorted by expert, weights [E, in, out] (or [E, out, in] turned), ends of the groups)."""
    rows, weights, ends = node.args[0], node.args[1], arg(node, 2, "offs")
    if pairs.order is None or not isinstance(rows, Node):
        raise Stuck(node, "a grouped product of rows that are not sorted back")
    if arg(node, 3, "bias") is not None:
        raise Stuck(node, "a grouped product with a bias of its own")
    stack, term = untransposed(weights, "ekn")
    if not _stacked(edit, stack) or term[0] != "e":
        raise Stuck(node, "expected expert weights [E, ., .]")
    indices = _group_ends(ends, pairs, int(shape(stack)[0]))
    return _Product(rows, False, stack, term == "ekn", None, indices, node)


def _group_ends(ends: Any, pairs: Pairs, count: int) -> Node:
    """indices [N, K] whose groups end at cumsum(histc(sorted, E bins from 0 to E-1))."""
    wrong = Stuck(ends, "the ends of the groups are not the running counts of the sorted experts")
    if not is_op(ends, aten.cumsum.default) or dim_of(ends, 1, "dim", 1) != 0:
        raise wrong
    counts = ends.args[0]
    if not is_op(counts, aten.histc.default):
        raise wrong
    source, bins, low, high = counts.args[0], arg(counts, 1, "bins"), arg(counts, 2, "min"), arg(counts, 3, "max")
    if (bins, low, high) != (count, 0, count - 1):
        raise Stuck(counts, f"the rows of {count} experts are not counted in one bin each")
    ids = source.args[0] if is_op(source, aten._to_copy.default, aten.to.dtype) else source
    # counting does not depend on the order: sorted or not, of the same indices
    indices = _sorted_indices(ids, pairs) or unview(ids)
    order: Any = pairs.order
    if indices is not unview(order.args[0].args[0]):
        raise wrong
    return indices
