"""Float activations: quantized operators whose target multiplies quantized weights with float activations say so.

MLX does, and so do ONNX's `DequantizeLinear`, QMoE and MatMulNBits at accuracy level 0: INT8 rounding of activations is
dropped, which is closer to the float model than what the spec asks for. The weights stay as they are, code for code.
"""

from __future__ import annotations

from moec.compiler.ops import fused_moe_q, linear_q
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Program, Stage

QUANTIZED = (fused_moe_q, linear_q)


def float_activations() -> Pass:
    """`int8_activations=True` -> False on every quantized operator."""
    return Pass("float_activations", _run, needs=Stage.FUSED, gives=Stage.LEGAL)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    changed = 0
    for node in edit.graph.nodes:
        if node.target in QUANTIZED and node.args[-1] is True:
            node.args = (*node.args[:-1], False)
            changed += 1
    return PassResult(edit.done(stage=Stage.LEGAL), changed)
