"""Read one MoE block backwards from the node that combines its experts' outputs.

    y = sum_k  weight[t, k] * expert[indices[t, k]](x[t])

Nothing is assumed: every node is explained completely, or `Stuck` names it and the reason. Reading backwards from the
result makes the match sound: the block that is returned computes exactly that node. `check_closed` then checks the
converse: the nodes between the operands and the result read nothing else, and no other node reads them.

N tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.activation import MULTIPLY, activation_of
from moec.compiler.matching.contraction import PRODUCTS, Contraction, contraction
from moec.compiler.matching.dense import read_all_experts
from moec.compiler.matching.experts import Pairs, is_grouped, read_experts
from moec.compiler.matching.graph import PostDominators
from moec.compiler.matching.loops import (
    OneExpert,
    Piece,
    Unrolled,
    is_unrolled,
    piece_shape,
    read_stacked,
    read_unrolled,
)
from moec.compiler.matching.read import (
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
    same_size,
    shape,
    static,
    unview,
)
from moec.compiler.matching.routing import read_router
from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.moe_call import check_router
from moec.compiler.program import Editor

FORWARD_LIMIT = 64  # nodes between gathered weights and the combining sum; fifteen in every spelling seen
SLICE_LIMIT = 400  # nodes of one block; under sixty in every spelling seen, and of each expert of a loop under thirty
ROWS_OF_ONE = 3  # the weighted row, its sum over one, and a shape between them
CANDIDATES = 8  # results that may be those of one router, when the model is as wide as it has experts


@dataclass(frozen=True)
class SharedExpert:
    gate: Node
    up: Node
    down: Node
    scale_weight: Node | None  # [1, D]: the output is multiplied by sigmoid(x . w)


@dataclass(frozen=True)
class Stack:
    """A weight [E, ., .] (or [E, .] of biases) to be made: the pieces of each expert, joined along its outputs."""

    pieces: tuple[tuple[Piece, ...], ...]
    out_dim: int  # of a piece

    def shape(self) -> tuple[int, ...]:
        sizes = list(piece_shape(self.pieces[0][0]))
        sizes[self.out_dim] = sum(piece_shape(p)[self.out_dim] for p in self.pieces[0])
        return (len(self.pieces), *sizes)


@dataclass(frozen=True)
class MoeBlock:
    """The operands and attributes of a fused node, and the node whose value it is."""

    end: Node  # [N, D]: replaced by the fused node
    x: Node  # [N, D]
    router_input: Node  # [N, D]
    router_weight: Node  # [E, D], or [D, E] when `router_in_out`
    router_bias: Node | None
    selection_bias: Node | None
    w13: Node | Stack
    b13: Node | Stack | None
    w2: Node | Stack
    b2: Node | Stack | None
    top_k: int
    routing: Routing
    experts: Experts
    router_in_out: bool = False
    expert_scale: Node | None = None  # [E]: multiplies what each expert gives
    up: Node | None = None  # the weight of the up projection, when w13 holds the gates only
    shared: SharedExpert | None = None
    views: tuple[
        Node, ...
    ] = ()  # reshapes between the routed sum and `end`, when a shared expert was added behind them

    def weights(self) -> list[Node]:
        """Every weight the fused node reads."""
        nodes: list[Node | None] = [
            self.router_weight,
            self.router_bias,
            self.selection_bias,
            self.expert_scale,
            self.up,
        ]
        for weight in (self.w13, self.b13, self.w2, self.b2):
            nodes += [p.weight for e in weight.pieces for p in e] if isinstance(weight, Stack) else [weight]
        if self.shared is not None:
            nodes += [self.shared.gate, self.shared.up, self.shared.down, self.shared.scale_weight]
        return [n for n in nodes if n is not None]


@advises("route flat tokens [N, E] and let nothing but the experts read what topk selects")
def combines_of(topk: Node, paths: PostDominators) -> list[Node]:
    """The nodes at which what a router's topk selects may have come together again as rows of tokens [N, .].

    More than one only where the width of a row does not tell a result of the experts from scores or weights. Empty for
    a topk that only prepares another one (groups of experts), or that nothing reads.
    """
    source: Node = topk.args[0]
    if not topk.users or _prepares_another(topk):
        return []
    if rank(source) != 2:
        raise Stuck(topk, f"it selects in {rank(source)} dimensions: route flat tokens, [N, E]")
    found: list[Node] = []
    node = paths.of(topk)
    for _ in range(FORWARD_LIMIT):
        if node is None or node.op == "output" or len(found) == CANDIDATES:
            break
        result = node.meta.get("val")
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.dim() == 2:
            wide = static(shape(node)[1])
            if wide != 1 and same_size(shape(node)[0], shape(source)[0]):
                found.append(node)
                clear = wide not in (static(shape(source)[1]), topk.args[1])
                # with one expert a token, its row before the sum has the shape of the sum
                if clear and (topk.args[1] != 1 or len(found) == ROWS_OF_ONE):
                    return found
        node = paths.of(node)
    if found:
        return found
    if node is None or node.op == "output":
        raise Stuck(topk, "what it selects does not come together before the end of the graph: it has other readers")
    raise Stuck(topk, "the experts that it selects are not combined")


def _prepares_another(topk: Node) -> bool:
    """Its result reaches another topk before any matrix product: it chooses groups of experts."""
    seen, queue = {topk}, [topk]
    while queue and len(seen) < SLICE_LIMIT:
        for user in queue.pop().users:
            if is_op(user, aten.topk.default):
                return True
            if user in seen or is_op(user, *PRODUCTS) or is_grouped(user):
                continue
            seen.add(user)
            queue.append(user)
    return False


@advises("sum the experts' outputs of each token, times the weights that the router gives them")
def read_block(edit: Editor, end: Node) -> MoeBlock:
    """The block whose routed output is `end` [N, D] = sum over K of weighted expert outputs."""
    read: list[str] = []
    try:
        block = _read_block(edit, end, read)
        _check_operator(block)
        return block
    except ValueError as error:  # the operator's own limits: no experts chosen, fewer in the kept groups than chosen
        stuck = Stuck(end, f"the operator does not take it: {error}")
        stuck.read = tuple(read)
        raise stuck from error
    except Stuck as stuck:
        stuck.read = tuple(read)
        raise


def _check_operator(block: MoeBlock) -> None:
    """Stuck or ValueError for a router that the operator refuses. A selection bias [1, E] is flattened by the rule."""
    if block.expert_scale is not None:
        if block.routing.apply == "input":
            raise Stuck(block.expert_scale, "experts that are weighted before they compute have a scale of their own")
        if shape(block.expert_scale) != (shape(block.router_weight)[1 if block.router_in_out else 0],):
            raise Stuck(block.expert_scale, "it does not hold one scale for each expert")
    x, rows, weight = (n.meta["val"] for n in (block.x, block.router_input, block.router_weight))
    weight = weight.t() if block.router_in_out else weight
    bias = None if block.router_bias is None else block.router_bias.meta["val"]
    check_router("fused_moe", x, rows, weight, bias, None, block.top_k, block.routing)


def _read_block(edit: Editor, end: Node, read: list[str]) -> MoeBlock:
    """`read` receives what has been understood so far, for people."""
    if is_unrolled(end):
        read.append(f"a sum over experts, one by one, ends at {end.name}")
        return _loop_block(edit, end, read_unrolled(edit, end), read)
    every = read_all_experts(edit, end)
    if every is not None:
        read.append(f"a sum over all experts of every token ends at {end.name}")
        return _loop_block(edit, end, every, read)
    outputs, weights, pairs = _combined(end)
    read.append(f"a sum over {pairs.top_k} rows of each token ends at {end.name}")
    stacked = None if weights is None else read_stacked(edit, outputs, weights)
    if stacked is not None:
        return _loop_block(edit, end, stacked, read)
    routed = read_experts(edit, outputs, pairs)
    count = shape(routed.w13)[0]
    read.append(f"{count} experts ({routed.experts}) read {routed.x.name}")
    apply = "output"
    if routed.input_weights is not None:
        if weights is not None:
            raise Stuck(end, "the experts are weighted both before and after")
        weights, apply = routed.input_weights, "input"
    if weights is None:
        raise Stuck(outputs, "the experts' outputs are not multiplied by combine weights")
    router = read_router(edit, _weights_NK(weights, pairs), routed.indices)
    read.append(f"a router ({router.routing}) reads {router.input.name}")
    if router.experts != count:
        raise Stuck(router.weight, f"the router scores {router.experts} experts, the weights hold {count}")
    if router.top_k != pairs.top_k:
        raise Stuck(end, f"{pairs.top_k} experts are summed, {router.top_k} are selected")
    if rank(routed.x) != 2:
        raise Stuck(routed.x, "the experts do not read tokens [N, D]")
    return MoeBlock(
        end=end,
        x=routed.x,
        router_input=router.input,
        router_weight=router.weight,
        router_bias=router.bias,
        selection_bias=router.selection_bias,
        w13=routed.w13,
        b13=routed.b13,
        w2=routed.w2,
        b2=routed.b2,
        top_k=pairs.top_k,
        routing=replace(router.routing, apply=apply),
        experts=routed.experts,
        router_in_out=router.in_out,
        expert_scale=router.expert_scale,
        up=routed.up,
    )


def _loop_block(edit: Editor, end: Node, loop: Unrolled, read: list[str]) -> MoeBlock:
    """The block of a loop over experts, their weights stacked in the order of the router's rows."""
    read.append(f"{len(loop.experts)} experts ({loop.experts[0].experts}) read {loop.x.name}")
    router = read_router(edit, unview(loop.weights), loop.indices)
    first, count = loop.experts[0], len(loop.experts)
    if router.experts != count:
        raise Stuck(router.weight, f"the router scores {router.experts} experts, {count} are added")
    if rank(loop.x) != 2:
        raise Stuck(loop.x, "the experts do not read tokens [N, D]")
    out = 1 if first.experts.layout == "in_out" else 0
    ups = [Stack(tuple((e.ups[i],) for e in loop.experts), out) for i in range(len(first.ups))]
    w13: Node | Stack | None = _whole(ups[0])
    up = _whole(ups[1]) if len(ups) == 2 else None
    biased = first.up_biases[0] is not None
    if w13 is None or (len(ups) == 2 and (up is None or biased)):
        w13, up = Stack(tuple(e.ups for e in loop.experts), out), None
    down = Stack(tuple((e.down,) for e in loop.experts), out)
    return MoeBlock(
        end=end,
        x=loop.x,
        router_input=router.input,
        router_weight=router.weight,
        router_bias=router.bias,
        selection_bias=router.selection_bias,
        w13=w13,
        b13=_stacked_biases(loop.experts, lambda e: e.up_biases),
        w2=_whole(down) or down,
        b2=_stacked_biases(loop.experts, lambda e: (e.down_bias,)),
        top_k=router.top_k,
        routing=replace(router.routing, apply=loop.apply),
        experts=first.experts,
        router_in_out=router.in_out,
        expert_scale=router.expert_scale,
        up=up,
    )


