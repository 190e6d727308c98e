"""last_token: the last row of the program, by itself; what is carried through, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.analysis.verify.graphs import Sample
from moec.analysis.verify.passes import bisect_passes, verify_passes
from moec.compiler.dialect import Legality
from moec.compiler.pipeline import Pass, PassResult, legal_for, run_passes
from moec.compiler.program import Program
from moec.passes.check_router import check_router
from moec.passes.fuse_rms_norm import fuse_rms_norm
from moec.passes.last_token import last_token
from tests.harness import CALLS, VOCABULARY, export_toy, run
from tests.interpreter import Interpreter
from tests.passes.moe_zoo import parameter

D = 6
ANY = Legality("a test")
aten = torch.ops.aten
SAMPLES = [Sample("a few", (1, 5, 2, 30, 7, 9, 3, 11))]


class Toy(nn.Module):
    """embed -> mix over tokens -> norm -> head (or no head)."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        self.embed, self.norm, self.head = parameter(VOCABULARY, D), parameter(D), parameter(VOCABULARY, D)
        self.has_head = head

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embed).cumsum(1)
        x = F.rms_norm(x, (D,), self.norm, 1e-5)
        return F.linear(x, self.head) if self.has_head else x.tanh()


def fused(head: bool = True) -> Program:
    return run_passes(export_toy(lambda: Toy(head)), [fuse_rms_norm(), check_router(), legal_for(ANY)])


@pytest.mark.parametrize("keep_dim", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_equals_the_last_row(head: bool, keep_dim: bool) -> None:
    before = fused(head)
    after = run_passes(before, [last_token(keep_dim=keep_dim)])
    assert after.last_token is not None
    assert after.digest() == before.digest(), "the program for every token stays"
    assert "last token of" in after.text()
    check_last_row(after)
    assert run(last_token(), after).changed == 0


def check_last_row(after: Program) -> None:
    """The method for the last token gives the last row of what the program gives."""
    assert after.last_token is not None
    every, last = Interpreter(after), Interpreter(after.last_token)
    for count, start in CALLS:
        ids = torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(count))
        at = torch.tensor([start])
        # the same operators on one row: only torch's own product may sum in another order
        torch.testing.assert_close(last(ids, at), every(ids, at)[:, -1], atol=1e-6, rtol=1e-6)


def shapes(program: Program | None, op: object) -> list[tuple[int, ...]]:
    assert program is not None
    return [tuple(n.meta["val"].shape) for n in program.graph.nodes if n.target is op]


def test_norm_and_head_see_one_row() -> None:
    after = run_passes(fused(), [last_token()])
    assert shapes(after.last_token, aten.linear.default) == [(1, 1, VOCABULARY)]
    assert shapes(after.last_token, torch.ops.moec.rms_norm.default) == [(1, 1, D)]
    assert shapes(after.last_token, aten.slice.Tensor) == [(1, 1, D)]


def _divided(logits: Tensor) -> Tensor:
    return logits / 8.0  # as Granite


def _capped(logits: Tensor) -> Tensor:
    return torch.tanh(logits / 30.0) * 30.0  # as Gemma 2


def _squared(logits: Tensor) -> Tensor:
    return logits * logits


def _beside(logits: Tensor) -> Tensor:
    return logits * logits.tanh()


class Scaled(Toy):
    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__(head=True)
        self.scale = scale

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return self.scale(super().forward(tokens, start_pos))


@pytest.mark.parametrize("scale", [_divided, _capped])
def test_logits_may_be_scaled_by_numbers(scale: Callable[[Tensor], Tensor]) -> None:
    before = run_passes(export_toy(lambda: Scaled(scale)), [fuse_rms_norm(), check_router(), legal_for(ANY)])
    after = run_passes(before, [last_token()])
    assert shapes(after.last_token, aten.linear.default) == [(1, 1, VOCABULARY)]
    check_last_row(after)


@pytest.mark.parametrize("scale", [_squared, _beside])
def test_two_values_with_rows_are_not_carried_through(scale: Callable[[Tensor], Tensor]) -> None:
    before = run_passes(export_toy(lambda: Scaled(scale)), [fuse_rms_norm(), check_router(), legal_for(ANY)])
    after = run_passes(before, [last_token()])
    (head,) = shapes(after.last_token, aten.linear.default)
    assert head[1] != 1
    check_last_row(after)


def test_only_what_is_named_row_wise_is_carried_through() -> None:
    after = run_passes(fused(), [last_token([aten.linear.default], keep_dim=False)])
    assert shapes(after.last_token, aten.linear.default) == [(1, VOCABULARY)]
    (norm,) = shapes(after.last_token, torch.ops.moec.rms_norm.default)
    assert norm[1] != 1, "the norm is computed for every token"
    assert shapes(after.last_token, aten.cumsum.default)[0][1] != 1, "a sum over tokens is not row-wise"


def test_verify_and_bisect_see_it() -> None:
    passes = [fuse_rms_norm(), check_router(), legal_for(ANY), last_token()]
    report = verify_passes(export_toy(lambda: Toy(True)), passes, SAMPLES)
    assert report.exit_status == 0, report.text()
    assert any(c.name == "last_token: last token" for c in report.checks)

    def wrong(program: Program) -> PassResult:
        """The first row instead of the last."""
        made = last_token().run(program).program
        assert made.last_token is not None
        edit = made.last_token.edit()
        node = next(n for n in edit.graph.nodes if n.target is aten.slice.Tensor)
        node.args = (node.args[0], 1, 0, 1)
        from dataclasses import replace

        return PassResult(replace(made, last_token=edit.done()), 1)

    made_wrong = Pass("last_token", wrong, last_token().needs, last_token().gives)
    found = bisect_passes(export_toy(lambda: Toy(True)), [*passes[:-1], made_wrong], SAMPLES)
    assert found.culprit == "last_token"
    assert any("last token" in c.name for c in found.failures)


def test_an_edit_drops_the_method() -> None:
    after = run_passes(fused(), [last_token()])
    assert after.edit().done().last_token is None
