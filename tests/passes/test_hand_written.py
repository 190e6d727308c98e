"""Blocks as people write them (tests/passes/hand_zoo.py): fused and equal, or refused with the reason."""

from __future__ import annotations

import re

import pytest

from moec.analysis.verify.structure import structure_faults
from moec.compiler.errors import CompileError
from moec.compiler.ops import fused_moe
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program, fake_mode_of, module_path
from moec.passes.flatten_tokens import flatten_tokens
from moec.passes.fuse_moe import fuse_moe
from moec.passes.narrow_routing import narrow_routing
from moec.passes.pipelines import fusion
from tests.harness import check_equal, run
from tests.passes import hand_zoo
from tests.variants import quick


@pytest.fixture(scope="module")
def before() -> Program:
    return hand_zoo.zoo(hand_zoo.FUSED)


@pytest.fixture(scope="module")
def after(before: Program) -> Program:
    return run_passes(before, fusion())


def test_all_are_equal(before: Program, after: Program) -> None:
    check_equal(before, after)


@pytest.mark.parametrize("name", hand_zoo.FUSED)
def test_fused(after: Program, name: str) -> None:
    fused = [module_path(n) for n in after.graph.nodes if n.target is fused_moe]
    assert sum(f".is_{name}." in f"{path}." for path in fused) == 1


def test_no_weight_is_lost(before: Program) -> None:
    """`moec verify` on every pass: a scale that became part of its experts' weights is said to be."""
    program = before
    for rule in fusion():
        result = run(rule, program)
        assert structure_faults(program, result.program, result.changed, result.folded) == [], rule.name
        if result.folded:
            unsaid = structure_faults(program, result.program, result.changed)
            assert f"{hand_zoo.E} elements of weights are read no more" in unsaid[0]
        program = result.program


def test_no_size_is_left_pending(before: Program) -> None:
    """Sizes made for rows that are picked by value would fail the next trace of the graph, a target's."""
    environment = fake_mode_of(run(flatten_tokens(), before).program.graph).shape_env
    assert not environment.pending_fresh_unbacked_symbols


@pytest.mark.parametrize("rule", [flatten_tokens, narrow_routing])
def test_a_rewrite_is_equal_and_ends(before: Program, rule: object) -> None:
    first = run(rule(), before)  # type: ignore[operator]
    assert first.changed > 0
    check_equal(before, first.program)
    again = run(rule(), first.program)  # type: ignore[operator]
    assert again.changed == 0
    assert again.program.text() == first.program.text()


@pytest.mark.parametrize(
    "name",
    quick(
        hand_zoo.REFUSED,
        (
            "expert_choice",
            "by_threshold",
            "capacity",
            "ranks_of_another_order",
            "scale_before_the_sum",
            "scale_before_the_experts",
            "weights_of_the_others",
            "cosine_router",
        ),
    ),
)
def test_refused(name: str) -> None:
    forward, reason = hand_zoo.REFUSED[name]
    program = hand_zoo.zoo({name: forward})
    narrowed = run(narrow_routing(), run(flatten_tokens(), program).program).program
    check_equal(program, narrowed)
    result = run(fuse_moe(), narrowed)
    assert result.changed == 0
    assert any(re.search(reason, r.reason) for r in result.refusals), [r.reason for r in result.refusals]
    with pytest.raises(CompileError, match="not fused") as caught:
        run_passes(program, fusion())
    assert ";" in str(caught.value), "a remedy is missing"