def _whole(stack: Stack) -> Node | None:
    """The stacked weight that the pieces are, one after the other, all of them."""
    first = stack.pieces[0][0].weight
    is_all = all(pieces == (Piece(first, e),) for e, pieces in enumerate(stack.pieces))
    return first if is_all and shape(first)[0] == len(stack.pieces) else None


def _stacked_biases(
    experts: tuple[OneExpert, ...], of: Callable[[OneExpert], tuple[Piece | None, ...]]
) -> Node | Stack | None:
    found = [tuple(p for p in of(e) if p is not None) for e in experts]
    if not found[0]:
        return None
    stack = Stack(tuple(found), 0)
    return _whole(stack) or stack


def _combined(end: Node) -> tuple[Node, Node | None, Pairs]:
    """(expert outputs of the pairs, their weights [..., 1] or [N, K], the pairs) of a sum over each token's experts."""
    node = unview(end)
    found = contraction(node)
    if found is not None:
        return _combined_by_product(node, found)
    if not is_op(node, aten.sum.dim_IntList) or rank(node.args[0]) != 3:
        raise Stuck(node, "the experts' outputs are not summed over the experts of each token")
    if dim_of(node, 1, "dim", 3) != 1:
        raise Stuck(node, "the experts are not summed over their rank dimension")
    ranked: Node = node.args[0]
    top_k = static(shape(ranked)[1])
    if top_k is None:
        raise Stuck(node, "the number of experts per token is not fixed")
    pairs = Pairs(top_k)
    value = unview(ranked)
    if is_op(value, aten.index.Tensor):
        value, pairs = _sorted_back(value, pairs)
    if not same_size(shape(value)[-1], shape(ranked)[2]):
        raise Stuck(ranked, "the weighted outputs are not in the order [token, rank, feature]")
    pair = binary(value, *MULTIPLY)
    if pair is not None:
        for outputs, weights in (pair, pair[::-1]):
            if not isinstance(weights, Node) or not isinstance(outputs, Node):
                continue
            same = same_shape(shape(outputs), shape(value)) and rank(weights) == rank(value)
            if same and shape(weights)[-1] == 1 and same_shape(shape(weights)[:-1], shape(value)[:-1]):
                return outputs, weights, pairs
    return value, None, pairs


