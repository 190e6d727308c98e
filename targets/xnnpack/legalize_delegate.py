"""linear_q  ->  torchao's dynamically quantized linear, the pattern that the XNNPACK partitioner delegates.

    y = linear(dq(q(x)), dq(w)),   q of x: asymmetric INT8, a scale per token;   w: INT4 codes, groups along the input

XNNPACK keeps group scales as BF16 and rounds activations asymmetrically, so its numbers differ from the quantized
program's; the manifest lists the roles it serves (`asymmetric_roles`), and notes the scales.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torchao.quantization.quant_primitives  # registers torchao::quantize_affine and its relatives
from torch import Tensor
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.ops import LinearQ
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, LazyWeight, Program, Stage, module_path
from moec.compiler.quant import unpack_int4

aten, torchao = torch.ops.aten, torch.ops.torchao
INT4_LOW, INT4_HIGH = -8, 7
INT8_SUFFIX = ".int8"  # names the codes of an INT4 weight, one to a byte


def delegate_linears() -> Pass:
    return Pass("delegate_linears", _run, needs=Stage.FUSED, gives=Stage.FUSED)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    nodes = [n for n in edit.graph.nodes if LinearQ.find(n) is not None]
    for node in nodes:
        _rewrite(edit, node)
    return PassResult(edit.done(), len(nodes)) if nodes else PassResult(program, 0)


def _rewrite(edit: Editor, node: Node) -> None:
    linear = LinearQ[Node].of(node)
    if linear.bits != 4 or linear.levels or not linear.int8_activations:
        raise CompileError(
            "XNNPACK multiplies grouped INT4 weights with INT8 activations only",
            place=module_path(node) or node.name,
            remedy="set kernels of this role to `moec`, or weights: int4 and activations: int8",
        )
    x = linear.x
    codes, scales, zeros = _plain_weights(edit, linear.codes, linear.scales)
    block = [1] * (x.meta["val"].dim() - 1) + [int(x.meta["val"].shape[-1])]
    with edit.graph.inserting_before(node):
        chosen = edit.call(
            torchao.choose_qparams_affine.default, x, "ASYMMETRIC", block, torch.int8, -128, 127, None, None, torch.int8
        )
        scale, zero = edit.call(operator.getitem, chosen, 0), edit.call(operator.getitem, chosen, 1)
        q = edit.call(torchao.quantize_affine.default, x, block, scale, zero, torch.int8, -128, 127)
        x_rounded = edit.call(torchao.dequantize_affine.default, q, block, scale, zero, torch.int8, -128, 127)
        w = edit.call(
            torchao.dequantize_affine.default,
            codes,
            [1, linear.group_size],
            scales,
            zeros,
            torch.int8,
            INT4_LOW,
            INT4_HIGH,
        )
        bias = () if linear.bias is None else (linear.bias,)
        y = edit.call(aten.linear.default, x_rounded, w, *bias, like=node)
    node.replace_all_uses_with(y)
    edit.graph.erase_node(node)


def _plain_weights(edit: Editor, codes: Node, scales: Node) -> tuple[Node, Node, Node]:
    """int8 codes [N, K], float32 scales and int8 zero points [N, K / group_size] as weights of their own."""
    codes_name, scales_name = str(edit.weight_of(codes)), str(edit.weight_of(scales))
    existing = edit.placeholder_of(codes_name + INT8_SUFFIX)
    if existing is not None:
        float_scales, zeros = (edit.placeholder_of(scales_name + suffix) for suffix in (".f32", ".zero"))
        assert float_scales is not None
        assert zeros is not None
        return existing, float_scales, zeros
    stored_codes, stored_scales = edit.weights[codes_name], edit.weights[scales_name]
    rows, half = stored_codes.shape
    role = edit.roles[codes_name]

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], Tensor]) -> Node:
        return edit.add_weight(name, LazyWeight(shape, dtype, load), role)

    shape = tuple(stored_scales.shape)
    return (
        add(codes_name + INT8_SUFFIX, (rows, 2 * half), torch.int8, lambda: unpack_int4(stored_codes.load())),
        add(scales_name + ".f32", shape, torch.float32, lambda: stored_scales.load().to(torch.float32)),
        add(scales_name + ".zero", shape, torch.int8, lambda: torch.zeros(shape, dtype=torch.int8)),
    )
