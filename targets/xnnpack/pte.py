"""Writing a `.pte` whose weights are produced one at a time, while the file is written.

ExecuTorch's own emitter copies every constant into Python `bytes`, hashes it, and copies it again into the file
image: three times the model in memory. Here the program is emitted with the *sizes* of its weights only; then the
file is laid out, and each weight is computed, written and forgotten. The result is an ordinary `.pte`:

    flatbuffer with extended header | constant segment (all weights) | delegate segments | named data segments

The layout follows ExecuTorch's `schema/program.fbs` and `schema/extended_header.h`.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from executorch.exir._serialize._cord import Cord
from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._program import (
    AlignedData,
    _ExtendedHeader,
    _extract_delegate_segments,
    _extract_named_data,
    _insert_flatbuffer_header,
)
from executorch.exir._serialize.padding import pad_to
from executorch.exir.emit._emit_program import _remove_non_user_outputs
from executorch.exir.emit._emitter import _EmitterState, _ProgramState, _TopLevelEmitter
from executorch.exir.schema import Buffer, DataSegment, EValue, ExecutionPlan, Program, SubsegmentOffsets
from executorch.exir.tensor import TensorSpec, make_tensor_value
from executorch.exir.version import EXECUTORCH_SCHEMA_VERSION
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from moec.compiler.program import LazyWeight

# Segments begin on a page, as mapped files do; tensors on a cache line, which suits every vector unit.
SEGMENT_ALIGNMENT = 4096
TENSOR_ALIGNMENT = 64
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Emitted:
    """A program without its weights. Constant `i + 1` is `weights[i]`: a weight's name, or bytes known already."""

    program: Program
    weights: tuple[str | bytes, ...]
    dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class WrittenFile:
    """Length and SHA-256 of a written file, and the bytes each weight takes in it."""

    bytes: int
    sha256: str
    weight_bytes: Mapping[str, int]
    delegate_bytes: int