def _combined_by_product(node: Node, found: Contraction) -> tuple[Node, Node | None, Pairs]:
    """The outputs [t, k, d] times the weights [t, k], summed over k, in any spelling and order."""
    outputs = found.split(_of_pairs)
    product = None if outputs is None else outputs.without_ones()
    if product is None or len(set(product.weight_term)) != 3:
        raise Stuck(node, "the product does not sum the weighted outputs of each token's experts")
    t, k, d = product.weight_term
    if product.rows_term != t + k or product.result != t + d:
        raise Stuck(node, "the product does not sum the weighted outputs of each token's experts")
    return product.weight, product.rows, Pairs(int(shape(product.weight)[1]))


def _of_pairs(node: Node) -> bool:
    """[N, K, D] rather than weights with a dimension of size one."""
    return rank(node) == 3 and static(shape(node)[1]) is not None and static(shape(node)[2]) != 1


def _sorted_back(node: Node, pairs: Pairs) -> tuple[Node, Pairs]:
    """(rows sorted by expert, pairs with that order) of rows brought back by the inverse permutation."""
    picks = node.args[1]
    inverse = picks[0] if len(picks) == 1 else None
    order: Any = None
    if is_op(inverse, aten.index_put.default, aten.scatter.src):
        order = _inverted(inverse)
    elif isinstance(inverse, Node) and inverse.target is operator.getitem and inverse.args[1] == 1:
        sort = inverse.args[0]  # the argsort of a permutation is its inverse
        order = sort.args[0] if _ascending(sort) else None
    is_order = isinstance(order, Node) and order.target is operator.getitem and order.args[1] == 1
    sort = order.args[0] if is_order else None
    if not _ascending(sort):
        raise Stuck(node, "the rows are not brought back to the order of the tokens by the inverse of their sort")
    return node.args[0], replace(pairs, order=order)


