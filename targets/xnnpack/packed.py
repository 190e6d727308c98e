"""Packed weights in a graph: the placeholder of a kernel's blob, packed only when the file is written.

A blob replaces one float weight, or the codes and scales of one quantized weight, or several linears stacked along
their outputs. Two readers of the same weight in the same layout (a tied embedding and head) share one blob.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.levels import Grid
from moec.compiler.program import Editor, LazyWeight
from moec.compiler.quant import ACTIVATION_BLOCK
from moec.runtime.moe_config import Kind, WeightFormat
from moec.targets.xnnpack import packing


@dataclass(frozen=True)
class Source:
    """One weight of a graph as a kernel may read it: a float tensor, or codes and scales."""

    weight: Node  # the float tensor, or the codes
    scales: Node | None
    format: WeightFormat

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.weight,) if self.scales is None else (self.weight, self.scales)


def quantized_source(
    codes: Node,
    scales: Node,
    *,
    bits: int,
    group_size: int,
    int8_activations: bool,
    activation_block: int = 0,
    axis_out: bool = False,
    levels: str = "",
) -> Source:
    """Codes and scales of a weight [N, K] (`axis_out`: grouped along N), and the format they are packed in."""
    return Source(
        codes,
        scales,
        WeightFormat(
            kind=Kind[str(Grid(bits, levels)).upper()],
            group_size=group_size,
            axis_out=axis_out,
            int8_activations=int8_activations,
            f32_scales=scales.meta["val"].dtype == torch.float32,
            block_activations=activation_block == ACTIVATION_BLOCK,
        ),
    )


def float_source(weight: Node) -> Source:
    """A float weight, in the default format."""
    return Source(weight, None, WeightFormat())


@dataclass(frozen=True)
class HeadRows:
    """Rows [begin, end) of each head, of a weight whose rows lie head after head."""

    heads: int
    begin: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """[heads, end - begin, columns] of [heads * rows, columns]."""
        return tensor.unflatten(0, (self.heads, -1))[:, self.begin : self.end]


def pack_into(
    editor: Editor,
    sources: Sequence[Source],
    *,
    count: int,
    n: int,
    k: int,
    transposed: bool = False,
    rows: HeadRows | None = None,
) -> Node:
    """The placeholder of one blob of `count` matrices of n outputs and k inputs.

    Several sources (each [n_i, k]) are stacked along their outputs; all must have the same format. `transposed`: a
    float source is stored [count, k, n]. rows: these of the weight alone, a matrix for each head.
    """
    if any(s.format != sources[0].format for s in sources):
        raise AssertionError("only weights of one format can be stacked")
    # the layout does not depend on how activations are treated: an embedding and a head can share it
    layout = replace(sources[0].format, int8_activations=False, block_activations=False)
    name = _blob_name([_weight_name(editor, s.weight) for s in sources], transposed)
    if rows is not None:
        name += f".{rows.begin}-{rows.end}"
    existing = editor.placeholder_of(name)
    if existing is not None:
        return existing
    loaders = [[editor.weights[_weight_name(editor, node)] for node in source.nodes] for source in sources]
    size = count * packing.packed_bytes(n, k, layout)
    weight = LazyWeight((size,), torch.uint8, _packer(loaders, layout, count, n, k, transposed, rows))
    return editor.add_weight(name, weight, editor.roles[_weight_name(editor, sources[0].weight)])


def _weight_name(editor: Editor, node: Node) -> str:
    name = editor.weight_of(node)
    if name is None:
        raise CompileError(
            f"the operand {node.name} is computed, not a weight: the kernels take constant weights only",
            remedy="serve it with another target, or store it as a weight",
        )
    return name


def _blob_name(weights: Sequence[str], transposed: bool) -> str:
    """`a.q_proj.qweight`, `a.k_proj.qweight` -> `a.q_proj+k_proj.packed`."""
    stems = [name.removesuffix("weight").removesuffix("q").removesuffix(".") for name in weights]
    parent = stems[0].rpartition(".")[0]
    leaves = "+".join(stem.removeprefix(parent + ".") if parent else stem for stem in stems)
    return f"{parent + '.' if parent else ''}{leaves}.packed{'_t' if transposed else ''}"


def _packer(
    loaders: Sequence[Sequence[LazyWeight]],
    layout: WeightFormat,
    count: int,
    n: int,
    k: int,
    transposed: bool,
    rows: HeadRows | None,
) -> Callable[[], Tensor]:
    def load() -> Tensor:
        parts = [[weight.load() for weight in source] for source in loaders]
        if rows is not None:
            parts = [[rows.of(tensor) for tensor in source] for source in parts]
        joined = [torch.cat(list(column)) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True)]
        del parts
        if layout.kind == Kind.F32:
            return packing.pack(joined[0].to(torch.float32), None, layout, count, n, k, transposed=transposed)
        return packing.pack(joined[0], joined[1], layout, count, n, k)

    return load
