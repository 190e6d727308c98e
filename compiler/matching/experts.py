"""Read routed experts backwards: from their outputs, one row for each (token, rank), to x, weights and indices.

Every function explains one node completely or raises `Stuck` with the node and the reason. N tokens, D model width, E
experts, K experts per token, F expert width; a value "of the pairs" is [N, K, .], or [N*K, .] in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moec.compiler.matching.read import Stuck, arg, aten, binary, is_op, piece, rank, same_size, shape, static, unview
from moec.compiler.ops.attributes import Experts
from moec.compiler.program import Editor

MULTIPLY = (aten.mul.Tensor,)


@dataclass(frozen=True)
class RoutedExperts:
    """Operands and attributes of the expert MLPs."""

    x: Node  # [N, D]
    w13: Node
    w2: Node
    indices: Node  # [N, K]
    experts: Experts


@dataclass(frozen=True)
class _Product:
    """Rows times the stacked weight of each row's expert."""

    rows: Node  # [N, D] when the K experts of a token read the same row, else of the pairs
    per_token: bool
    weight: Node  # [E, ., .]
    in_out: bool  # the weight is [E, in, out]
    indices: Node  # [N, K]
    node: Node


def expert_indexed(edit: Editor, node: Node) -> bool:
    """`node` picks experts out of a stacked weight: the mark of a dispatch by gathering."""
    return is_op(node, aten.index.Tensor) and _stacked(edit, node.args[0])


def _stacked(edit: Editor, node: Any) -> bool:
    """Whether `node` is a weight [E, ., .]."""
    return isinstance(node, Node) and edit.weight_of(node) is not None and rank(node) == 3


def read_experts(edit: Editor, outputs: Node, top_k: int) -> RoutedExperts:
    """The experts whose outputs, of the pairs, are `outputs`."""
    down = _product(edit, outputs, top_k)
    if down.per_token:
        raise Stuck(down.node, "the down projection does not read a row of its own for each expert")
    joined, activation = read_activation(down.rows)
    up = _product(edit, joined, top_k)
    if not up.per_token:
        raise Stuck(up.node, "the experts of one token do not read the same row")
    if up.indices is not down.indices:
        raise Stuck(down.node, "the two projections use different expert indices")
    if up.in_out != down.in_out:
        raise Stuck(down.node, "one projection is stored [E, in, out], the other [E, out, in]")
    experts = Experts(layout="in_out" if up.in_out else "out_in", activation=activation)
    wide, narrow = shape(up.weight)[2 if up.in_out else 1], shape(down.weight)[1 if up.in_out else 2]
    if wide != 2 * narrow:
        raise Stuck(up.node, "gate and up are not twice the width of the hidden layer")
    if shape(up.weight)[0] != shape(down.weight)[0]:
        raise Stuck(up.node, "the two projections have different numbers of experts")
    return RoutedExperts(up.rows, up.weight, down.weight, up.indices, experts)


def _product(edit: Editor, node: Node, top_k: int) -> _Product:
    product = unview(node)
    if is_op(product, aten.einsum.default):
        if product is not node:
            raise Stuck(node, "the expert products are reshaped")
        return _einsum(edit, product)
    if is_op(product, aten.bmm.default):
        return _bmm(edit, product, top_k)
    raise Stuck(product, "expected a product with expert weights gathered by index (einsum or bmm)")


