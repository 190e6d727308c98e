"""float_activations: the flag of every quantized operator and nothing else."""

from __future__ import annotations

import pytest

from moec.compiler.ops import find_call
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program, Stage
from moec.passes.float_activations import QUANTIZED, float_activations
from moec.passes.pipelines import fusion
from moec.passes.quantize_weights import quantize_weights
from tests.harness import export_toy, run
from tests.passes.test_quantize_weights import ROLES, Toy, scheme


@pytest.fixture(scope="module")
def fused() -> Program:
    return run_passes(export_toy(Toy, ROLES), fusion())


def _flags(program: Program) -> list[object]:
    calls = [find_call(node) for node in program.graph.nodes if node.target in QUANTIZED]
    return [call.int8_activations for call in calls]  # type: ignore[union-attr]


def test_the_flag_of_every_quantized_operator_and_nothing_else(fused: Program) -> None:
    quantized = run(quantize_weights(scheme(activations="int8")), fused).program
    assert _flags(quantized)
    assert all(flag is True for flag in _flags(quantized))
    legal = run(float_activations(), quantized)
    assert legal.changed == len(_flags(quantized))
    assert legal.program.stage is Stage.LEGAL
    assert all(flag is False for flag in _flags(legal.program))
    assert legal.program.text().count("True") + legal.changed == quantized.text().count("True")
    assert legal.program.weights.keys() == quantized.weights.keys()
    assert _flags(quantized)[0] is True  # the program it was given is as it was


def test_blocks_go_with_the_rounding(fused: Program) -> None:
    quantized = run(quantize_weights(scheme(activations={"bits": 8, "group": 32})), fused).program
    legal = run(float_activations(), quantized).program
    before, after = ([find_call(n) for n in p.graph.nodes if n.target in QUANTIZED] for p in (quantized, legal))
    assert {call.activation_block for call in before} == {32}  # type: ignore[union-attr]
    assert {call.activation_block for call in after} == {0}  # type: ignore[union-attr]


def test_idempotent_and_nothing_in_a_float_program(fused: Program) -> None:
    legal = run(float_activations(), fused)
    assert legal.changed == 0
    assert legal.program.text() == fused.text().replace("stage=FUSED", "stage=LEGAL")
