"""The weights of a Program, read on demand: floats, codes of a checkpoint, or codes that we computed.

`LazyWeight` is one tensor of the graph. A weight that a checkpoint holds as codes is a LazyWeight with `stored`:
joining such weights (gate and up of an expert, the experts of a layer) joins their codes. `QuantizedWeight` names the
tensors of the graph that form one quantized weight, and how to read them.

Shape suffixes: E experts, N rows (outputs), K reduction (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from moec.compiler.errors import CompileError
from moec.compiler.levels import Grid
from moec.compiler.quant import QuantizedTensor

Axis = Literal["in", "out"]
# The order of the last two dimensions: `out_in` is a linear [N, K], `in_out` are stacked experts [E, K, N].
Orientation = Literal["out_in", "in_out"]


@dataclass(frozen=True)
class CodeFormat:
    """How the elements of a weight are coded: `bits` each, one scale (and zero point) per `group_size` of them.

    zero_points: w = scale * (code - zero); without them w = scale * code. levels: the table whose values codes number.
    """

    bits: int
    group_size: int
    zero_points: bool = False
    levels: str = ""

    @property
    def grid(self) -> Grid:
        """What the codes stand for."""
        return Grid(self.bits, self.levels)

    def holds(self, other: CodeFormat) -> bool:
        """Whether any weight in the format `other` is one in this format too, its scales repeated."""
        same = self.levels == other.levels and self.bits >= other.bits
        # levels are INT8 values
        wide = same or (self.bits == 8 and not self.levels)
        return wide and other.group_size % self.group_size == 0 and self.zero_points == other.zero_points

    def __str__(self) -> str:
        kind = " with zero points" if self.zero_points else ""
        return f"{str(self.grid).upper()} codes{kind} in groups of {self.group_size}"


@dataclass(frozen=True)
class Provenance:
    """Where codes come from: `carried` bit for bit from a checkpoint (`method` names its format), or `computed` by the
    quantization method of that name."""

    kind: Literal["carried", "computed"]
    method: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.method}"


@dataclass(frozen=True)
class StoredCodes:
    """Codes that exist before any pass quantizes: a checkpoint's, or those of a calibration.

    load() gives them in the layout of the float weight, grouped along its last dimension, or along the one before it
    where `transposed` (the result is then transposed in its last two dimensions beside the float weight).
    unscaled: where channels were scaled before: from the dequantized weight to what it is in the model as exported.
    widens: whether a spec may have them in another format that holds the same values (more bits, smaller groups).
    """

    format: CodeFormat
    load: Callable[[], QuantizedTensor] = field(repr=False, compare=False)
    provenance: Provenance = Provenance("carried", "checkpoint")
    transposed: bool = False
    unscaled: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False, compare=False)
    widens: bool = False


@dataclass(frozen=True)
class Origin:
    """A weight that another one was made from (gate and up joined, experts stacked), and the way back to it.

    take(value): from the value of the weight that was made, the weight `name`, or its matrix `index` if that is given.
    """

    name: str
    index: int | None
    take: Callable[[torch.Tensor], torch.Tensor] = field(repr=False, compare=False)


@dataclass(frozen=True)
class LazyWeight:
    """One tensor of the program, loaded on demand. `stored`: its codes, where it has any before a pass quantizes it.

    origins: the weights of the exported model that a pass made it from; none for a weight of that model itself.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    stored: StoredCodes | None = field(default=None, repr=False, compare=False)
    origins: tuple[Origin, ...] = field(default=(), repr=False, compare=False)

    def taken(
        self, name: str, take: Callable[[torch.Tensor], torch.Tensor], index: int | None = None
    ) -> tuple[Origin, ...]:
        """The origins of a weight that is made from this one, called `name`, where `take` is the way back from it.

        index: the matrix that `take` gives, if it gives one alone. What this one was itself made of is followed, which
        one matrix of it does not allow.
        """
        if not self.origins or index is not None:
            return (Origin(name, index, take),)
        return tuple(replace(o, take=_in_turn(take, o.take)) for o in self.origins)


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight of the graph that is held as codes: the names of its tensors in `Program.weights`, and how they lie.

    name, shape, role: of the float weight that the codes stand for. codes, scales, zero_points: names of weights.
    orientation: of the codes. group_axis: `in` groups along the reduction of the product, `out` along its outputs.
    transposed: whether the codes lie transposed (last two dimensions) beside the float weight.
    unscaled: as of `StoredCodes`. origins: as of `LazyWeight`.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    codes: str
    scales: str
    format: CodeFormat
    group_axis: Axis
    orientation: Orientation
    transposed: bool
    provenance: Provenance
    zero_points: str | None = None
    unscaled: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False, compare=False)
    origins: tuple[Origin, ...] = field(default=(), repr=False, compare=False)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all its tensors."""
        return (self.codes, self.scales) if self.zero_points is None else (self.codes, self.scales, self.zero_points)

    def tensor(self, weights: Mapping[str, LazyWeight]) -> QuantizedTensor:
        """Codes and scales as the graph reads them."""
        zeros = None if self.zero_points is None else weights[self.zero_points].load()
        codes, scales = weights[self.codes].load(), weights[self.scales].load()
        return QuantizedTensor(codes, scales, self.format.bits, self.format.group_size, zeros, self.format.levels)

    def dequantize(self, weights: Mapping[str, LazyWeight], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the codes stand for, in the layout of the float weight."""
        value = self.tensor(weights).dequantize(dtype)
        return value.transpose(-1, -2) if self.transposed else value


