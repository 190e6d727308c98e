"""Read one MoE block backwards from the node that combines its experts' outputs.

    y = sum_k  weight[t, k] * expert[indices[t, k]](x[t])

Every function explains one node completely or raises `Stuck` with the node and the reason; nothing is assumed. Reading
backwards from the result makes the match sound: what is returned is exactly what computes that node.

N tokens, D model width, E experts, K experts per token, F expert width, S shared width.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import (
    Stuck,
    arg,
    aten,
    binary,
    dim_of,
    is_op,
    piece,
    rank,
    same_size,
    shape,
    static,
    unview,
    with_scalar,
)
from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.program import Editor

MULTIPLY = (aten.mul.Tensor,)
ADD = (aten.add.Tensor, aten.add.Scalar)


@dataclass
class MoeBlock:
    """The operands and attributes of a fused node, and the node whose value it is."""

    end: Node  # [N, D]: replaced by the fused node
    x: Node  # [N, D]
    router_input: Node
    router_weight: Node
    router_bias: Node | None
    selection_bias: Node | None
    w13: Node
    w2: Node
    top_k: int
    routing: Routing
    experts: Experts
    shared: SharedExpert | None = None
    inside: set[Node] = field(default_factory=set)  # nodes that only this block may read


@dataclass(frozen=True)
class SharedExpert:
    gate: Node
    up: Node
    down: Node
    scale_weight: Node | None  # [1, D]: the output is multiplied by sigmoid(x . w)


def expert_indexed(edit: Editor, node: Node) -> bool:
    """`node` picks experts out of a stacked weight: the mark of a dispatch by gathering."""
    return is_op(node, aten.index.Tensor) and _stacked(edit, node.args[0]) is not None


def _stacked(edit: Editor, node: Any) -> str | None:
    """The name of a weight [E, ., .]."""
    if not isinstance(node, Node) or rank(node) != 3:
        return None
    return edit.weight_of(node)


def combine_of(index: Node) -> Node:
    """From a gathered expert weight down to the sum over K that ends the block: the node to read back from."""
    node = index
    for _ in range(16):
        users = list(node.users)
        if is_op(node, aten.sum.dim_IntList) and rank(node) == 2:
            return node
        if len(users) != 1:
            # gate and up fork and join again: follow the first
            if not users or not all(is_op(u, aten.slice.Tensor) or u.target is operator.getitem for u in users):
                raise Stuck(node, "its value leaves the block before the experts are combined")
        node = users[0]
        if node.op == "output":
            raise Stuck(index, "no sum over the selected experts follows")
    raise Stuck(index, "no sum over the selected experts follows")


def read_block(edit: Editor, end: Node) -> MoeBlock:
    """The block whose routed output is `end` [N, D] = sum over K of weighted expert outputs."""
    if dim_of(end, 1, "dim", 3) != 1 or arg(end, 2, "keepdim", False):
        raise Stuck(end, "the experts are not summed over their rank dimension")
    weighted: Node = end.args[0]  # type: ignore[assignment]
    pair = binary(weighted, *MULTIPLY)
    if pair is None or rank(weighted) != 3:
        raise Stuck(weighted, "the experts' outputs are not multiplied by combine weights")
    found: tuple[Node, Node] | None = None
    for outputs, weights in (pair, pair[::-1]):
        if isinstance(weights, Node) and isinstance(outputs, Node) and shape(weights)[-1:] == (1,) and rank(outputs) == 3:
            found = outputs, weights
    if found is None:
        raise Stuck(weighted, "no combine weight of shape [N, K, 1]")
    outputs, weights_NK1 = found
    weights_NK = unview(weights_NK1)
    if rank(weights_NK) != 2 or not same_size(shape(weights_NK)[1], shape(weights_NK1)[1]):
        raise Stuck(weights_NK1, "the combine weights are not [N, K]")
    experts, x, w13, w2, indices, inside = read_experts(edit, outputs)
    block = read_router(edit, weights_NK, indices)
    block.end, block.x, block.w13, block.w2, block.experts = end, x, w13, w2, experts
    block.inside |= inside | {weighted, weights_NK1, weights_NK}
    count = shape(w13)[0]
    if shape(block.router_weight)[0] != count or shape(w2)[0] != count:
        raise Stuck(block.router_weight, f"the router scores {shape(block.router_weight)[0]} experts, the weights hold {count}")
    return block


# -------------------------------------------------------------------------------------------------------------- experts


def read_experts(edit: Editor, outputs: Node) -> tuple[Experts, Node, Node, Node, Node, set[Node]]:
    """(attributes, x [N, D], w13, w2, indices [N, K], nodes inside) of expert outputs [N, K, D]."""
    hidden, w2, down_in_out, indices2, gathered2 = _gathered_product(edit, outputs, per_token=False)
    joined, gate_first, activation, inside = read_activation(hidden)
    x, w13, up_in_out, indices, gathered = _gathered_product(edit, joined, per_token=True)
    if indices is not indices2:
        raise Stuck(gathered2, "the two projections use different expert indices")
    if up_in_out != down_in_out:
        raise Stuck(gathered2, "one projection is stored [E, in, out], the other [E, out, in]")
    if not gate_first:
        raise Stuck(hidden, "the activation is applied to the second half of the up projection, not the first")
    experts = Experts(layout="in_out" if up_in_out else "out_in", activation=activation)
    wide = shape(w13)[2 if up_in_out else 1]
    if wide != 2 * shape(w2)[1 if up_in_out else 2]:
        raise Stuck(w13, "gate and up are not twice the width of the hidden layer")
    return experts, x, w13, w2, indices, inside | {outputs, hidden, joined, gathered, gathered2}


def _gathered_product(edit: Editor, node: Node, *, per_token: bool) -> tuple[Node, Node, bool, Node, Node]:
    """(input, stacked weight, whether it is [E, in, out], indices, gathered) of one projection by gathered weights.

    `per_token`: the input is [N, D], the same for the K experts of a token; else [N, K, F], one row each.
    """
    if not is_op(node, aten.einsum.default):
        raise Stuck(node, "expected a product with expert weights gathered by index (einsum)")
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2:
        raise Stuck(node, f"einsum {equation} is not a product of tokens and expert weights")
    if len(terms[0]) == 4:
        terms, operands = terms[::-1], operands[::-1]
    (rows, weight), (x, gathered) = terms, operands
    if len(weight) != 4 or len(result) != 3 or len(rows) != (2 if per_token else 3) or len(set(weight)) != 4:
        raise Stuck(node, f"einsum {equation} is not a product of tokens and expert weights")
    t, k, a, b = weight
    summed = rows[-1]
    if rows[:-1] != (t if per_token else t + k) or summed not in (a, b):
        raise Stuck(node, f"einsum {equation} does not multiply each token with its own experts")
    kept = b if summed == a else a
    if result != t + k + kept:
        raise Stuck(node, f"einsum {equation} does not keep the order [token, rank, feature]")
    name = _stacked(edit, gathered.args[0]) if is_op(gathered, aten.index.Tensor) else None
    if name is None:
        raise Stuck(gathered, "expected expert weights [E, ., .] gathered by index")
    picks = gathered.args[1]
    if len(picks) != 1 or rank(picks[0]) != 2:
        raise Stuck(gathered, "the experts are not gathered by indices [N, K]")
    return x, gathered.args[0], summed == a, picks[0], gathered


def read_activation(hidden: Node) -> tuple[Node, bool, str, set[Node]]:
    """(the up projection [N, K, 2F], whether the gate is its first half, activation, nodes) of act(gate) * up."""
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
        halves = {(last, 0, (size or 0) // 2, 1), (last, (size or 0) // 2, size, 1)}
        if size is None or {first[1:], second[1:]} != halves:
            raise Stuck(gate, "gate and up are not the two halves of the last dimension")
        return source, first[2] == 0, activation, {acted, gate, up, *_getters(gate, up)}
    raise Stuck(hidden, "neither factor is an activation that the operator has (silu, gelu, relu)")


def _getters(*nodes: Node) -> set[Node]:
    return {n.args[0] for n in nodes if n.target is operator.getitem}  # type: ignore[misc]


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


# --------------------------------------------------------------------------------------------------------------- router


def read_router(edit: Editor, weights_NK: Node, indices: Node) -> MoeBlock:
    """The router that gives `indices` and `weights_NK`; operands of the experts are left for the caller."""
    if indices.target is not operator.getitem or not is_op(indices.args[0], aten.topk.default) or indices.args[1] != 1:
        raise Stuck(indices, "the expert indices do not come from topk")
    topk: Node = indices.args[0]  # type: ignore[assignment]
    choice: Node = topk.args[0]  # type: ignore[assignment]
    if rank(choice) != 2 or dim_of(topk, 2, "dim", 2, -1) != 1 or arg(topk, 3, "largest", True) is not True:
        raise Stuck(topk, "topk does not take the largest over the experts")
    inside: set[Node] = {topk, indices}
    routing, scores, values = _read_weights(weights_NK, indices, topk, inside)
    selection_bias = None
    if values:  # the weights are topk's own values: what topk saw are the scores
        scores = choice
    if scores is not choice:
        pair = binary(choice, aten.add.Tensor)
        other = None if pair is None or scores not in pair else pair[1] if pair[0] is scores else pair[0]
        if other is None or edit.weight_of(other) is None or shape(other) != (shape(choice)[1],):
            raise Stuck(choice, "what topk sees is not the scores, nor the scores plus a bias per expert")
        selection_bias = other
        inside.add(choice)
    routing, logits = _read_score(scores, routing)
    inside |= {scores, logits}
    if not is_op(logits, aten.linear.default):
        raise Stuck(logits, "the router's logits do not come from a linear")
    router_input, weight = logits.args[0], logits.args[1]
    bias = arg(logits, 2, "bias")
    for w in (weight, bias):
        if w is not None and edit.weight_of(w) is None:
            raise Stuck(logits, "the router's weight is computed")
    return MoeBlock(
        end=weights_NK,
        x=router_input,  # type: ignore[arg-type]
        router_input=router_input,  # type: ignore[arg-type]
        router_weight=weight,  # type: ignore[arg-type]
        router_bias=bias,
        selection_bias=selection_bias,
        w13=weight,  # type: ignore[arg-type]
        w2=weight,  # type: ignore[arg-type]
        top_k=int(topk.args[1]),  # type: ignore[arg-type]
        routing=routing,
        experts=Experts(),
        inside=inside,
    )


def _read_weights(node: Node, indices: Node, topk: Node, inside: set[Node]) -> tuple[Routing, Node, bool]:
    """(routing without its score, the scores gathered from, whether the weights are topk's values)."""
    routing = Routing()
    scaled = with_scalar(node, *MULTIPLY)
    if scaled is not None:
        inside.add(node)
        node, scale = scaled
        routing = replace(routing, scale=scale)
    ratio = binary(node, aten.div.Tensor)
    if ratio is not None and isinstance(ratio[1], Node):
        inside.add(node)
        node, total = ratio
        routing = _read_total(node, total, routing, inside)
    if is_op(node, aten.softmax.int, aten._softmax.default) and dim_of(node, 1, "dim", 2) == 1:
        inside.add(node)
        node = node.args[0]  # type: ignore[assignment]
        routing = replace(routing, score="softmax", after_topk=True)
    elif is_op(node, aten.sigmoid.default):
        inside.add(node)
        node = node.args[0]  # type: ignore[assignment]
        routing = replace(routing, score="sigmoid", after_topk=True)
    if is_op(node, aten.gather.default):
        if dim_of(node, 1, "dim", 2) != 1 or node.args[2] is not indices:
            raise Stuck(node, "the combine weights are not gathered with the experts' indices")
        inside.add(node)
        return routing, node.args[0], False  # type: ignore[return-value]
    if node.target is operator.getitem and node.args[0] is topk and node.args[1] == 0:
        inside.add(node)
        return routing, node, True
    raise Stuck(node, "this step from scores to combine weights is not one that the operator has")


def _read_total(weights: Node, total: Node, routing: Routing, inside: set[Node]) -> Routing:
    """weights / (sum(weights) + eps), or / clamp(sum(weights), min)."""
    inside.add(total)
    if is_op(total, aten.clamp.default, aten.clamp_min.default) and arg(total, 2, "max") is None:
        low = arg(total, 1, "min")
        if not isinstance(low, (int, float)):
            raise Stuck(total, "the clamp of the sum is not a number")
        routing, total = replace(routing, clamp_min=float(low)), total.args[0]  # type: ignore[assignment]
        inside.add(total)
    shifted = with_scalar(total, *ADD)
    if shifted is not None:
        total, eps = shifted
        routing = replace(routing, eps=eps)
        inside.add(total)
    summed = is_op(total, aten.sum.dim_IntList) and total.args[0] is weights and arg(total, 2, "keepdim", False) is True
    if not summed or dim_of(total, 1, "dim", 2) != 1:
        raise Stuck(total, "the combine weights are not divided by their own sum")
    return replace(routing, normalize="sum")


def _read_score(scores: Node, routing: Routing) -> tuple[Routing, Node]:
    """(routing with its score, logits)."""
    if routing.after_topk:
        return routing, scores
    if is_op(scores, aten.sigmoid.default):
        return replace(routing, score="sigmoid"), scores.args[0]  # type: ignore[return-value]
    if is_op(scores, aten.softmax.int, aten._softmax.default) and dim_of(scores, 1, "dim", 2) == 1:
        if value_dtype(scores) != torch.float32:
            raise Stuck(scores, "the router's softmax is not computed in float32")
        return replace(routing, score="softmax"), scores.args[0]  # type: ignore[return-value]
    raise Stuck(scores, "the router's score is not a sigmoid or a softmax of a linear")


def value_dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


# -------------------------------------------------------------------------------------------------------- shared expert


def read_shared(edit: Editor, block: MoeBlock) -> MoeBlock:
    """`block` with the shared expert that is added to it, when one follows; otherwise the block as it is.

    A sum with anything else (the residual stream, say) ends the block before it.
    """
    users = list(block.end.users)
    if len(users) != 1:
        return block
    total = users[0]
    pair = binary(total, aten.add.Tensor)
    if pair is None:
        return block
    other = pair[1] if pair[0] is block.end else pair[0]
    if not isinstance(other, Node) or other is block.end:
        return block
    inside: set[Node] = set()
    shared = _read_gated_mlp(edit, other, block.x, inside)
    if shared is None:
        return block
    return replace(block, end=total, shared=shared, inside=block.inside | inside | {block.end})


def _read_gated_mlp(edit: Editor, node: Node, x: Node, inside: set[Node]) -> SharedExpert | None:
    """down(silu(gate(x)) * up(x)), without biases, of the same x as the experts; None when it is anything else."""
    inside.add(node)
    scale_weight = None
    pair = binary(node, *MULTIPLY)
    if pair is not None:  # sigmoid(x . w) * mlp
        for gate, mlp in (pair, pair[::-1]):
            logits = gate.args[0] if is_op(gate, aten.sigmoid.default) else None
            if is_op(logits, aten.linear.default) and _same(logits.args[0], x) and shape(logits.args[1])[0] == 1:
                scale_weight, node = logits.args[1], mlp
                inside |= {gate, logits, mlp}
                break
    if not is_op(node, aten.linear.default) or arg(node, 2, "bias") is not None:
        return None
    hidden, down = node.args[0], node.args[1]
    pair = binary(hidden, *MULTIPLY)
    if pair is None:
        return None
    for acted, up in (pair, pair[::-1]):
        kind = activation_of(acted)
        if kind is None or kind[0] != "silu":
            continue
        gate = kind[1]
        linears = (gate, up)
        if not all(is_op(n, aten.linear.default) and arg(n, 2, "bias") is None and _same(n.args[0], x) for n in linears):
            continue
        weights = [gate.args[1], up.args[1], down]
        if any(edit.weight_of(w) is None for w in weights):
            continue
        inside |= {hidden, acted, gate, up}
        return SharedExpert(*weights, scale_weight=scale_weight)
    return None


def _same(a: Any, b: Node) -> bool:
    """The same rows in the same order, whatever the reshapes between."""
    return isinstance(a, Node) and unview(a) is unview(b)


def check_closed(block: MoeBlock) -> None:
    """Nothing inside the block may be read from outside it: it would have to be computed twice."""
    for node in block.inside - {block.end}:
        for user in node.users:
            if user not in block.inside and user is not block.end:
                raise Stuck(user, f"it reads {node.name}, which is inside the block")
