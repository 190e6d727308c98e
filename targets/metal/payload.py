"""Reading a `.pte`: its methods' delegate payloads as checked instructions, and its constants mapped from the file.

No file is trusted: every offset, tensor number and size is checked here, and any exception of the parsers becomes an
ArtifactError. References are `Tensor` and `Value` numbers; literals are plain Python values.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moec.compiler.errors import ArtifactError
from moec.targets.metal.delegate_package import bindings

SCHEMA_VERSION = 1
BACKEND = "MLXBackend"
_REMEDY = "compile it again with `moec compile`"
_HEADER, _MAGIC = 24, b"MLX0"
_INLINE = 0  # a delegate's payload within the program rather than in a segment
_MOST_SLOTS = 1_000_000  # the runtime's own limit


@dataclass(frozen=True)
class Tensor:
    """Reference to tensor number `index`."""

    index: int


@dataclass(frozen=True)
class Value:
    """Reference to integer number `index`."""

    index: int


@dataclass(frozen=True)
class Instruction:
    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Meta:
    """Shape (None: dynamic) and ExecuTorch scalar type of a tensor that is not temporary."""

    shape: tuple[int | None, ...]
    scalar_type: int


@dataclass(frozen=True)
class Graph:
    """A delegate's program. Tensor numbers run constants, inputs, outputs, mutable buffers, temporaries."""

    version: int
    constants: int
    inputs: int
    outputs: int
    buffers: int
    temporaries: int
    values: int
    chains: tuple[tuple[Instruction, ...], ...]
    main: int
    init: int | None
    input_tensors: tuple[int, ...]
    output_tensors: tuple[int, ...]
    names: Mapping[int, str]  # constants and buffers
    metas: Mapping[int, Meta]

    @property
    def tensors(self) -> int:
        return self.constants + self.inputs + self.outputs + self.buffers + self.temporaries

    @property
    def first_buffer(self) -> int:
        return self.constants + self.inputs + self.outputs


class PteFile:
    """A mapped `.pte`. `data[name]` are views into the mapping: keep this object while they are used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ArtifactError("the file does not exist", place=str(path), remedy=_REMEDY) from None
        except (OSError, ValueError) as e:
            raise ArtifactError(f"cannot be read: {e}", place=str(path), remedy=_REMEDY) from e
        self.payloads: dict[str, bytes] = {}
        self.data: dict[str, memoryview] = {}
        with reading(path):
            self._read()

    def _read(self) -> None:
        view = memoryview(self._map)
        if len(view) < 40 or bytes(view[4:12]) != b"ET12eh00":
            raise ValueError("it is not an ExecuTorch program of this version")
        length, program_size, base = (int.from_bytes(view[a:b], "little") for a, b in ((12, 16), (16, 24), (24, 32)))
        if length < 24 or program_size > len(view) or base > len(view):
            raise ValueError("it is truncated")
        program = bindings("executorch_flatbuffer.Program").Program.GetRootAs(bytes(view[:program_size]), 0)

        def segment(index: int) -> memoryview:
            if not 0 <= index < program.SegmentsLength():
                raise ValueError(f"there is no segment {index}")
            found = program.Segments(index)
            begin, size = base + found.Offset(), found.Size()
            if begin + size > len(view):
                raise ValueError(f"segment {index} lies outside the file")
            return view[begin : begin + size]

        for plan in map(program.ExecutionPlan, range(program.ExecutionPlanLength())):
            name, count = plan.Name().decode(), plan.DelegatesLength()
            if count == 0:
                continue  # a constant method
            delegate = plan.Delegates(0)
            if count != 1 or delegate.Id() != BACKEND.encode():
                raise ValueError(f"method {name} has {count} delegates instead of one of {BACKEND}")
            where = delegate.Processed()
            if where.Location() == _INLINE:
                self.payloads[name] = program.BackendDelegateData(where.Index()).DataAsNumpy().tobytes()
            else:
                self.payloads[name] = bytes(segment(where.Index()))
        for entry in map(program.NamedData, range(program.NamedDataLength())):
            self.data[entry.Key().decode()] = segment(entry.SegmentIndex())

    def method(self, name: str) -> Graph:
        """The checked program of a method; ArtifactError if it is not there or damaged."""
        if name not in self.payloads:
            raise ArtifactError(f"has no method {name}", place=str(self.path), remedy=_REMEDY)
        with reading(self.path, f"method {name}"):
            return parse_payload(self.payloads[name])


class reading:  # a statement: `with reading(path):`
    """Turns whatever a parser trips over into an ArtifactError. A damaged file may fail anywhere in it."""

    def __init__(self, path: Path, what: str = "the program") -> None:
        self._place, self._what = str(path), what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: Any) -> None:
        if fault is None or isinstance(fault, ArtifactError) or not isinstance(fault, Exception):
            return
        said = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise ArtifactError(f"{self._what} is damaged: {said}", place=self._place, remedy=_REMEDY) from fault


def parse_payload(payload: bytes) -> Graph:
    """Header and flatbuffer of one delegate -> Graph. ValueError for anything that is not as it must be."""
    if len(payload) < _HEADER or payload[4:8] != _MAGIC:
        raise ValueError("the payload is not an MLX program")
    end = int.from_bytes(payload[8:16], "little")
    if not _HEADER < end <= len(payload):
        raise ValueError("the payload is truncated")
    root = bindings("mlx_delegate.MLXGraph").MLXGraph.GetRootAs(payload[_HEADER:end], 0)
    version = (root.Version() or b"").decode()
    if not version.isdecimal() or int(version) != SCHEMA_VERSION:
        raise ValueError(f"schema version {version!r}, this moec reads version {SCHEMA_VERSION}")
    graph = Graph(
        version=int(version),
        constants=root.NumConstantTensors(),
        inputs=root.NumInputTensors(),
        outputs=root.NumOutputTensors(),
        buffers=root.NumMutableBufferTensors(),
        temporaries=root.NumTempTensors(),
        values=root.NumValues(),
        chains=tuple(tuple(_instructions(root.InstructionChains(c))) for c in range(root.InstructionChainsLength())),
        main=root.MainChainIdx(),
        init=root.InitChainIdx() if root.InitChainIdx() >= 0 else None,
        input_tensors=tuple(_slot(root.InputMap(i)) for i in range(root.InputMapLength())),
        output_tensors=tuple(_slot(root.OutputMap(i)) for i in range(root.OutputMapLength())),
        names={s.Slot().Idx(): s.Name().decode() for s in map(root.NamedSlots, range(root.NamedSlotsLength()))},
        metas=dict(_metas(root)),
    )
    _check(graph)
    return graph


def _slot(slot: Any) -> int:
    if slot.SlotType() != 0:
        raise ValueError("an input or output is not a tensor")
    return int(slot.Idx())


def _metas(root: Any) -> Iterator[tuple[int, Meta]]:
    for index in range(root.TensorMetaLength()):
        meta = root.TensorMeta(index)
        if meta is None:
            continue
        sizes = (meta.Shape(i).Value() for i in range(meta.ShapeLength()))
        yield index, Meta(tuple(None if s < 0 else s for s in sizes), meta.ScalarType())


def _instructions(chain: Any) -> Iterator[Instruction]:
    known = bindings("fields").OP_NODE_FIELDS
    for index in range(chain.InstructionsLength()):
        instruction = chain.Instructions(index)
        name = _kinds().get(instruction.OpType())
        if name is None or name not in known:
            raise ValueError(f"instruction {index} has unknown kind {instruction.OpType()}")
        table = instruction.Op()
        if table is None:
            raise ValueError(f"instruction {index} ({name}) is empty")
        node = _node_class(name)()
        node.Init(table.Bytes, table.Pos)
        fields = {field: _field(node, accessor, kind) for field, accessor, kind in known[name]}
        yield Instruction(name.removesuffix("Node"), fields)


@cache
def _kinds() -> dict[int, str]:
    """Number of an instruction's kind -> name of its table."""
    union = bindings("mlx_delegate.OpNode").OpNode
    return {number: name for name, number in vars(union).items() if isinstance(number, int)}


