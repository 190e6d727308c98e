"""levels_to_int8: the same values with 8 bits, in every operator that holds levels and in no other."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.ops import EmbeddingQ, FusedMoeQ, LinearQ, find_call
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.passes.levels_to_int8 import levels_to_int8, note
from moec.passes.pipelines import fusion
from moec.passes.quantize_weights import quantize_weights
from tests.harness import export_toy, run
from tests.passes.test_quantize_weights import ROLES, Toy, outputs, scheme


@pytest.fixture(scope="module")
def fused() -> Program:
    return run_passes(export_toy(Toy, ROLES), fusion())


def formats(program: Program) -> set[tuple[str, int, str]]:
    found = set()
    for node in program.graph.nodes:
        call = find_call(node)
        if isinstance(call, EmbeddingQ | FusedMoeQ | LinearQ):
            found.add((type(call).__name__, call.bits, call.levels))
    return found


@pytest.mark.parametrize("kind", ["nl3", "iq4_nl", "fp4"])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_the_same_values(fused: Program, kind: str, axis: str) -> None:
    given = scheme(weights=kind, expert_group_axis=axis, embedding="int4", activations="int8")
    quantized = run(quantize_weights(given), fused).program
    assert formats(quantized) == {
        ("EmbeddingQ", 4, ""),
        ("LinearQ", 4, ""),
        ("LinearQ", 4, kind),
        ("FusedMoeQ", 4, kind),
    }
    done = run(levels_to_int8(), quantized)
    assert done.changed == sum(getattr(find_call(n), "levels", "") == kind for n in quantized.graph.nodes) == 2
    assert formats(done.program) == {
        ("EmbeddingQ", 4, ""),
        ("LinearQ", 4, ""),
        ("LinearQ", 8, ""),
        ("FusedMoeQ", 8, ""),
    }
    for held in quantized.quantized.values():
        if not held.format.levels:
            assert held.codes + ".int8" not in done.program.weights
            continue
        wide = done.program.weights[held.codes + ".int8"]
        loaded = wide.load()
        assert (loaded.dtype, tuple(loaded.shape)) == (torch.int8, wide.shape)
        assert torch.equal(loaded, held.tensor(quantized.weights).unpacked())
    for before, after in zip(outputs(quantized), outputs(done.program), strict=True):
        assert torch.equal(before, after)
    (line,) = note(quantized)
    assert f"{kind.upper()} are INT8 codes of the same values" in line


def test_whole_numbers_are_left_alone(fused: Program) -> None:
    quantized = run(quantize_weights(scheme(weights="int4", embedding="int8")), fused).program
    done = run(levels_to_int8(), quantized)
    assert done.changed == 0
    assert done.program is quantized
    assert note(quantized) == ()
