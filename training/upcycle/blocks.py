"""The gated feed-forward blocks of a dense model, found in its graph by what they compute.

    y = down(silu(gate(x)) * up(x))

The names of their weights follow from the graph, so a block is found whatever its module is called.

D width of the model, F neurons of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.matching.activation import activation_of, read_activation
from moec.compiler.matching.read import Stuck, aten, is_op, shape, unview
from moec.compiler.ops import fused_moe
from moec.compiler.ops.attributes import Experts
from moec.compiler.program import Program, module_path

_PLAIN = Experts(activation="silu")
_NEAREST = "splitting and copying are for blocks down(silu(gate(x)) * up(x)); train a mixture from the start instead"


@dataclass(frozen=True)
class DenseBlock:
    """One block: the products' nodes, and the names of their weights, [F, D], [F, D] and [D, F]."""

    gate: Node
    down: Node
    gate_name: str
    up_name: str
    down_name: str
    neurons: int


def dense_blocks(program: Program) -> list[DenseBlock]:
    """The blocks of a Program at stage FUSED, in the order they run.

    CompileError with the place and the reason for a block that cannot be upcycled: an activation other than SiLU, no
    gate, biases, gate and up in one weight; for a model that is a mixture already, and for one without blocks.
    """
    found: list[DenseBlock] = []
    refused: list[str] = []
    for node in program.graph.nodes:
        if node.target is fused_moe:
            raise CompileError(
                "is a mixture of experts already", place=program.info.name, remedy="name the dense model it began as"
            )
        hidden = _hidden(program, node)
        if hidden is None:
            continue
        block, fault = _read(program, node, hidden)
        if block is not None:
            found.append(block)
        else:
            refused.append(f"{module_path(node) or node.name}: {fault}")
    if refused:
        more = f" (and {len(refused) - 1} more blocks)" if len(refused) > 1 else ""
        raise CompileError(refused[0] + more, place=program.info.name, remedy=_NEAREST)
    if not found:
        raise CompileError("no gated feed-forward block was found", place=program.info.name, remedy=_NEAREST)
    return found


def _hidden(program: Program, node: Node) -> Node | None:
    """The activations that a product reads, where it is the second product of a feed-forward block of any kind."""
    if not is_op(node, aten.linear.default) or program.weight_of(node.args[1]) is None:  # type: ignore[arg-type]
        return None
    hidden = unview(node.args[0])  # type: ignore[arg-type]
    sides = [hidden, *(a for a in hidden.args if isinstance(a, Node) and is_op(hidden, aten.mul.Tensor))]
    acted = any(activation_of(s) is not None or is_op(s, aten.tanh.default) for s in sides)
    return hidden if acted and any(_product(s) for s in _below(hidden)) else None


def _below(hidden: Node) -> list[Node]:
    """The nodes at most three operations below a value."""
    seen, edge = [], [hidden]
    for _ in range(3):
        edge = [a for n in edge for a in n.all_input_nodes]
        seen += edge
    return seen


def _product(node: Node) -> bool:
    return is_op(node, aten.linear.default)


def _read(program: Program, down: Node, hidden: Node) -> tuple[DenseBlock | None, str]:
    """(the block, "") or (None, why it cannot be upcycled)."""
    try:
        activation = read_activation(hidden)
    except Stuck as stuck:
        return None, stuck.reason
    if not activation.experts.gated:
        return None, f"its activation, {activation.experts.activation}, is not gated"
    if activation.experts != _PLAIN:
        return None, f"it is not SwiGLU: {activation.experts}"
    if activation.up is None:
        return None, "gate and up are one weight"
    gate, up = unview(activation.gate), unview(activation.up)
    if not _product(gate) or not _product(up):
        return None, "gate or up is not a product with a weight"
    if unview(gate.args[0]) is not unview(up.args[0]):  # type: ignore[arg-type]
        return None, "gate and up read different values"
    products = (gate, up, down)
    if any(len(p.args) > 2 and p.args[2] is not None for p in products):
        return None, "it has biases"
    names = [program.weight_of(p.args[1]) for p in products]  # type: ignore[arg-type]
    if any(n is None for n in names):
        return None, "gate or up is not a product with a weight"
    gate_name, up_name, down_name = (str(n) for n in names)
    neurons = int(shape(down.args[1])[1])  # type: ignore[arg-type]
    return DenseBlock(gate, down, gate_name, up_name, down_name, neurons), ""
