"""Weights in one external file: offsets are known from shapes, so the graph is complete before a weight is read.

ONNX packs INT4 as we do (element 2i in the low nibble, two's complement), so codes are written as they are stored. A
tensor is a window of a blob; two tensors may share bytes, as the table of a tied embedding does with the output head.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from moec.compiler.errors import CompileError
from moec.compiler.program import Program, Role

DATA_FILE = "model.onnx.data"
# A runtime maps a tensor where it lies; those of a page and more begin on one, small ones on a cache line.
PAGE, LINE = 4096, 64

ELEMENT: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}
BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.INT8: 8, TensorProto.UINT8: 8, TensorProto.INT4: 4,
    TensorProto.INT64: 64, TensorProto.INT32: 32, TensorProto.BOOL: 8,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A change of a weight on its way into the file. Equal names are equal changes. It keeps the number of bytes,
    unless it `widens` floats to float32."""

    name: str
    apply: Callable[[Tensor], Tensor]
    widens: bool = False


def _float32(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.is_floating_point() else value


AS_STORED = Change("", lambda value: value)
IN_FLOAT32 = Change("float32", _float32, widens=True)


@dataclass(frozen=True)
class Blob:
    """A weight with a change, at an offset of the external file."""

    weight: str
    change: Change
    offset: int
    bytes: int


class ExternalWeights:
    """The initializers of a graph. `tensor` places them, `write` streams the bytes."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._blobs: dict[tuple[str, str], Blob] = {}
        self._end = 0
        self._keys: dict[str, tuple[Any, ...]] = {}
        self.initializers: dict[str, TensorProto] = {}

    def tensor(
        self,
        weight: str,
        element: int,
        dims: tuple[int, ...],
        *,
        change: Change = AS_STORED,
        first: int = 0,
        name: str | None = None,
    ) -> str:
        """An initializer of `dims`, which begins `first` elements into the weight. Its name is the weight's unless
        given; a name stands for one tensor."""
        name = name or (weight if change in (AS_STORED, IN_FLOAT32) else f"{weight}.{change.name}")
        key = (weight, change.name, element, dims, first)
        if name in self.initializers:
            if self._keys[name] != key:
                raise AssertionError(f"two tensors are called {name}")
            return name
        self._keys[name] = key
        blob = self._blob(weight, change)
        count = prod(dims)
        start, length = first * BITS[element], count * BITS[element]
        if start % 8 or length % 8 or (start + length) // 8 > blob.bytes:
            raise AssertionError(f"{name}: elements {first} to {first + count} of {weight} are no whole bytes of it")
        proto = TensorProto(name=name, data_type=element, dims=dims, data_location=TensorProto.EXTERNAL)
        place = {"location": DATA_FILE, "offset": blob.offset + start // 8, "length": length // 8}
        for field, value in place.items():
            proto.external_data.add(key=field, value=str(value))
        self.initializers[name] = proto
        return name

    def plain(self, weight: str, *, change: Change = IN_FLOAT32) -> str:
        """The weight with its own shape; floats in float32."""
        stored = self._program.weights[weight]
        element = TensorProto.FLOAT if stored.dtype.is_floating_point else self._element(weight, stored.dtype)
        return self.tensor(weight, element, tuple(stored.shape), change=change)

    def part(self, weight: str, shape: tuple[int, ...], index: int) -> str:
        """Entry `index` of a stack of float weights of `shape`, in float32."""
        name = f"{weight}.{index}"
        return self.tensor(weight, TensorProto.FLOAT, shape, change=IN_FLOAT32, first=index * prod(shape), name=name)

    def _element(self, weight: str, dtype: torch.dtype) -> int:
        if dtype not in ELEMENT:
            raise CompileError(f"ONNX has no tensor of {dtype}", place=weight)
        return ELEMENT[dtype]

    def _blob(self, weight: str, change: Change) -> Blob:
        key = (weight, change.name)
        if key in self._blobs:
            return self._blobs[key]
        stored = self._program.weights[weight]
        width = 4 if change.widens and stored.dtype.is_floating_point else stored.dtype.itemsize
        size = width * prod(stored.shape)
        step = PAGE if size >= PAGE else LINE
        offset = -(-self._end // step) * step
        self._end = offset + size
        self._blobs[key] = Blob(weight, change, offset, size)
        return self._blobs[key]

    @property
    def bytes(self) -> int:
        return self._end

    def sizes_by_role(self) -> Mapping[str, int]:
        sizes: Counter[str] = Counter()
        for blob in self._blobs.values():
            sizes[self._program.roles.get(blob.weight, Role.OTHER).value] += blob.bytes
        return sizes

    def write(self, folder: Path, progress: Any) -> str:
        """Write the external file, one weight in memory at a time. Returns its SHA-256."""
        digest = hashlib.sha256()
        end = 0
        with (folder / DATA_FILE).open("wb") as file:
            for blob in progress.each("write weights", sorted(self._blobs.values(), key=lambda b: b.offset)):
                value = blob.change.apply(self._program.weights[blob.weight].load()).contiguous()
                if value.nbytes != blob.bytes:
                    raise AssertionError(f"{blob.weight}: {value.nbytes} bytes where its shape says {blob.bytes}")
                content = memoryview(value.view(-1).view(torch.uint8).numpy())
                for part in (bytes(blob.offset - end), content):
                    file.write(part)
                    digest.update(part)
                end = blob.offset + blob.bytes
        return digest.hexdigest()