class _LazyEmitter(_TopLevelEmitter):
    """Gives every weight a constant's index by its name, without reading it; one name is one constant everywhere."""

    def __init__(
        self, name: str, exported: ExportedProgram, state: _ProgramState, order: dict[str | bytes, int]
    ) -> None:
        graph_module = _remove_non_user_outputs(exported)
        values = _EmitterState([], [], [], {}, emit_stacktrace=False, emit_mutable_buffer_names=True)
        super().__init__(name, exported, graph_module, state, values)
        self._order = order
        self.dtypes: dict[str, torch.dtype] = {}
        self._names = {
            s.arg.name: s.target for s in exported.graph_signature.input_specs if s.kind != InputKind.USER_INPUT
        }

    def _tensor_spec_to_evalue(self, spec: TensorSpec, constant_tag: str | None = None) -> EValue:
        if not spec.const:
            return super()._tensor_spec_to_evalue(spec, constant_tag)
        node = self.node
        while node.name not in self._names:  # a view of a weight: the same bytes in another shape
            node = node.args[0]
        name = self._names[node.name]
        known = self.exported_program.state_dict.get(name, self.exported_program.constants.get(name))
        if isinstance(known, torch.Tensor) and not _is_fake(known):  # a small constant that a lowering pass made
            index = self._index_of(tensor_bytes(known))
        else:
            index = self._index_of(name)
            self.dtypes[name] = spec.dtype
        return EValue(make_tensor_value(index, None, spec))

    def _index_of(self, key: str | bytes) -> int:
        if key not in self._order:
            self._order[key] = len(self._order) + 1  # constant 0 stands for "not a constant"
            self.program_state.constant_buffer.append(Buffer(storage=b""))
        return self._order[key]


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor) or isinstance(tensor.data, torch._subclasses.FakeTensor)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, little-endian."""
    return bytes(tensor_view(tensor))


def tensor_view(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order as a byte view, without a copy if the tensor is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def emit(methods: Mapping[str, ExportedProgram], constant_methods: Mapping[str, Any]) -> Emitted:
    """Emit memory-planned programs (execution dialect). Methods share weights and caches by name."""
    state = _ProgramState()
    order: dict[str | bytes, int] = {}
    plans: list[ExecutionPlan] = []
    dtypes: dict[str, torch.dtype] = {}
    emitter = None
    for name, exported in sorted(methods.items()):
        emitter = _LazyEmitter(name, exported, state, order)
        emitter.run()
        plans.append(emitter.plan())
        dtypes |= emitter.dtypes
    assert emitter is not None
    plans += emitter._emit_prim_getters(dict(constant_methods))
    program = Program(
        version=EXECUTORCH_SCHEMA_VERSION,
        execution_plan=plans,
        constant_buffer=state.constant_buffer,
        backend_delegate_data=state.backend_delegate_data,
        segments=[],
        constant_segment=SubsegmentOffsets(segment_index=0, offsets=[]),
        mutable_data_segments=None,
    )
    if len(state.mutable_buffer) > 1:
        raise AssertionError("a mutable buffer with an initial state: caches start undefined, the session clears them")
    return Emitted(program, tuple(order), dtypes)


def write_pte(
    file: Path,
    emitted: Emitted,
    weights: Mapping[str, LazyWeight],
    named_data: NamedDataStoreOutput | None = None,
    after: Callable[[str], None] | None = None,
) -> WrittenFile:
    """Lay the file out and write it, computing one weight at a time. `after(name)` is called for each weight written.

    OSError if the disk refuses, at once if there is not enough space; ValueError if a weight has not the size
    announced.
    """
    program = emitted.program
    sizes = [
        len(w) if isinstance(w, bytes) else _bytes_of(weights[w].shape, emitted.dtypes[w]) for w in emitted.weights
    ]
    offsets, constants_end = _offsets(sizes, TENSOR_ALIGNMENT)
    program.constant_buffer = []
    program.constant_segment = SubsegmentOffsets(segment_index=0, offsets=[0, *offsets])

    # the first segment holds the constants: a place holder here, streamed below
    segments: list[AlignedData] = [AlignedData(Cord())]
    _extract_delegate_segments(program, segments)
    if named_data is not None and named_data.pte_data:
        _extract_named_data(program, segments, named_data.buffers, named_data.pte_data)
    lengths = [constants_end, *(len(s.data) for s in segments[1:])]
    starts, segments_end = _offsets(lengths, SEGMENT_ALIGNMENT)
    program.segments = [DataSegment(offset=o, size=n) for o, n in zip(starts, lengths, strict=True)]

    head, base = _head(program, segments_end)
    with file.open("wb") as stream:
        out = _Hashing(stream)
        _reserve(stream, base + segments_end)
        out.write(head)
        written: dict[str, int] = {}
        for key, size, offset in zip(emitted.weights, sizes, offsets, strict=True):
            out.pad_to(base + offset)
            data = (
                memoryview(key) if isinstance(key, bytes) else tensor_view(weights[key].load().to(emitted.dtypes[key]))
            )
            if len(data) != size:
                raise ValueError(f"weight {key!r} has {len(data)} bytes, {size} were announced")
            out.write(data)
            del data
            if isinstance(key, str):
                written[key] = size
                if after is not None:
                    after(key)
        for segment, start in zip(segments[1:], starts[1:], strict=True):
            out.pad_to(base + start)
            segment.data.write_to_file(out)
    assert out.position == base + segments_end
    return WrittenFile(out.position, out.digest.hexdigest(), written, delegate_bytes=sum(lengths[1:]))


def _bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _offsets(sizes: Iterable[int], alignment: int) -> tuple[list[int], int]:
    """Aligned starts of parts laid one after the other, and the end of the last."""
    offsets, end = [], 0
    for size in sizes:
        start = -(-end // alignment) * alignment
        offsets.append(start)
        end = start + size
    return offsets, end


def _head(program: Program, segments_bytes: int) -> tuple[bytes, int]:
    """The flatbuffer with its extended header, and the file offset of the first segment."""
    flat = _program_to_flatbuffer(program, constant_tensor_alignment=TENSOR_ALIGNMENT)
    header_bytes = -(-_ExtendedHeader.EXPECTED_LENGTH // flat.max_alignment) * flat.max_alignment
    program_bytes = header_bytes + len(flat.data)
    base = -(-program_bytes // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
    header = _ExtendedHeader(program_bytes, base, segments_bytes).to_bytes()
    return _insert_flatbuffer_header(flat.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", pad_to(header, header_bytes)), base


def _reserve(stream: BinaryIO, length: int) -> None:
    """Claim the space first: a full disk is then found before minutes of work, not after."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(stream.fileno(), 0, length)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise


class _Hashing:
    """Writes in order and hashes what it writes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _CHUNK):
            part = view[start : start + _CHUNK]
            self._stream.write(part)
            self.digest.update(part)
        self.position += len(view)

    def pad_to(self, position: int) -> None:
        assert position >= self.position
        self.write(bytes(position - self.position))
