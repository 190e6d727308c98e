"""Every product of two tensors in one form, whichever operator spells it: a letter for each dimension.

    linear(x, W, b)                    "ni", "oi" -> "no", and a bias
    mm, addmm, matmul of two matrices  "ni", "io" -> "no"
    bmm                                "pni", "pio" -> "pno"
    matmul over batches                "pqni", "pqio" -> "pqno"; where one operand repeats, its dimension is "1"
    einsum                             its own letters

A transposed operand is read below the transpose, its letters in the order of what was transposed: a weight used as
W^T says so by its letters, not by an operator around it. What no operator above spells (a diagonal, an operand summed
by itself, three operands) is no contraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moec.compiler.matching.read import arg, aten, is_op, rank, same_size, shape, static

ONE = "1"  # the letter of a dimension of size one that the other operand's is repeated over
TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
MATRICES = (aten.mm.default, aten.bmm.default, aten.matmul.default)
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.einsum.default, *MATRICES)


@dataclass(frozen=True)
class Contraction:
    """result[letters] = sum of left * right over the letters that `result` lacks, + bias along its last letter.

    terms: the letters of `operands`, which are the node's own, transposes included.
    """

    node: Node
    operands: tuple[Node, Node]
    terms: tuple[str, str]
    result: str
    bias: Node | None = None

    @property
    def summed(self) -> str:
        """The letters that are summed over, in the order of the left operand."""
        return "".join(c for c in self.terms[0] if c != ONE and c not in self.result)

    def size(self, letter: str) -> Any:
        """The size of a dimension, a number or a symbol."""
        for operand, term in zip(self.operands, self.terms, strict=True):
            if letter in term:
                return shape(operand)[term.index(letter)]
        raise AssertionError(f"{self.node}: no dimension {letter}")

    def split(self, is_weight: Callable[[Node], bool]) -> Product | None:
        """The operand that `is_weight`, below its transposes, and the other one as it is; None if neither is one.

        If both are, the second is taken for the weight: it is where linear and matmul have it.
        """
        for side in (1, 0):
            weight, term = untransposed(self.operands[side], self.terms[side])
            if is_weight(weight):
                return Product(self, self.operands[1 - side], self.terms[1 - side], weight, term, self.result)
        return None


@dataclass(frozen=True)
class Product:
    """A contraction of rows with a weight, which is read below its transposes. Each term has a letter a dimension."""

    of: Contraction
    rows: Node
    rows_term: str
    weight: Node
    weight_term: str
    result: str

    def below_transposes(self) -> Product:
        """The same with the rows, too, read below their transposes."""
        rows, term = untransposed(self.rows, self.rows_term)
        return Product(self.of, rows, term, self.weight, self.weight_term, self.result)

    def without_ones(self) -> Product:
        """Letters of rows alone whose size is one left out of the terms: those of products of single rows."""
        own = set(self.rows_term) - set(self.weight_term)
        ones = {c for c in own if c == ONE or static(self.of.size(c)) == 1}
        rows, result = ("".join(c for c in term if c not in ones) for term in (self.rows_term, self.result))
        return Product(self.of, self.rows, rows, self.weight, self.weight_term, result)

    @property
    def matrix(self) -> bool | None:
        """Of rows [..., i] times a matrix: whether it is stored [in, out]; None for any other product."""
        lead, inner = self.rows_term[:-1], self.rows_term[-1:]
        if len(self.weight_term) != 2 or inner not in self.weight_term or ONE in self.rows_term:
            return None
        outer = self.weight_term.replace(inner, "")
        if len(outer) != 1 or outer in lead or self.result != lead + outer:
            return None
        return self.weight_term[0] == inner


def untransposed(node: Any, term: str) -> tuple[Any, str]:
    """(what lies below the transposes of `node`, the letters of its dimensions)."""
    while is_op(node, *TRANSPOSES):
        source = node.args[0]
        order = _order(node, rank(source))
        if order is None:
            break
        moved = [""] * len(order)
        for here, there in enumerate(order):
            moved[there] = term[here]
        node, term = source, "".join(moved)
    return node, term


def _order(node: Node, dims: int) -> list[int] | None:
    """For each dimension of a transpose, the one of its source."""
    order = list(range(dims))
    if node.target is aten.permute.default:
        given: Any = arg(node, 1, "dims")
        return [d % dims for d in given]
    if node.target is aten.transpose.int:
        first, second = (int(arg(node, i, f"dim{i - 1}")) % dims for i in (1, 2))
        order[first], order[second] = order[second], order[first]
        return order
    return order[::-1] if node.target is aten.numpy_T.default or dims == 2 else None


def contraction(node: Any) -> Contraction | None:
    """`node` as a contraction of two tensors; None if it is none."""
    if not is_op(node, *PRODUCTS):
        return None
    if node.target is aten.einsum.default:
        return _einsum(node)
    bias = None
    if node.target is aten.linear.default:
        left, right, bias = node.args[0], node.args[1], arg(node, 2, "bias")
    elif node.target is aten.addmm.default:
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        bias, left, right = node.args[:3]
        if rank(bias) != 1:
            return None
    else:
        left, right = node.args[:2]
    ranks = rank(left), rank(right)
    if min(ranks) < (2 if node.target is not aten.linear.default else 1) or ranks[1] < 2:
        return None
    if node.target is aten.linear.default:
        lead = _letters(ranks[0] - 1)
        terms = (lead + "i", "oi")
        return Contraction(node, (left, right), terms, lead + "o", bias)
    terms, lead = _batches(left, right)
    return Contraction(node, (left, right), (terms[0] + "ni", terms[1] + "io"), lead + "no", bias)


def _letters(count: int) -> str:
    return "abcdefgh"[:count] if count <= 8 else ""


def _batches(left: Node, right: Node) -> tuple[tuple[str, str], str]:
    """Letters of the dimensions before the last two of each operand of a matmul, and of the result."""
    counts = rank(left) - 2, rank(right) - 2
    lead = _letters(max(counts))
    terms = []
    for operand, count, other in ((left, counts[0], right), (right, counts[1], left)):
        term = ""
        for letter, place in zip(lead[len(lead) - count :], range(-2 - count, -2), strict=True):
            mine = shape(operand)[place]
            theirs = shape(other)[place] if -place <= rank(other) else 1
            repeats = static(mine) == 1 and not same_size(theirs, 1)
            term += ONE if repeats else letter
        terms.append(term)
    return (terms[0], terms[1]), lead


def _einsum(node: Node) -> Contraction | None:
    left, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    terms, operands = left.split(","), list(node.args[1])  # type: ignore[arg-type]
    letters = "".join(terms)
    if not arrow or len(terms) != 2 or len(operands) != 2 or not all(isinstance(o, Node) for o in operands):
        return None
    if not letters.isascii() or not letters.isalpha() or any(len(set(t)) != len(t) for t in (*terms, result)):
        return None
    if not set(result) <= set(letters):
        return None
    if any(c not in result and not all(c in term for term in terms) for c in letters):
        return None  # an operand that is summed by itself
    a, b = terms
    for letter in set(a) & set(b):  # a size of one is repeated over the other's
        sizes = [shape(o)[t.index(letter)] for o, t in zip(operands, terms, strict=True)]
        if not same_size(*sizes):
            return None
    return Contraction(node, (operands[0], operands[1]), (a, b), result)