def _node_class(name: str) -> Any:
    return getattr(bindings(f"mlx_delegate.{name}"), name)


def _field(node: Any, accessor: str, kind: str) -> Any:
    read = getattr(node, accessor)
    if kind.endswith("_list"):
        count = getattr(node, f"{accessor}Length")()
        if count > _MOST_SLOTS:
            raise ValueError(f"{accessor} has {count} elements")
        return [_element(read(i), kind.removesuffix("_list")) for i in range(count)]
    return _element(read(), kind)


def _element(value: Any, kind: str) -> Any:
    if value is None or kind in ("int", "scalar"):
        return value
    if kind == "string":
        return value.decode()
    if kind == "tid":
        return Tensor(value.Idx())
    if kind == "vid":
        return Value(value.Idx())
    if kind in ("int_or_vid", "float_or_vid"):
        return Value(value.Vid().Idx()) if value.IsVid() else value.Literal()
    if kind == "vid_or_tid":
        return Value(value.Vid().Idx()) if value.IsVid() else Tensor(value.Tid().Idx())
    if kind == "int_or_vid_or_tid":
        which = value.Kind()
        if which not in (0, 1, 2):
            raise ValueError(f"an index of unknown kind {which}")
        return (value.Literal, lambda: Value(value.Vid().Idx()), lambda: Tensor(value.Tid().Idx()))[which]()
    raise ValueError(f"a field of unknown kind {kind}")


def _check(graph: Graph) -> None:
    """Every reference lies within its table; chains exist and do not call themselves."""
    if graph.tensors > _MOST_SLOTS or graph.values > _MOST_SLOTS:
        raise ValueError(f"{graph.tensors} tensors and {graph.values} values")
    for chain in (graph.main, *(() if graph.init is None else (graph.init,))):
        if not 0 <= chain < len(graph.chains):
            raise ValueError(f"there is no chain {chain}")
    for index in (*graph.input_tensors, *graph.output_tensors, *graph.names):
        if not 0 <= index < graph.tensors:
            raise ValueError(f"there is no tensor {index}")
    for number, chain_ in enumerate(graph.chains):
        for instruction in chain_:
            for value in _references(instruction.fields.values()):
                limit = graph.tensors if isinstance(value, Tensor) else graph.values
                if not 0 <= value.index < limit:
                    raise ValueError(f"{instruction.name} refers to {value}, of {limit}")
            if instruction.name == "If":
                for branch in (instruction.fields["then_chain_idx"], instruction.fields["else_chain_idx"]):
                    # branches come after the chain that takes them: no recursion
                    if not number < branch < len(graph.chains):
                        raise ValueError(f"a branch of chain {number} goes to chain {branch}")


def _references(values: Any) -> Iterator[Tensor | Value]:
    for value in values:
        if isinstance(value, (Tensor, Value)):
            yield value
        elif isinstance(value, list):
            yield from _references(value)


def elements(shape: tuple[int | None, ...]) -> int:
    if any(s is None for s in shape):
        raise ValueError(f"a stored tensor has dynamic shape {shape}")
    return math.prod(s for s in shape if s is not None)
