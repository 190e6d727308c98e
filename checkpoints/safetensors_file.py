"""safetensors files: a reader that maps one tensor at a time and trusts nothing, and a writer that streams.

Layout of a file: uint64 little endian length of the header, the header (JSON: name -> dtype, shape, data_offsets), then
the tensors back to back. Reading maps only the bytes of the requested tensor, and the mapping ends with the
tensor, so that a pass over a checkpoint takes the memory of its largest tensor.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moec.compiler.errors import CheckpointError
from moec.compiler.files import open_regular

TYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
# Types of the format that torch has no element for; such a tensor can be listed, not read.
_OTHER_BITS: Mapping[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
FLOATS = ("BF16", "F16", "F32", "F64")
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_DOWNLOAD = "download the file again"


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: bytes [begin, end) of `file`, which is `file_size` long."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    file_size: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    def tensor(self) -> torch.Tensor:
        """The tensor, mapped: its pages are read when touched, and are private to this process.

        CheckpointError for a type that torch has no elements of, and for a file that changed.
        """
        if self.dtype not in TYPES:
            raise CheckpointError(
                f"tensor {shown(self.name)} is {self.dtype}, a type that torch does not have", place=str(self.file)
            )
        dtype = TYPES[self.dtype]
        if self.begin == self.end:
            return torch.empty(self.shape, dtype=dtype)
        start = self.begin - self.begin % mmap.ALLOCATIONGRANULARITY
        try:
            with self.file.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size != self.file_size:
                    raise CheckpointError("changed while it was being read", place=str(self.file), remedy="start again")
                view = mmap.mmap(stream.fileno(), self.end - start, access=mmap.ACCESS_COPY, offset=start)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", place=str(self.file)) from error
        raw = torch.frombuffer(view, dtype=torch.uint8, count=self.bytes, offset=self.begin - start)
        if self.begin % dtype.itemsize:
            raw = raw.clone()  # the file does not align it
        return raw.view(dtype).view(self.shape)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file. CheckpointError, of one line per fault, if it is not whole and consistent."""
    try:
        with open_regular(file, fault=CheckpointError) as stream:
            size = os.fstat(stream.fileno()).st_size
            length_bytes = stream.read(8)
            length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else None
            if length is None or length > min(size - 8, _MAX_HEADER):
                raise _damaged(file, f"{size} bytes cannot hold a safetensors header" if length is None else
                               f"its header should be {length} bytes long, the file has {size}")  # fmt: skip
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", place=str(file)) from error
    entries, faults = _entries(_parse(text, file), file, 8 + length, size)
    if faults:
        raise CheckpointError("\n".join(faults))
    return entries


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"damaged or not a safetensors file: {what}", place=str(file), remedy=_DOWNLOAD)


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        what = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deeply"
        raise _damaged(file, f"its header is no valid JSON ({what})") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a mapping")
    return header


def _entries(header: dict[str, Any], file: Path, data: int, size: int) -> tuple[dict[str, Entry], list[str]]:
    entries: dict[str, Entry] = {}
    faults: list[str] = []
    cut: list[tuple[str, str]] = []
    for name, value in header.items():
        if name == "__metadata__":
            continue
        problem, entry = _entry(name, value, file, data, size)
        if entry is not None:
            entries[name] = entry
        elif problem is not None and problem.startswith("truncated"):
            cut.append((name, problem))
        elif problem is not None:
            faults.append(f"{file}: tensor {shown(name)}: {problem}; {_DOWNLOAD}")
    if cut:  # one fault of the file, however many tensors lay in what is gone
        others = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        faults.append(f"{file}: tensor {shown(cut[0][0])}{others}: {cut[0][1]}; {_DOWNLOAD}")
    position = data
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != position and not faults:
            what = (
                "overlaps another tensor"
                if entry.begin < position
                else f"follows a gap of {entry.begin - position} bytes"
            )
            faults.append(f"{file}: tensor {shown(entry.name)}: {what}; {_DOWNLOAD}")
        position = max(position, entry.end)
    if position != size and not faults:
        faults.append(f"{file}: holds {size - position} bytes that its header does not name; {_DOWNLOAD}")
    return entries, faults


def _entry(name: str, value: Any, file: Path, data: int, size: int) -> tuple[str | None, Entry | None]:
    """(what is wrong, None) or (None, the entry)."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= set(value):
        return "its description is incomplete, expected dtype, shape and data_offsets", None
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in TYPES and dtype not in _OTHER_BITS):
        return f"unknown dtype {shown(dtype)}, expected one of {', '.join((*TYPES, *_OTHER_BITS))}", None
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return f"impossible shape {shown(shape)} or offsets {shown(offsets)}", None
    begin, end = offsets
    count = 1
    for extent in shape:
        count *= extent
    bits = TYPES[dtype].itemsize * 8 if dtype in TYPES else _OTHER_BITS[dtype]
    if (end - begin) * 8 != count * bits:
        return f"{end - begin} bytes, but {dtype} {shown(shape)} needs {count * bits / 8:g}", None
    if data + end > size:
        return f"truncated: it ends at byte {data + end}, the file has {size}", None
    return None, Entry(name, dtype, tuple(shape), file, data + begin, data + end, size)


def _counts(value: Any) -> bool:
    """A list of sizes, small enough that no product or sum is beyond what a disk holds."""
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 1 << 60 for v in value)


def shown(value: Any) -> str:
    """`value` on one line and not long: names and numbers come from a file that may be damaged."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 100 else text[:97] + "..."


def finite(value: torch.Tensor, name: str, place: str) -> torch.Tensor:
    """`value`, unless one of its elements is NaN or infinite: CheckpointError then."""
    # the sum is quick and not finite if a value is not; only then look at each
    if value.numel() and not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
        raise CheckpointError(
            f"tensor {shown(name)} holds values that are not finite",
            place=place,
            remedy="use a checkpoint from before training diverged",
        )
    return value


class SafetensorsWriter:
    """Write a file tensor by tensor, in the order of `layout`, without ever holding more than one piece.

    `with SafetensorsWriter(path, [(name, dtype, shape), ...]) as writer: writer.write(name, [pieces])`.
    """

    def __init__(self, file: Path, layout: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        self._sizes: list[tuple[str, torch.dtype, int]] = []
        for name, dtype, shape in layout:
            size = dtype.itemsize
            for extent in shape:
                size *= extent
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
            self._sizes.append((name, dtype, size))
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned
        self._stream = file.open("wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)
        self._next = 0

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """The next tensor, as consecutive pieces of its bytes in order."""
        expected, dtype, size = self._sizes[self._next]
        assert name == expected, f"{name} written where {expected} belongs"
        written = 0
        for piece in pieces:
            assert piece.dtype == dtype
            written += self._stream.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
        assert written == size, f"{name}: {written} bytes of {size}"
        self._next += 1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stream.close()
        assert kind is not None or self._next == len(self._sizes), "tensors are missing"
