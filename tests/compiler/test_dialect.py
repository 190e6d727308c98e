"""What each stage refuses, what a target's declaration adds, and that one iterator enforces both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moec.compiler import ops
from moec.compiler.dialect import (
    FLOAT_ACTIVATIONS,
    OWN_OPERATORS,
    STAGES,
    TORCH,
    Legality,
    Permitted,
    check_dialect,
)
from moec.compiler.errors import CompileError
from moec.compiler.pipeline import Pass, PassResult, legal_for, run_passes, steps
from moec.compiler.program import Editor, Program, Stage
from moec.passes.check_router import check_router
from moec.passes.fuse_moe import fuse_moe
from tests.harness import export_toy
from tests.passes.moe_zoo import parameter, program

aten = torch.ops.aten


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = parameter(40, 6)

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.embed).relu()


def edited(before: Program, change: Callable[[Editor], None], stage: Stage | None = None) -> Program:
    edit = before.edit()
    with edit.fake_mode:
        change(edit)
    return edit.done(stage=stage)


def relu_becomes(op: object) -> Callable[[Editor], None]:
    def change(edit: Editor) -> None:
        node = next(n for n in edit.graph.nodes if n.target is aten.relu.default)
        node.target = op

    return change


def test_every_stage_is_in_the_table() -> None:
    assert list(STAGES) == list(Stage)


def test_an_exported_graph_reads_what_the_program_holds() -> None:
    exported = replace(export_toy(Toy), stage=Stage.EXPORTED)
    check_dialect(exported, after="export")
    name = next(iter(exported.weights))
    absent = replace(exported, weights={})
    with pytest.raises(CompileError, match=f"after export the graph reads {name}, which the program does not hold"):
        check_dialect(absent, after="export")
    weight = exported.weights[name]
    other = replace(exported, weights={name: replace(weight, shape=(41, 6))})
    with pytest.raises(CompileError, match=r"as \[40, 6\], it is \[41, 6\]"):
        next(steps(other, [check_router()]))


def test_a_canonical_graph_writes_nothing() -> None:
    before = export_toy(Toy)
    wrong = edited(before, relu_becomes(aten.relu_.default))
    with pytest.raises(CompileError, match=r"aten\.relu_\.default\) writes its operand"):
        check_dialect(wrong, after="a pass")
    check_dialect(replace(wrong, stage=Stage.EXPORTED), after="export")  # as a model may be exported


def test_what_writes_its_caches_by_design_is_canonical() -> None:
    from moec.passes.fuse_attention import fuse_attention
    from tests.passes.test_fuse_attention import program as attention

    fused = fuse_attention().run(attention()).program
    assert any(ops.CachedAttention.find(n) for n in fused.graph.nodes)
    check_dialect(fused, after="fuse_attention")


@pytest.mark.parametrize("stage", [s for s in Stage if s >= Stage.FUSED])
def test_an_unfused_block_is_illegal_from_fused_on(stage: Stage) -> None:
    unfused = program()
    check_dialect(unfused, after="export")
    with pytest.raises(CompileError, match="was not fused"):
        check_dialect(replace(unfused, stage=stage), after="a pass")


def test_codes_are_not_read_as_numbers() -> None:
    from tests.passes.test_quantize_weights import ROLES, quantized
    from tests.passes.test_quantize_weights import Toy as Quantizable

    done = quantized(run_passes(export_toy(Quantizable, ROLES), [fuse_moe(), check_router()]), activations="fp32")
    check_dialect(done, after="quantize_weights")

    def change(edit: Editor) -> None:
        node = next(n for n in edit.graph.nodes if ops.EmbeddingQ.find(n))
        call = ops.EmbeddingQ.of(node)
        with edit.graph.inserting_before(node):
            rows = edit.call(aten.embedding.default, call.codes, call.ids)
            wide = edit.call(aten.cat.default, [rows, rows], -1)
            node.replace_all_uses_with(edit.call(aten.to.dtype, wide, torch.float32))

    with pytest.raises(CompileError, match="are read as numbers by"):
        check_dialect(edited(done, change), after="a pass")


def test_a_target_takes_what_it_declares_and_nothing_else() -> None:
    fused = run_passes(program(), [fuse_moe(), check_router()])
    takes = Legality("the target t", Permitted(TORCH, OWN_OPERATORS))
    assert run_passes(fused, [legal_for(takes)]).stage is Stage.LEGAL
    narrow = Legality("the target t", Permitted(TORCH))
    with pytest.raises(CompileError, match=r"fused_moe\.default\) is no operator of the target t"):
        run_passes(fused, [legal_for(narrow)])
    # a pass after the declaration is held to it as well
    later = Pass(
        "later",
        lambda p: PassResult(edited(p, lambda e: None), 0),
        needs=Stage.LEGAL,
        gives=Stage.LEGAL,
    )
    no_embedding = Legality("the target t", Permitted(frozenset(), OWN_OPERATORS))
    with pytest.raises(CompileError, match="after legal "):
        run_passes(fused, [legal_for(no_embedding), later])


def test_a_target_with_float_activations_refuses_int8_ones() -> None:
    from moec.passes.float_activations import float_activations
    from tests.passes.test_quantize_weights import ROLES, quantized
    from tests.passes.test_quantize_weights import Toy as Quantizable

    fused = run_passes(export_toy(Quantizable, ROLES), [fuse_moe(), check_router()])
    done = quantized(fused, activations="int8")
    takes = Legality("the target t", Permitted(TORCH, OWN_OPERATORS), (FLOAT_ACTIVATIONS,))
    assert run_passes(done, [float_activations(takes)]).stage is Stage.LEGAL
    with pytest.raises(CompileError, match="rounds its activations to INT8"):
        run_passes(done, [legal_for(takes)])


def test_steps_stop_at_the_pass_that_leaves_something_illegal() -> None:
    wrong = Pass(
        "wrong", lambda p: PassResult(edited(p, relu_becomes(aten.relu_.default)), 1), Stage.CANONICAL, Stage.CANONICAL
    )
    idle = Pass("idle", lambda p: PassResult(p, 0), Stage.CANONICAL, Stage.CANONICAL)
    taken = steps(export_toy(Toy), [idle, wrong, idle])
    assert next(taken).ran is idle
    with pytest.raises(CompileError, match="after wrong "):
        next(taken)
