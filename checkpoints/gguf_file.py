"""GGUF files: a reader of header, metadata and tensor list that trusts nothing in them.

Layout (the GGUF specification of ggml, versions 2 and 3, little endian): the magic `GGUF`, version, number of tensors,
number of key-value pairs; the pairs; for each tensor its name, dimensions (the fastest first), type and offset; then,
at a multiple of `general.alignment`, the data. Quantized types are stored in blocks of a row.

Nothing is allocated for a count that the file states before the bytes it refers to are known to exist. Files
are read and not mapped: truncating one meanwhile gives an error of one line, where a mapping would end the process.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moec.checkpoints.safetensors_file import shown
from moec.compiler.errors import CheckpointError
from moec.compiler.files import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
# type -> (name, elements of a block, bytes of a block), ggml.h
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
_NUMBERS: Mapping[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MOST = 1 << 16  # tensors, and pairs
_MOST_STRING = 1 << 24  # bytes of one string: chat templates have thousands
_MOST_ELEMENTS = 1 << 22  # of all arrays: vocabularies have under a million, with as many merges
_MOST_HEADER = 1 << 28  # bytes of header, metadata and tensor list: the largest in use have 30 million
_MOST_DIMENSIONS = 4
_PIECE = 1 << 24  # bytes read at once
_DOWNLOAD = "download the file again"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: its shape with the fastest dimension last, as torch has it, and bytes [begin, end)."""

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufFile:
    """`metadata`: numbers, strings, booleans, lists of strings and numpy arrays of numbers, by key.

    state: of the file when its header was read (device, inode, bytes, nanoseconds of its last change).
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    state: tuple[int, ...] = ()

    @property
    def architecture(self) -> str | None:
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else None

    def blocks(self, tensor: GgufTensor) -> np.ndarray:
        """The bytes of a tensor, uint8 [rows, bytes of a row]; CheckpointError if the file is another by now."""
        _, block, size = next(known for known in TYPES.values() if known[0] == tensor.type)
        raw = self.part(tensor.begin, tensor.end - tensor.begin)
        return raw.reshape(-1, tensor.shape[-1] // block * size) if len(raw) else raw.reshape(0, 0)

    def part(self, begin: int, count: int) -> np.ndarray:
        """`count` bytes from byte `begin` on, uint8, as an array of its own; CheckpointError as `blocks`."""
        found = np.empty(count, np.uint8)
        with open_regular(self.file, fault=CheckpointError) as stream:
            if self.state and _state(stream) != self.state:
                raise self._changed()
            stream.seek(begin)
            got = 0
            view = memoryview(found.data)
            while got < count and (piece := stream.readinto(view[got : got + _PIECE])):  # type: ignore[attr-defined]
                got += piece
        if got != count:
            raise self._changed()
        return found

    def _changed(self) -> CheckpointError:
        return CheckpointError("changed while it was read", place=str(self.file), remedy="compile it again")


def read_gguf(file: Path) -> GgufFile:
    """Header, metadata and tensor list of a file; no tensor is read. CheckpointError if it is not whole."""
    with open_regular(file, fault=CheckpointError) as stream:
        try:
            return _Reader(stream, file).read()
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", place=str(file)) from error


def _state(stream: BinaryIO) -> tuple[int, ...]:
    found = os.fstat(stream.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _Reader:
    """A cursor over the file; every read is checked against its end."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file, self._state = stream, file, _state(stream)
        self._size, self._at, self._elements = self._state[2], 0, 0

    def read(self) -> GgufFile:
        if not self._size:
            raise self._damaged("it is empty")
        if self._take(4) != MAGIC:
            raise self._damaged("it does not begin with GGUF")
        version = self._u32()
        if version not in VERSIONS:
            raise CheckpointError(
                f"GGUF version {version}, known are {VERSIONS[0]} and {VERSIONS[1]}",
                place=str(self._file),
                remedy="convert it again with a current llama.cpp",
            )
        tensors, pairs = self._u64(), self._u64()
        if tensors > _MOST or pairs > _MOST:
            raise self._damaged(f"{tensors} tensors and {pairs} keys")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"the key {shown(key)} occurs twice")
            metadata[key] = self._value(self._u32(), key)
        return GgufFile(self._file, metadata, self._tensors(tensors, metadata), self._state)

    def _tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._damaged(f"an alignment of {shown(alignment)}")
        listed = [self._tensor() for _ in range(count)]
        data = -(-self._at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, kind, shape, offset, size in listed:
            if name in found:
                raise self._damaged(f"tensor {shown(name)} occurs twice")
            if offset % alignment or data + offset + size > self._size:
                what = f"tensor {shown(name)} would lie at bytes {data + offset} to {data + offset + size}"
                raise self._damaged(f"{what}, the file has {self._size}")
            found[name] = GgufTensor(name, kind, shape, data + offset, data + offset + size)
        end = 0
        for tensor in sorted(found.values(), key=lambda t: (t.begin, t.end)):
            if tensor.begin < end:
                raise self._damaged(f"tensor {shown(tensor.name)} overlaps another")
            end = max(end, tensor.end)
        return found

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """(name, type, shape, offset, bytes)."""
        name = self._string()
        rank = self._u32()
        if not 1 <= rank <= _MOST_DIMENSIONS:
            raise self._damaged(f"tensor {shown(name)} has {rank} dimensions")
        shape = tuple(reversed([self._u64() for _ in range(rank)]))
        number, offset = self._u32(), self._u64()
        if number not in TYPES:
            raise self._damaged(f"tensor {shown(name)} has the unknown type {number}")
        kind, block, size = TYPES[number]
        count = math.prod(shape)
        if not all(0 < extent < 1 << 40 for extent in shape) or shape[-1] % block:
            raise self._damaged(f"tensor {shown(name)} has the impossible shape {list(shape)} for {kind}")
        return name, kind, shape, offset, count // block * size

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            raise self._damaged(f"the key {shown(key)} has the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

    def _array(self, key: str) -> Any:
        kind, count = self._u32(), self._u64()
        self._elements += count
        if self._elements > _MOST_ELEMENTS:
            raise self._damaged(f"the key {shown(key)} has {count} elements")
        if kind == _STRING:
            if count * 8 > self._size - self._at:
                raise self._damaged(f"the key {shown(key)} has {count} strings, more than the file can hold")
            return [self._string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise self._damaged(f"the key {shown(key)} is an array of type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _string(self) -> str:
        length = self._u64()
        if length > _MOST_STRING:
            raise self._damaged(f"a string of {length} bytes")
        return self._take(length).decode("utf-8", "surrogateescape")

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._damaged(f"truncated: it ends at byte {self._size}, its header goes on")
        if self._at + count > _MOST_HEADER:
            raise self._damaged(f"its header is longer than {_MOST_HEADER} bytes")
        found = self._stream.read(count)
        if len(found) != count:
            raise self._damaged("it became shorter while it was read")
        self._at += count
        return found

    def _u32(self) -> int:
        return int(struct.unpack("<I", self._take(4))[0])

    def _u64(self) -> int:
        return int(struct.unpack("<Q", self._take(8))[0])

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"damaged or not a GGUF file: {what}", place=str(self._file), remedy=_DOWNLOAD)