def _in_turn(
    first: Callable[[torch.Tensor], torch.Tensor], then: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: then(first(value))


Piece = tuple[LazyWeight, int | None]  # a weight, or one of the matrices [index] that it stacks


def joined_codes(parts: Sequence[LazyWeight], dim: int, name: str) -> StoredCodes | None:
    """The codes of weights that are concatenated along `dim` (-1 or -2); None if no part has codes.

    Parts of which only some have codes, or have them in another format, cannot be joined without rounding one of them
    again: loading the result is then a CompileError that names the weight `name`.
    """
    first = next((p.stored for p in parts if p.stored is not None), None)
    if first is None:
        return None
    return replace(first, load=lambda: _joined([(p, None) for p in parts], dim, name))


def stacked_codes(experts: Sequence[Sequence[Piece]], dim: int, name: str) -> StoredCodes | None:
    """The codes of matrices, each joined of pieces along `dim`, stacked. As `joined_codes`."""
    first = next((w.stored for pieces in experts for w, _ in pieces if w.stored is not None), None)
    if first is None:
        return None
    return replace(first, load=lambda: filled(len(experts), (_joined(pieces, dim, name) for pieces in experts)))


def _joined(pieces: Sequence[Piece], dim: int, name: str) -> QuantizedTensor:
    first = next(w.stored for w, _ in pieces if w.stored is not None)
    tensors = []
    for weight, index in pieces:
        stored = weight.stored
        if stored is None:
            raise _unlike(name, "only one of them is stored as codes" if len(pieces) == 2 else "some as floats")
        if (stored.format, stored.transposed) != (first.format, first.transposed):
            raise _unlike(name, f"{first.format}, and {stored.format}")
        tensors.append(stored.load() if index is None else stored.load().part(index))
    place = {-1: -2, -2: -1}[dim] if first.transposed else dim
    return concatenated(tensors, place)


def concatenated(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Tensors of one format, joined along `dim`; along the last one, each holds whole groups."""
    first = tensors[0]
    zeros = None
    if first.zero_points is not None:
        zeros = torch.cat([t.zero_points for t in tensors if t.zero_points is not None], dim)
    codes, scales = torch.cat([t.codes for t in tensors], dim), torch.cat([t.scales for t in tensors], dim)
    return replace(first, codes=codes, scales=scales, zero_points=zeros)


def filled(count: int, parts: Iterable[QuantizedTensor]) -> QuantizedTensor:
    """`count` matrices of one format as one tensor with a first dimension of that size; one part is held at a time."""
    result: QuantizedTensor | None = None
    for index, part in enumerate(parts):
        if result is None:
            codes, scales = (t.new_empty((count, *t.shape)) for t in (part.codes, part.scales))
            zeros = None if part.zero_points is None else part.zero_points.new_empty((count, *part.zero_points.shape))
            result = replace(part, codes=codes, scales=scales, zero_points=zeros)
        result.codes[index], result.scales[index] = part.codes, part.scales
        if result.zero_points is not None and part.zero_points is not None:
            result.zero_points[index] = part.zero_points
    assert result is not None
    return result


def _unlike(name: str, how: str) -> CompileError:
    return CompileError(
        f"weights that are joined are stored differently: {how}",
        place=name,
        remedy="compile from a checkpoint that stores them alike",
    )
