"""Float activations: turn off INT8 activations in quantized operators, for targets that have float products only.

MLX is one, and so are ONNX's `DequantizeLinear`, QMoE and MatMulNBits at accuracy level 0. Dropping the rounding of
activations is closer to the float model than what the spec asks for. The codes of weights stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from moec.compiler.dialect import Legality
from moec.compiler.ops import FusedMoeQ, LinearQ, fused_moe_q, linear_q
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Program, Stage

QUANTIZED = (fused_moe_q, linear_q)


def float_activations(target: Legality | None = None) -> Pass:
    """`int8_activations=True` -> False on every quantized operator, and no `activation_block`: legal for `target`."""
    return Pass("float_activations", _run, needs=Stage.FUSED, gives=Stage.LEGAL, declares=target)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    changed = 0
    for node in edit.graph.nodes:
        call: FusedMoeQ[Node] | LinearQ[Node] | None = FusedMoeQ[Node].find(node) or LinearQ[Node].find(node)
        if call is not None and call.int8_activations:
            node.args = replace(call, int8_activations=False, activation_block=0).arguments()
            changed += 1
    return PassResult(edit.done(stage=Stage.LEGAL), changed)
