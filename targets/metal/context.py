"""Shared by the handlers of one lowering: the program, the type of activations, and how each constant is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.program import Program
from moec.targets.metal.emitter import Emitter, IdSpace, Slot
from moec.targets.metal.encode import Encoding, group_size_of


@dataclass(frozen=True)
class QuantizedWeight:
    """The operands of a quantized product: words, scales and biases (from the scales, at load)."""

    w: Slot
    scales: Slot
    biases: Slot
    bits: int
    group_size: int

    @property
    def fields(self) -> dict[str, Any]:
        return {
            "w": self.w,
            "scales": self.scales,
            "biases": self.biases,
            "bits": self.bits,
            "group_size": self.group_size,
            "mode": "affine",
        }


@dataclass
class Tap:
    """Where a MoE layer's values lie after instruction `after` of the main chain; the builder sets the tensor ids."""

    layer: int
    after: int
    x: Any
    indices: Any
    weights: Any
    y: Any

    def numbers(self) -> dict[str, int]:
        tensors = {name: getattr(self, name).idx for name in ("x", "indices", "weights", "y")}
        return {"layer": self.layer, "after": self.after, **tensors}


@dataclass
class Context:
    """Set as `P.moec` on the program builder, where handlers find it."""

    program: Program
    P: Any  # the delegate's program builder
    dtype: torch.dtype
    constants: dict[str, Encoding] = field(default_factory=dict)
    # scales constant -> (codes weight, bits, group size): to measure what rounding the scales costs
    quantized: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    taps: list[Tap] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.e = Emitter(self.P)

    def constant(self, encoding: Encoding) -> Slot:
        """The slot of a weight's constant, one for every use of the same encoding."""
        name = f"{encoding.weight}@{encoding.kind}.{str(encoding.dtype).removeprefix('torch.')}"
        known = self.constants.setdefault(name, encoding)
        if known != encoding:
            raise AssertionError(f"{name} is encoded in two ways: {known}, {encoding}")
        shape = encoding.shape(tuple(self.program.weights[encoding.weight].shape))
        return self.P.make_or_get_constant(name, torch.empty(shape, dtype=encoding.dtype, device="meta"))

    def weight_name(self, node: Node) -> str:
        name = self.program.weight_of(node)
        if name is None:
            raise CompileError(
                f"{node.name} is computed, the Metal target needs a stored weight there", place=self.program.info.name
            )
        return name

    def plain(self, node: Node, dtype: torch.dtype | None = None) -> Slot:
        """A float weight in `dtype` (that of activations unless given)."""
        return self.constant(Encoding(self.weight_name(node), "plain", dtype or self.dtype))

    def quantized_weight(self, codes: Node, scales: Node, bits: int, group_size: int) -> QuantizedWeight:
        """The operands of a weight's product. CompileError for a group size that MLX cannot express."""
        codes_name, scales_name = self.weight_name(codes), self.weight_name(scales)
        mlx_group = group_size_of(group_size)
        if mlx_group is None:
            raise CompileError(
                f"groups of {group_size} cannot be expressed on Metal",
                place=codes_name,
                remedy="use a group_size that is a multiple of 32",
            )
        w = self.constant(Encoding(codes_name, "codes", torch.uint32, bits))
        stored = self.program.weights[scales_name].dtype
        # fp32 arithmetic widens the scales at load; a 16-bit type stores them as they are used
        kept = stored if self.dtype == torch.float32 else self.dtype
        slot = self.constant(Encoding(scales_name, "scales", kept, bits, group_size // mlx_group))
        self.quantized[scales_name] = (codes_name, bits, group_size)
        if kept != self.dtype:
            slot = self._at_load(f"{scales_name}.wide", "AsType", x=slot, scalar_type=_scalar_type(self.dtype))
        offset = self.e.scalar(-float(1 << (bits - 1)), self.dtype)
        biases = self._at_load(f"{scales_name}.biases", "Multiply", a=slot, b=offset)
        return QuantizedWeight(w, slot, biases, bits, mlx_group)

    def _at_load(self, name: str, instruction: str, **fields: Any) -> Slot:
        """A constant that the file holds as one zero and that `instruction` fills when the file is loaded."""
        known = name in self.P.extra_constants
        slot = self.P.make_or_get_constant(name, torch.zeros((), dtype=self.dtype))
        if not known:
            self.e.emit_at_load(instruction, slot, **fields)
        return slot

    def finish(self, node: Node, value: Slot) -> Slot:
        """Make `value` the result of `node`: float32 for an output of the program, else the type of activations."""
        out = self.P.make_or_get_slot(node)
        is_output = out.id_space == IdSpace.Output
        return self.e.cast(value, torch.float32 if is_output else self.dtype, out)

    def result(self, node: Node) -> Slot | None:
        """The slot a handler may write its last instruction to; None when a cast must follow (see `finish`)."""
        out = self.P.make_or_get_slot(node)
        return None if out.id_space == IdSpace.Output and self.dtype != torch.float32 else out


def _scalar_type(dtype: torch.dtype) -> int:
    from moec.targets.metal.emitter import torch_dtype_to_scalar_type

    return int(torch_dtype_to_scalar_type(dtype))
