"""Products of latent attention: each head's matrices in the layout of the kernels.

    head_linear(x, W, scales, ..)  ->  moec::head_linear_packed(x, blob)

The rows of keys and those of values become a blob each, so that W is stored once. Codes are carried bit for bit: groups
that lie along the latents are groups along the outputs of the transposed product.
"""

from __future__ import annotations

from torch.fx import Node

from moec.compiler.ops import HeadLinear, head_linear
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Stage
from moec.targets.xnnpack.cpu_ops import HeadLinearPacked
from moec.targets.xnnpack.packed import HeadRows, float_source, pack_into, quantized_source


def pack_head_linears() -> Pass:
    return Pass("pack_head_linears", _run, needs=Stage.FUSED, gives=Stage.FUSED)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    nodes = [n for n in edit.graph.nodes if n.op == "call_function" and n.target is head_linear]
    for node in nodes:
        _pack(edit, node)
    return PassResult(edit.done(), len(nodes)) if nodes else PassResult(program, 0)


def _pack(edit: Editor, node: Node) -> None:
    call: HeadLinear[Node] = HeadLinear.of(node)
    n, k = int(node.meta["val"].shape[3]), int(call.x.meta["val"].shape[3])
    if call.scales is None:
        source = float_source(call.weight)
    else:
        source = quantized_source(
            call.weight,
            call.scales,
            bits=call.bits,
            group_size=call.group_size,
            int8_activations=call.int8_activations,
            activation_block=call.activation_block,
            axis_out=call.transposed,
            levels=call.levels,
        )
    rows = HeadRows(call.heads, call.begin, call.end)
    transposed = call.transposed and call.scales is None
    blob = pack_into(edit, [source], count=call.heads, n=n, k=k, transposed=transposed, rows=rows)
    with edit.graph.inserting_before(node):
        packed = HeadLinearPacked(x=call.x, w=blob, heads=call.heads, n=n, k=k, format=source.format.encode())
        y = edit.emit(packed, like=node)
    node.replace_all_uses_with(y)
    edit.graph.erase_node(node)