def _ascending(node: Any) -> bool:
    """A sort of one dimension, smallest first: the order in which the groups of a grouped product lie."""
    if is_op(node, aten.sort.default):
        descending = arg(node, 2, "descending", False)
    elif is_op(node, aten.sort.stable):
        descending = arg(node, 3, "descending", False)
    else:
        return False
    return rank(node.args[0]) == 1 and descending is False


def _inverted(node: Any) -> Any:
    """order of inverse[order] = 0, 1, 2, ..."""
    target, where, what = node.args[0], node.args[1], node.args[2]
    if node.target is aten.scatter.src:
        where, what = [node.args[2]], node.args[3]
    if len(where) != 1 or arg(node, 3, "accumulate", False) is True:
        return None
    order = where[0]
    counted = is_op(what, aten.arange.default) and same_size(shape(what)[0], shape(order)[0])
    covered = isinstance(target, Node) and same_shape(shape(target), shape(order))
    return order if counted and covered else None


def _weights_NK(weights: Node, pairs: Pairs) -> Node:
    """[N, K] of combine weights in the order of the pairs."""
    value = unview(weights)
    if pairs.order is not None:
        picked = is_op(value, aten.index.Tensor) and list(value.args[1]) == [pairs.order]
        if not picked:
            raise Stuck(value, "the combine weights are not sorted like the rows")
        value = unview(value.args[0])
    if rank(value) != 2 or static(shape(value)[1]) != pairs.top_k:
        raise Stuck(weights, "the combine weights are not [N, K]")
    return value


# -------------------------------------------------------------------------------------------------------- shared expert


def read_shared(edit: Editor, block: MoeBlock) -> MoeBlock:
    """`block` with the shared expert that is added to it, when one follows; otherwise the block as it is.

    A sum with anything else (the residual stream, say) ends the block before it.
    """
    end = block.end
    views: list[Node] = []
    users = list(end.users)
    while len(users) == 1 and is_op(users[0], *VIEWS) and shape(users[0])[-1] == shape(end)[-1]:
        end = users[0]
        views.append(end)
        users = list(end.users)
    total = users[0] if len(users) == 1 else None
    pair = binary(total, aten.add.Tensor)
    if total is None or pair is None or not same_shape(shape(total), shape(end)):
        return block
    other = pair[1] if pair[0] is end else pair[0]
    if not isinstance(other, Node) or other is end or not same_shape(shape(other), shape(end)):
        return block
    shared = _read_gated_mlp(edit, unview(other), block)
    return block if shared is None else replace(block, end=total, shared=shared, views=tuple(views))


