"""check_router: FP32 or an error that names the layer, also after a pass that should not have touched the router."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.errors import CompileError
from moec.compiler.ops import FusedMoe
from moec.compiler.pipeline import Pass, PassResult, run_passes
from moec.compiler.program import Program, Role, Stage
from moec.passes.check_router import check_router
from moec.passes.fuse_moe import fuse_moe
from tests.harness import run
from tests.passes.moe_zoo import program


@pytest.fixture(scope="module")
def fused() -> Program:
    return run_passes(program(), [fuse_moe(), check_router()])


def test_float32_passes(fused: Program) -> None:
    assert fused.stage is Stage.FUSED
    again = run(check_router(), fused)
    assert again.changed == 1
    assert again.program.text() == fused.text()


def _rounded(program: Program) -> PassResult:
    """A wrong pass: the router's weight becomes bfloat16."""
    edit = program.edit()
    with edit.fake_mode:
        for node in edit.graph.nodes:
            moe = FusedMoe.find(node)
            if moe is not None:
                router = moe.router_weight
                router.meta["val"] = torch.empty(router.meta["val"].shape, dtype=torch.bfloat16)
    return PassResult(edit.done(), 1)


@pytest.mark.parametrize("stage", [Stage.CANONICAL, Stage.FUSED])
def test_a_bfloat16_router_is_an_error_that_names_the_layer(fused: Program, stage: Stage) -> None:
    """By the pass itself while the graph is fused, and by the dialect after any later pass."""
    before = run(fuse_moe(), program()).program if stage is Stage.CANONICAL else fused
    with pytest.raises(CompileError, match=r"blocks\.moe.*(not float32|as bfloat16)"):
        run_passes(before, [Pass("rounding", _rounded, stage, stage), check_router()])


def test_a_router_by_another_role_is_an_error(fused: Program) -> None:
    def wrong(program: Program) -> PassResult:
        edit = program.edit()
        edit.roles["blocks.moe.router"] = Role.FFN
        return PassResult(edit.done(), 1)

    with pytest.raises(CompileError, match="does not have the role router"):
        run_passes(fused, [Pass("wrong", wrong, Stage.FUSED, Stage.FUSED), check_router()])
