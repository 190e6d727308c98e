"""Drop products over an empty dimension: a shared expert of width 0, as sweeps over a config leave it.

linear(x [.., K], W [N, K])  with K = 0          ->  0
zero * y, reshape(zero), cast(zero)              ->  0
y + zero, zero + y  of y's shape and type        ->  y
"""

from __future__ import annotations

from torch.fx import Node

from moec.compiler.matching.contraction import contraction
from moec.compiler.matching.read import aten
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Program, Stage
from moec.passes.canonicalize import CASTS, RESHAPES

SUMS = {aten.add.Tensor}


def drop_empty() -> Pass:
    return Pass("drop_empty", _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    if not any(_is_empty_product(node) for node in program.graph.nodes):
        return PassResult(program, 0)
    edit = program.edit()
    zeros: set[Node] = set()
    changed = 0
    for node in list(edit.graph.nodes):
        if node.op != "call_function":
            continue
        operands = [a for a in node.args[:2] if isinstance(a, Node)]
        if _is_zero(node, operands, zeros):
            zeros.add(node)
        elif node.target in SUMS and len(operands) == 2 and any(a in zeros for a in operands):
            kept = operands[0] if operands[1] in zeros else operands[1]
            if _alike(kept, node):
                node.replace_all_uses_with(kept)
                edit.graph.erase_node(node)
                changed += 1
    return PassResult(edit.done() if changed else program, changed)


def _is_zero(node: Node, operands: list[Node], zeros: set[Node]) -> bool:
    if node.target is aten.mul.Tensor:
        return any(a in zeros for a in operands)
    if node.target in RESHAPES | CASTS:
        return node.args[0] in zeros
    return _is_empty_product(node)


def _is_empty_product(node: Node) -> bool:
    """A product without bias whose reduction has no element; a reduction whose size is not known is not empty."""
    product = contraction(node)
    if product is None or product.bias is not None:
        return False
    sizes = [product.size(letter) for letter in product.summed]
    return any(isinstance(size, int) and size == 0 for size in sizes)


def _alike(a: Node, b: Node) -> bool:
    mine, other = a.meta["val"], b.meta["val"]
    return mine.dtype == other.dtype and [str(n) for n in mine.shape] == [str(n) for n in other.shape]