def _read_gated_mlp(edit: Editor, node: Node, block: MoeBlock) -> SharedExpert | None:
    """down(act(gate(x)) * up(x)), without biases, of the experts' x and with their activation; None otherwise."""
    scale_weight = None
    pair = binary(node, *MULTIPLY)
    if pair is not None:  # sigmoid(x . w) * mlp
        for gate, mlp in (pair, pair[::-1]):
            logits = gate.args[0] if is_op(gate, aten.sigmoid.default) else None
            weight = _linear_of(edit, logits, block.x)
            if weight is not None and shape(weight)[0] == 1:
                scale_weight, node = weight, mlp
                break
    outer = _matrix(edit, node)
    if outer is None:
        return None
    hidden, down = outer
    pair = binary(hidden, *MULTIPLY)
    if pair is None:
        return None
    for acted, up in (pair, pair[::-1]):
        kind = activation_of(acted)
        if kind is None or not _plain(block.experts, kind[0], kind[1]):
            continue
        gate_weight, up_weight = _linear_of(edit, kind[2], block.x), _linear_of(edit, up, block.x)
        if gate_weight is not None and up_weight is not None and gate_weight is not up_weight:
            return SharedExpert(gate_weight, up_weight, down, scale_weight)
    return None


def _plain(experts: Experts, activation: str, alpha: float) -> bool:
    """Whether the routed experts compute exactly activation(gate) * up, as their shared expert then does."""
    return experts == Experts(
        layout=experts.layout, interleaved=experts.interleaved, activation=activation, alpha=alpha
    )


def _linear_of(edit: Editor, node: Any, x: Node) -> Node | None:
    """The weight of a linear without bias that reads the rows of `x` [N, D]."""
    found = _matrix(edit, node)
    if found is None:
        return None
    rows, weight = found
    return weight if unview(rows) is unview(x) and shape(rows)[-1] == shape(x)[-1] else None


def _matrix(edit: Editor, node: Any) -> tuple[Node, Node] | None:
    """(rows, weight [out, in]) of a product without bias of rows with a weight."""
    found = contraction(node)
    product = None if found is None else found.split(lambda operand: edit.weight_of(operand) is not None)
    if found is None or found.bias is not None or product is None or product.matrix is not False:
        return None
    return product.rows, product.weight


# -------------------------------------------------------------------------------------------------------------- closure


@advises("keep the block in float32 and let nothing outside read a value inside it")
def check_closed(edit: Editor, block: MoeBlock) -> None:
    """The nodes between operands and result read nothing but operands, are float32, and have no reader outside."""
    inside = _slice(edit, block)
    for node in inside:
        result = node.meta.get("val")
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.dtype != torch.float32:
            raise Stuck(node, f"it is computed in {str(result.dtype).removeprefix('torch.')}, the operator is float32")
        if node is block.end:
            continue
        for user in node.users:
            unread = user.target is operator.getitem and not user.users
            if user not in inside and not unread:
                raise Stuck(user, f"it reads {node.name}, which is inside the block")


def _slice(edit: Editor, block: MoeBlock) -> set[Node]:
    """The ancestors of the result, down to the operands. Stuck at one that no operand accounts for."""
    rows = {unview(block.x), unview(block.router_input)}
    weights = set(block.weights())
    unused = set(weights)
    limit = SLICE_LIMIT * (1 + (len(block.w2.pieces) if isinstance(block.w2, Stack) else int(shape(block.w2)[0])) // 8)
    inside: set[Node] = set()
    stack = [block.end]
    while stack:
        node = stack.pop()
        if node in weights:
            unused.discard(node)
            continue
        if node in inside or unview(node) in rows or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            continue  # the last: a symbolic size
        if node.op != "call_function":
            name = edit.weight_of(node)
            raise Stuck(node, f"the block reads {name or node.name}, which is none of the operator's operands")
        inside.add(node)
        if len(inside) > limit:
            raise Stuck(block.end, "the block does not end at the tokens that it reads")
        stack.extend(node.all_input_nodes)
    if unused:
        raise Stuck(block.end, f"{edit.weight_of(next(iter(unused)))} was taken for an operand and is not read")
    return inside
