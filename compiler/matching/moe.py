"""Read one MoE block backwards from the node that combines its experts' outputs.

    y = sum_k  weight[t, k] * expert[indices[t, k]](x[t])

Nothing is assumed: every node is explained completely, or `Stuck` names it and the reason. Reading backwards from the
result makes the match sound: what is returned is exactly what computes that node. `check_closed` then checks the same
from the other side: the nodes between the operands and the result read nothing else, and nobody else reads them.

N tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import operator
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.experts import MULTIPLY, activation_of, read_experts
from moec.compiler.matching.read import (
    Stuck,
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
from moec.compiler.program import Editor

FORWARD_LIMIT = 64  # nodes between gathered weights and the combining sum; fifteen in every spelling seen
SLICE_LIMIT = 400  # nodes of one block; under sixty in every spelling seen


@dataclass(frozen=True)
class SharedExpert:
    gate: Node
    up: Node
    down: Node
    scale_weight: Node | None  # [1, D]: the output is multiplied by sigmoid(x . w)


@dataclass(frozen=True)
class MoeBlock:
    """The operands and attributes of a fused node, and the node whose value it is."""

    end: Node  # [N, D]: replaced by the fused node
    x: Node  # [N, D]
    router_input: Node  # [N, D]
    router_weight: Node
    router_bias: Node | None
    selection_bias: Node | None
    w13: Node
    w2: Node
    top_k: int
    routing: Routing
    experts: Experts
    shared: SharedExpert | None = None

    def weights(self) -> list[Node]:
        """Every weight the fused node reads."""
        nodes = [self.router_weight, self.router_bias, self.selection_bias, self.w13, self.w2]
        if self.shared is not None:
            nodes += [self.shared.gate, self.shared.up, self.shared.down, self.shared.scale_weight]
        return [n for n in nodes if n is not None]


def combine_of(index: Node) -> Node:
    """From a gathered expert weight down to the nearest sum over K: the node to read back from."""
    seen = {index}
    queue = deque([index])
    while queue and len(seen) < FORWARD_LIMIT:
        node = queue.popleft()
        if is_op(node, aten.sum.dim_IntList) and rank(node.args[0]) == 3 and rank(node) == 2:  # type: ignore[arg-type]
            return node
        for user in node.users:
            if user not in seen and user.op == "call_function":
                seen.add(user)
                queue.append(user)
    raise Stuck(index, "no sum over the selected experts follows")


def read_block(edit: Editor, end: Node) -> MoeBlock:
    """The block whose routed output is `end` [N, D] = sum over K of weighted expert outputs."""
    if dim_of(end, 1, "dim", 3) != 1 or arg(end, 2, "keepdim", False):
        raise Stuck(end, "the experts are not summed over their rank dimension")
    ranked: Node = end.args[0]  # type: ignore[assignment]
    top_k = static(shape(ranked)[1])
    if top_k is None:
        raise Stuck(end, "the number of experts per token is not fixed")
    outputs, weights_NK = _weighted(ranked, top_k)
    routed = read_experts(edit, outputs, top_k)
    router = read_router(edit, weights_NK, routed.indices)
    count = shape(routed.w13)[0]
    if shape(router.weight)[0] != count:
        raise Stuck(router.weight, f"the router scores {shape(router.weight)[0]} experts, the weights hold {count}")
    if router.top_k != top_k:
        raise Stuck(end, f"{top_k} experts are summed, {router.top_k} are selected")
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
        w2=routed.w2,
        top_k=top_k,
        routing=router.routing,
        experts=routed.experts,
    )


def _weighted(ranked: Node, top_k: int) -> tuple[Node, Node]:
    """(expert outputs, combine weights [N, K]) of their product [N, K, D], or [N*K, D] reshaped to it."""
    weighted = unview(ranked)
    pair = binary(weighted, *MULTIPLY)
    if pair is None:
        raise Stuck(weighted, "the experts' outputs are not multiplied by combine weights")
    flat = rank(weighted) == 2 and same_size(shape(weighted)[1], shape(ranked)[2])
    if not flat and not same_shape(shape(weighted), shape(ranked)):
        raise Stuck(ranked, "the weighted outputs are not in the order [token, rank, feature]")
    for outputs, weights in (pair, pair[::-1]):
        if not isinstance(weights, Node) or not isinstance(outputs, Node):
            continue
        whole = same_shape(shape(outputs), shape(weighted))
        if rank(weights) != rank(weighted) or shape(weights)[-1] != 1 or not whole:
            continue
        if not flat and static(shape(weights)[1]) != top_k:
            continue
        weights_NK = unview(weights)
        if rank(weights_NK) != 2 or static(shape(weights_NK)[1]) != top_k:
            raise Stuck(weights, "the combine weights are not [N, K]")
        return outputs, weights_NK
    raise Stuck(weighted, "no combine weight for each selected expert")


# -------------------------------------------------------------------------------------------------------- shared expert


def read_shared(edit: Editor, block: MoeBlock) -> MoeBlock:
    """`block` with the shared expert that is added to it, when one follows; otherwise the block as it is.

    A sum with anything else (the residual stream, say) ends the block before it.
    """
    users = list(block.end.users)
    total = users[0] if len(users) == 1 else None
    pair = binary(total, aten.add.Tensor)
    if total is None or pair is None or not same_shape(shape(total), shape(block.end)):
        return block
    other = pair[1] if pair[0] is block.end else pair[0]
    if not isinstance(other, Node) or other is block.end:
        return block
    shared = _read_gated_mlp(edit, other, block)
    return block if shared is None else replace(block, end=total, shared=shared)


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
    if not is_op(node, aten.linear.default) or arg(node, 2, "bias") is not None:
        return None
    hidden, down = node.args[0], node.args[1]
    pair = binary(hidden, *MULTIPLY)
    if pair is None or edit.weight_of(down) is None:  # type: ignore[arg-type]
        return None
    for acted, up in (pair, pair[::-1]):
        kind = activation_of(acted)
        if kind is None or kind[0] != block.experts.activation:
            continue
        gate_weight, up_weight = _linear_of(edit, kind[1], block.x), _linear_of(edit, up, block.x)
        if gate_weight is not None and up_weight is not None and gate_weight is not up_weight:
            return SharedExpert(gate_weight, up_weight, down, scale_weight)  # type: ignore[arg-type]
    return None


def _linear_of(edit: Editor, node: Any, x: Node) -> Node | None:
    """The weight of a linear without bias that reads the rows of `x` [N, D]."""
    if not is_op(node, aten.linear.default) or arg(node, 2, "bias") is not None:
        return None
    rows, weight = node.args[:2]
    same = isinstance(rows, Node) and unview(rows) is unview(x) and shape(rows)[-1] == shape(x)[-1]
    return weight if same and edit.weight_of(weight) is not None else None


# -------------------------------------------------------------------------------------------------------------- closure


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
        if len(inside) > SLICE_LIMIT:
            raise Stuck(block.end, "the block does not end at the tokens that it reads")
        stack.extend(node.all_input_nodes)
    if unused:
        raise Stuck(block.end, f"{edit.weight_of(next(iter(unused)))} was taken for an operand and is not read")
    return inside
