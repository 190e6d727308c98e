"""Products read through one view: every spelling gives the same letters, and evaluating them gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from moec.compiler.matching.contraction import ONE, Contraction, contraction, untransposed

N, D, F, P, K = 5, 7, 3, 4, 2


def draw(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor) -> Tensor:
        return self.function(*given)


def graph_of(function: Callable[..., Tensor], *given: Tensor) -> list[Node]:
    return list(torch.export.export(Call(function), given, strict=False).graph.nodes)


def found_in(function: Callable[..., Tensor], *given: Tensor) -> Contraction | None:
    found = [c for node in graph_of(function, *given) if (c := contraction(node)) is not None]
    assert len(found) <= 1
    return found[0] if found else None


def computed(found: Contraction, values: dict[Node, Tensor]) -> Tensor:
    """What the letters say, by an einsum of what lies below the transposes; dimensions of size one are repeated."""
    terms, operands = [], []
    for operand, term in zip(found.operands, found.terms, strict=True):
        node, letters = untransposed(operand, term)
        value = values[node]
        operands.append(value.squeeze([d for d, c in enumerate(letters) if c == ONE]))
        terms.append(letters.replace(ONE, ""))
    y = torch.einsum(f"{terms[0]},{terms[1]}->{found.result}", *operands)
    return y if found.bias is None else y + values[found.bias]


SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (lambda x, w: nn.functional.linear(x, w), ((N, D), (F, D))),
    "linear of three dimensions": (lambda x, w: nn.functional.linear(x, w), ((P, N, D), (F, D))),
    "linear with a bias": (lambda x, w, b: nn.functional.linear(x, w, b), ((N, D), (F, D), (F,))),
    "linear of a transposed weight": (lambda x, w: nn.functional.linear(x, w.t()), ((N, D), (D, F))),
    "mm": (lambda x, w: torch.mm(x, w), ((N, D), (D, F))),
    "mm with T": (lambda x, w: x @ w.T, ((N, D), (F, D))),
    "mm of a transposed left": (lambda x, w: x.transpose(0, 1) @ w, ((D, N), (D, F))),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), ((F,), (N, D), (D, F))),
    "bmm": (lambda x, w: torch.bmm(x, w), ((P, N, D), (P, D, F))),
    "bmm of transposed weights": (lambda x, w: torch.bmm(x, w.transpose(1, 2)), ((P, N, D), (P, F, D))),
    "bmm of permuted weights": (lambda x, w: torch.bmm(x, w.permute(2, 1, 0)), ((P, N, D), (F, D, P))),
    "matmul, rows for all": (lambda x, w: x @ w, ((N, D), (P, D, F))),
    "matmul, one batch repeated": (lambda x, w: x @ w, ((1, N, D), (P, D, F))),
    "matmul of four dimensions": (lambda x, w: x @ w, ((N, 1, 1, D), (N, K, D, F))),
    "matmul of batches of one": (lambda x, w: x @ w, ((1, N, D), (1, D, F))),
    "einsum": (lambda x, w: torch.einsum("nd,edf->nef", x, w), ((N, D), (P, D, F))),
    "einsum, weight first": (lambda w, x: torch.einsum("xy, zx -> zy", w, x), ((D, F), (N, D))),
    "einsum, permuted": (lambda x, w: torch.einsum("nkf,nkdf->nkd", x, w.transpose(2, 3)), ((N, K, F), (N, K, F, D))),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_letters_say_what_the_operator_computes(name: str) -> None:
    """Both are fp32 sums of at most 7 products of order 1, in orders of their own: 1e-5 is fifty units."""
    function, sizes = SPELLINGS[name]
    given = [draw(*s) for s in sizes]
    found = found_in(function, *given)
    assert found is not None
    inputs = [n for n in graph_of(function, *given) if n.op == "placeholder"]
    by_name = {node.name: value for node, value in zip(inputs, given, strict=True)}
    nodes = {n: by_name[n.name] for n in found.node.graph.nodes if n.op == "placeholder"}
    torch.testing.assert_close(computed(found, nodes), function(*given), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("function", "sizes", "why"),
    [
        (lambda x: torch.einsum("nn->n", x), ((N, N),), "one operand"),
        (lambda x, y: torch.einsum("nn,nd->nd", x, y), ((N, N), (N, D)), "a diagonal"),
        (lambda x, y: torch.einsum("nd,ef->nf", x, y), ((N, D), (P, F)), "operands summed by themselves"),
        (lambda x, y: torch.einsum("nd,df", x, y), ((N, D), (D, F)), "no result written"),
        (lambda x, y: torch.einsum("...d,df->...f", x, y), ((N, D), (D, F)), "an ellipsis"),
        (lambda x, y: torch.einsum("nd,de->ne", x, y), ((N, 1), (D, F)), "a size repeated in a sum"),
        (lambda x, y, z: torch.einsum("nd,de,ef->nf", x, y, z), ((N, D), (D, P), (P, F)), "three operands"),
        (lambda b, x, w: torch.addmm(b, x, w, alpha=2), ((F,), (N, D), (D, F)), "scaled"),
        (lambda b, x, w: torch.addmm(b, x, w), ((N, F), (N, D), (D, F)), "a matrix is added"),
        (lambda x, w: x @ w, ((N, D), (D,)), "a vector"),
        (lambda x, y: x * y, ((N, D), (N, D)), "no product of matrices"),
    ],
)
def test_what_is_no_contraction(function: Callable[..., Tensor], sizes: tuple[tuple[int, ...], ...], why: str) -> None:
    assert found_in(function, *[draw(*s) for s in sizes]) is None, why


@pytest.mark.parametrize(
    ("function", "sizes", "in_out"),
    [
        (lambda x, w: nn.functional.linear(x, w), ((N, D), (F, D)), False),
        (lambda x, w: x @ w, ((N, D), (D, F)), True),
        (lambda x, w: x @ w.t(), ((N, D), (F, D)), False),
        (lambda x, w: x @ w.permute(1, 0), ((N, D), (F, D)), False),
        (lambda x, w: torch.einsum("fd,nd->nf", w, x), ((N, D), (F, D)), False),
        (lambda x, w: torch.einsum("nd,df->nf", x, w), ((N, D), (D, F)), True),
        (lambda x, w: torch.einsum("nd,df->fn", x, w), ((N, D), (D, F)), None),  # another order of the result
        (lambda x, w: torch.einsum("nd,nf->nf", x.sum(1, keepdim=True), w), ((N, D), (N, F)), None),  # nothing summed
        (lambda x, w: x.t() @ w, ((D, N), (D, F)), True),  # the rows stay as they are spelled
    ],
)
def test_rows_times_a_matrix(function: Callable[..., Tensor], sizes: tuple[tuple[int, ...], ...], in_out: bool) -> None:
    given = [draw(*s) for s in sizes]
    found = found_in(function, *given)
    if found is None:
        assert in_out is None
        return
    weight = [n for n in found.node.graph.nodes if n.op == "placeholder"][1]
    product = found.split(lambda node: node is weight)
    assert product is not None
    assert product.matrix is in_out


def test_products_of_single_rows_lose_their_ones() -> None:
    for function, sizes, terms in (
        (lambda x, w: torch.bmm(x, w), ((P, 1, D), (P, D, F)), ("ai", "aio", "ao")),
        (lambda x, w: torch.bmm(w, x), ((P, D, 1), (P, F, D)), ("ai", "ani", "an")),
        (lambda x, w: x @ w, ((N, 1, 1, D), (N, K, D, F)), ("ai", "abio", "abo")),
    ):
        given = [draw(*s) for s in sizes]
        found = found_in(function, *given)
        assert found is not None
        weight = [n for n in found.node.graph.nodes if n.op == "placeholder"][1]
        product = found.split(lambda node, weight=weight: node is weight)
        assert product is not None
        bare = product.without_ones()
        assert (bare.rows_term, bare.weight_term, bare.result) == terms