def _einsum(edit: Editor, node: Node) -> _Product:
    """einsum of [N, D] or [N, K, F] with gathered weights [N, K, ., .], in any letters."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    wrong = Stuck(node, f"einsum {equation} does not multiply each token with its own experts")
    if not arrow or len(terms) != 2 or len(operands) != 2:
        raise wrong
    if len(terms[0]) == 4:
        terms, operands = terms[::-1], operands[::-1]
    (rows, weight), (x, gathered) = terms, operands
    if len(weight) != 4 or len(set(weight)) != 4 or len(rows) not in (2, 3) or not equation.isascii():
        raise wrong
    t, k, a, b = weight
    summed = rows[-1]
    per_token = len(rows) == 2
    if rows[:-1] != (t if per_token else t + k) or summed not in (a, b):
        raise wrong
    if result != t + k + (b if summed == a else a):
        raise Stuck(node, f"einsum {equation} does not keep the order [token, rank, feature]")
    stack, indices = _gathered(edit, gathered)
    if rank(indices) != 2:
        raise Stuck(gathered, "the experts are not gathered by indices [N, K]")
    return _Product(x, per_token, stack, summed == a, indices, node)


def _gathered(edit: Editor, node: Any) -> tuple[Node, Node]:
    """(stacked weight, indices) of weights gathered by one index tensor."""
    picks = node.args[1] if is_op(node, aten.index.Tensor) else None
    if picks is None or not _stacked(edit, node.args[0]):
        raise Stuck(node, "expected expert weights [E, ., .] gathered by index")
    if len(picks) != 1 or not isinstance(picks[0], Node):
        raise Stuck(node, "the experts are not gathered by indices [N, K]")
    return node.args[0], picks[0]


def _bmm(edit: Editor, node: Node, top_k: int) -> _Product:
    """bmm(weights [N*K, out, in], rows [N*K, in, 1]), or bmm(rows [N*K, 1, in], weights [N*K, in, out])."""
    first, second = node.args
    if not isinstance(first, Node) or not isinstance(second, Node):
        raise Stuck(node, "bmm of something that is not a value")
    if shape(second)[2] == 1:
        weights, rows, row_first = first, second, False
    elif shape(first)[1] == 1:
        weights, rows, row_first = second, first, True
    else:
        raise Stuck(node, "bmm does not multiply one row with each gathered expert")
    turned = is_op(weights, aten.transpose.int) and {d % 3 for d in weights.args[1:3]} == {1, 2}  # type: ignore[operator]
    stack, flat = _gathered(edit, weights.args[0] if turned else weights)
    indices = unview(flat)
    if rank(flat) != 1 or rank(indices) != 2 or shape(indices)[1] != top_k:
        raise Stuck(flat, "the experts are not gathered by indices [N, K] in their order")
    # rows x weights wants [in, out] as gathered; weights x rows wants [out, in]
    source = unview(rows)
    repeated = _repeated(source, top_k)
    in_out = row_first != turned
    if repeated is None:
        return _Product(source, False, stack, in_out, indices, node)
    return _Product(repeated, True, stack, in_out, indices, node)


def _repeated(node: Node, top_k: int) -> Node | None:
    """x [N, D] of its rows each repeated K times in a row, [N*K, D]."""
    if is_op(node, aten.repeat_interleave.self_int):
        x, dim = node.args[0], arg(node, 2, "dim")
        fits = isinstance(x, Node) and rank(x) == 2 and dim is not None and dim % 2 == 0 and node.args[1] == top_k
        return x if fits else None  # type: ignore[return-value]
    if is_op(node, aten.expand.default) and is_op(node.args[0], aten.unsqueeze.default):
        one = node.args[0]
        x = one.args[0]  # type: ignore[union-attr]
        if not isinstance(x, Node) or rank(x) != 2 or rank(node) != 3:
            return None
        inner = static(shape(node)[1]) == top_k and shape(one)[1] == 1  # type: ignore[arg-type]
        kept = same_size(shape(node)[0], shape(x)[0]) and same_size(shape(node)[2], shape(x)[1])
        return x if inner and kept else None
    return None


def read_activation(hidden: Node) -> tuple[Node, str]:
    """(the up projection [..., 2F], activation) of act(gate) * up, the gate being the first half."""
    hidden = unview(hidden)
    pair = binary(hidden, *MULTIPLY)
    if pair is None:
        raise Stuck(hidden, "expected act(gate) * up")
    for acted, up in (pair, pair[::-1]):
        kind = activation_of(acted)
        if kind is None:
            continue
        activation, gate = kind
        first, second = piece(gate), piece(up)
        if first is None or second is None or first[0] is not second[0]:
            raise Stuck(hidden, "gate and up are not two halves of one projection")
        source, last = first[0], rank(first[0]) - 1
        size = static(shape(source)[-1])
        if size is None or size % 2:
            raise Stuck(gate, "gate and up are not the two halves of the last dimension")
        low, high = (last, 0, size // 2, 1), (last, size // 2, size, 1)
        if (first[1:], second[1:]) == (high, low):
            raise Stuck(hidden, "the activation is applied to the second half of the up projection, not the first")
        if (first[1:], second[1:]) != (low, high):
            raise Stuck(gate, "gate and up are not the two halves of the last dimension")
        return source, activation
    raise Stuck(hidden, "neither factor is an activation that the operator has (silu, gelu, relu)")


def activation_of(node: Any) -> tuple[str, Node] | None:
    """(name, argument) of an activation."""
    if is_op(node, aten.silu.default):
        return "silu", node.args[0]
    if is_op(node, aten.gelu.default):
        return ("gelu_tanh" if arg(node, 1, "approximate", "none") == "tanh" else "gelu"), node.args[0]
    if is_op(node, aten.relu.default):
        return "relu", node.args[0]
    pair = binary(node, *MULTIPLY)
    if pair is not None:
        for x, gate in (pair, pair[::-1]):
            if is_op(gate, aten.sigmoid.default) and gate.args[0] is x:
                return "silu", x
    return None
