"""Dense linears, the embedding and the head: which engine computes each, and its weights in that engine's layout.

    linear_q(x, codes, scales), linear(x, w)          ->  moec::linear_packed(x, blob)
    linears of one x, side by side                    ->  split(linear_packed(x, one blob))
    embedding_q(ids, codes, scales), embedding(w, ids) ->  moec::embedding_packed(ids, blob)

Roles whose kernel is `xnnpack` keep `aten.linear`, which the XNNPACK partitioner takes: as it is for a float weight,
as torchao's dynamic quantization for INT4 codes (see legalize_delegate.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import arg
from moec.compiler.ops import EmbeddingQ, LinearQ, embedding_q, linear_q
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Role, Stage
from moec.targets.xnnpack.cpu_ops import EmbeddingPacked, LinearPacked
from moec.targets.xnnpack.options import Options
from moec.targets.xnnpack.packed import Source, float_source, pack_into, quantized_source

aten = torch.ops.aten
LINEARS = (linear_q, aten.linear.default)
EMBEDDINGS = (embedding_q, aten.embedding.default)
# operators whose result lies in the memory of their operand
ALIASES = (
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int,
    aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor,
    aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, operator.getitem,
)  # fmt: skip


def pack_linears(options: Options) -> Pass:
    """Linears that our kernel serves (`kernel_of`) -> `linear_packed`."""
    return Pass("pack_linears", lambda program: _linears(program, options), needs=Stage.FUSED, gives=Stage.FUSED)


def pack_embeddings() -> Pass:
    """`embedding_q` and float tables -> `embedding_packed`."""
    return Pass("pack_embeddings", _embeddings, needs=Stage.FUSED, gives=Stage.FUSED)


def kernel_of(program: Program | Editor, node: Node, options: Options) -> str:
    """`moec` or `xnnpack`: which kernel serves this linear.

    `auto`: integer weights go to our kernel (exact scales, one copy of the weights, faster at one token on every x86
    measured); float weights to XNNPACK, but for a head that shares its table with the embedding.
    """
    name = program.weight_of(_weight(node))
    role = program.roles.get(name, Role.OTHER) if name else Role.OTHER
    if name is None:  # a computed operand: no kernel of ours takes one
        return "xnnpack"
    section = {Role.ATTENTION: "attention", Role.HEAD: "head", Role.EMBEDDING: "head"}.get(role, "ffn")
    chosen = str(getattr(options.kernels, section))
    if chosen != "auto":
        return chosen
    return "moec" if node.target is linear_q or section == "head" else "xnnpack"


def _weight(node: Node) -> Node:
    """What a linear multiplies with: a float weight, or the codes of one."""
    quantized = LinearQ[Node].find(node)
    weight = node.args[1] if quantized is None else quantized.codes
    assert isinstance(weight, Node)
    return weight


def _input(node: Node) -> Any:
    quantized = LinearQ[Node].find(node)
    return node.args[0] if quantized is None else quantized.x


def _bias(node: Node) -> Node | None:
    quantized = LinearQ[Node].find(node)
    bias: Node | None = arg(node, 2, "bias") if quantized is None else quantized.bias
    return bias


def _linears(program: Program, options: Options) -> PassResult:
    edit = program.edit()
    nodes = [n for n in edit.graph.nodes if n.op == "call_function" and n.target in LINEARS]
    ours = [n for n in nodes if kernel_of(edit, n, options) == "moec"]
    for group in _side_by_side(ours):
        _pack(edit, group)
    return PassResult(edit.done(), len(ours)) if ours else PassResult(program, 0)


def _side_by_side(nodes: Iterable[Node]) -> list[list[Node]]:
    """Linears of the same input and format, without bias, in the graph's order; the others alone."""
    groups: dict[Any, list[Node]] = {}
    for node in nodes:
        key = (node,) if _bias(node) is not None else (_input(node), source_of(node).format)
        groups.setdefault(key, []).append(node)
    return list(groups.values())


def source_of(node: Node) -> Source:
    """The weight of a linear or embedding as a kernel may read it."""
    quantized: LinearQ[Node] | EmbeddingQ[Node] | None = LinearQ[Node].find(node) or EmbeddingQ[Node].find(node)
    if quantized is None:
        return float_source(_weight(node) if node.target is aten.linear.default else node.args[0])  # type: ignore[arg-type]
    return quantized_source(
        quantized.codes,
        quantized.scales,
        bits=quantized.bits,
        group_size=quantized.group_size,
        int8_activations=isinstance(quantized, LinearQ) and quantized.int8_activations,
        activation_block=quantized.activation_block if isinstance(quantized, LinearQ) else 0,
        levels=quantized.levels,
    )


def _rows_and_columns(source: Source) -> tuple[int, int]:
    rows, columns = (int(s) for s in source.weight.meta["val"].shape)
    return rows, columns * (2 if source.weight.meta["val"].dtype == torch.uint8 else 1)


def _pack(edit: Editor, group: list[Node]) -> None:
    sources = [source_of(node) for node in group]
    sizes = [_rows_and_columns(source) for source in sources]
    n, k = sum(rows for rows, _ in sizes), sizes[0][1]
    blob = pack_into(edit, sources, count=1, n=n, k=k)
    first = group[0]
    packed = LinearPacked(x=_input(first), w=blob, bias=_bias(first), n=n, k=k, format=sources[0].format.encode())
    with edit.graph.inserting_before(first):
        y = edit.emit(packed, like=first)
    if len(group) == 1:
        first.replace_all_uses_with(y)
        edit.graph.erase_node(first)
        return
    start = 0
    for node, (rows, _) in zip(group, sizes, strict=True):
        with edit.graph.inserting_before(first):
            part = edit.call(aten.slice.Tensor, y, -1, start, start + rows, like=node)
        node.replace_all_uses_with(part)
        _reshape_views(part)
        start += rows
    for node in group:
        edit.graph.erase_node(node)


def _reshape_views(part: Node) -> None:
    """Views of a part of a wider row, through others of its views: what they merge does not lie together any more."""
    pending = [part]
    while pending:
        for user in pending.pop().users:
            if user.target is aten.view.default:
                user.target = aten.reshape.default
            if user.target in ALIASES:
                pending.append(user)


def _embeddings(program: Program) -> PassResult:
    edit = program.edit()
    nodes = [n for n in edit.graph.nodes if n.op == "call_function" and n.target in EMBEDDINGS]
    for node in nodes:
        source = source_of(node)
        rows, columns = _rows_and_columns(source)
        blob = pack_into(edit, [source], count=1, n=rows, k=columns)
        quantized = EmbeddingQ[Node].find(node)
        ids: Any = node.args[1] if quantized is None else quantized.ids
        with edit.graph.inserting_before(node):
            packed = EmbeddingPacked(ids=ids, w=blob, n=rows, k=columns, format=source.format.encode())
            y = edit.emit(packed, like=node)
        node.replace_all_uses_with(y)
        edit.graph.erase_node(node)
    return PassResult(edit.done(), len(nodes)) if nodes else PassResult(program, 0)
