"""The order of the passes from a fused (or quantized) program to what this target lowers."""

from __future__ import annotations

from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Program, Stage
from moec.targets.xnnpack.legalize_delegate import delegate_linears
from moec.targets.xnnpack.legalize_gated import fuse_gated_linears
from moec.targets.xnnpack.legalize_linear import pack_embeddings, pack_linears
from moec.targets.xnnpack.legalize_moe import pack_moe
from moec.targets.xnnpack.options import Options


def legalize_passes(options: Options) -> list[Pass]:
    return [
        pack_moe(),
        pack_linears(options),
        fuse_gated_linears(),
        pack_embeddings(),
        delegate_linears(),
        Pass("legal", _legal, needs=Stage.FUSED, gives=Stage.LEGAL),
    ]


def _legal(program: Program) -> PassResult:
    return PassResult(program.edit().done(stage=Stage.LEGAL), 0)
