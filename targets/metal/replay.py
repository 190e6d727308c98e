"""Execute the instructions of a Metal artifact with MLX: on the CPU anywhere, on the GPU of a Mac.

The file is the only input: constants are read from it, its init chain is run, and every instruction of a call is
executed in order. An instruction this module does not know is an error before anything runs. Caches are kept by name.

`wide=True` is the float32 twin: the same instructions over the same stored values with every 16-bit float type widened,
which tells the rounding of a 16-bit run from a wrong instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moec.compiler.errors import ArtifactError
from moec.targets.metal.delegate_package import require_mlx
from moec.targets.metal.instructions import HANDLERS, SCALAR_TYPES
from moec.targets.metal.payload import Graph, Instruction, PteFile, Tensor, Value, elements, reading

_NUMPY = {"bool_": "bool", "bfloat16": "uint16"}
_HALF = ("float16", "bfloat16")


class Store:
    """What the methods of one file share: constants as stored, and the caches by name."""

    def __init__(self, file: PteFile, *, wide: bool = False) -> None:
        self.mx: Any = require_mlx()
        self.file = file
        self.wide = wide
        self.accumulates = self.mx.default_device() == self.mx.cpu  # see instructions._accumulating
        self.half_types = (self.mx.float16, self.mx.bfloat16)
        self._constants: dict[str, Any] = {}
        self.caches: dict[str, Any] = {}

    def dtype(self, scalar_type: int) -> Any:
        name = SCALAR_TYPES.get(scalar_type)
        if name is None:
            raise ValueError(f"a tensor of unknown type {scalar_type}")
        return getattr(self.mx, "float32" if self.wide and name in _HALF else name)

    def constant(self, name: str, shape: tuple[Any, ...], scalar_type: int) -> Any:
        if name in self._constants:
            return self._constants[name]
        raw = self.file.data.get(name)
        if raw is None:
            raise ValueError(f"constant {name} is not in the file")
        stored = SCALAR_TYPES.get(scalar_type, "float32")
        kind = np.dtype(_NUMPY.get(stored, stored))
        count = elements(shape)
        if len(raw) != count * kind.itemsize:
            raise ValueError(f"constant {name} has {len(raw)} bytes, its shape {shape} needs {count * kind.itemsize}")
        array = self.mx.array(np.frombuffer(raw, kind).reshape(shape))
        if stored == "bfloat16":
            array = array.view(self.mx.bfloat16)
        array = array.astype(self.dtype(scalar_type))
        self._constants[name] = array
        return array

    def cache(self, name: str, shape: tuple[int | None, ...], scalar_type: int) -> None:
        """Make the cache `name` if another method has not. Both must agree on it."""
        elements(shape)
        wanted = self.dtype(scalar_type)
        known = self.caches.get(name)
        if known is None:
            self.caches[name] = self.mx.zeros(shape, dtype=wanted)
        elif (tuple(known.shape), known.dtype) != (shape, wanted):
            raise ValueError(f"the methods disagree on cache {name}")


class Machine:
    """One method of a file, ready to be called."""

    def __init__(self, store: Store, method: str) -> None:
        self.mx: Any = store.mx
        self._store = store
        self._path = store.file.path
        self.method = method
        self.graph: Graph = store.file.method(method)
        self._refuse_unknown()
        self._tensors: list[Any] = [None] * self.graph.tensors
        self._values: list[int | None] = [None] * self.graph.values
        self._instruction: Instruction | None = None
        self._loading = False
        self._widened: dict[int, Any] = {}
        self.accumulates, self.half_types = store.accumulates, store.half_types
        with reading(self._path, f"method {method}"):
            self._load()

    def _refuse_unknown(self) -> None:
        unknown = sorted({i.name for chain in self.graph.chains for i in chain} - HANDLERS.keys())
        if unknown:
            raise ArtifactError(
                f"method {self.method} has instructions this moec cannot execute: {', '.join(unknown)}",
                place=str(self._path),
                remedy="use a newer moec",
            )

    def _load(self) -> None:
        graph = self.graph
        for index in range(graph.constants):
            name, meta = graph.names.get(index), graph.metas.get(index)
            if name is None or meta is None:
                raise ValueError(f"constant {index} has no name or no shape")
            self._tensors[index] = self._store.constant(name, meta.shape, meta.scalar_type)
        self._caches: dict[int, str] = {}
        for index in range(graph.first_buffer, graph.first_buffer + graph.buffers):
            name, meta = graph.names.get(index), graph.metas.get(index)
            if name is None or meta is None:
                raise ValueError(f"cache {index} has no name or no shape")
            self._store.cache(name, meta.shape, meta.scalar_type)
            self._caches[index] = name
        if graph.init is not None:
            self._loading = True
            self.run_chain(graph.init)
            self._loading = False

    def __call__(self, *inputs: Any, watch: Mapping[int, Callable[[], None]] | None = None) -> list[Any]:
        """Run once. `watch[i]` is called after instruction i of the main chain, when `tensor()` shows its values.

        ArtifactError if an instruction does not fit its operands: the file contradicts itself.
        """
        graph = self.graph
        if len(inputs) != len(graph.input_tensors):
            raise AssertionError(f"{len(inputs)} inputs for {len(graph.input_tensors)}")
        self._tensors[graph.constants :] = [None] * (graph.tensors - graph.constants)
        self._values = [None] * graph.values
        for index, name in self._caches.items():
            self._tensors[index] = self._store.caches[name]
        for index, given in zip(graph.input_tensors, inputs, strict=True):
            self._tensors[index] = self.mx.array(given)
        with reading(self._path, f"method {self.method}"):
            self._run(graph.main, watch or {})
            results = [self._output(index) for index in graph.output_tensors]
            for index, name in self._caches.items():
                self._store.caches[name] = self._tensors[index]
            self.mx.eval(*results, *self._store.caches.values())
        self._tensors[graph.first_buffer + graph.buffers :] = [None] * graph.temporaries
        return results

    def _output(self, index: int) -> Any:
        value, meta = self.tensor(index), self.graph.metas.get(index)
        return value if meta is None else value.astype(self._store.dtype(meta.scalar_type))

    def run_chain(self, number: int) -> None:
        self._run(number, {})

    def _run(self, number: int, watch: Mapping[int, Callable[[], None]]) -> None:
        for position, instruction in enumerate(self.graph.chains[number]):
            self._instruction = instruction
            try:
                result = HANDLERS[instruction.name](self)
            except (ValueError, TypeError, IndexError, RuntimeError) as e:
                raise ValueError(f"{instruction.name} (chain {number}, instruction {position}): {e}") from e
            self._write(instruction, result)
            if position in watch:
                watch[position]()

    def _write(self, instruction: Instruction, result: Any) -> None:
        if "outs" in instruction.fields:
            outs = instruction.fields["outs"]
            if len(outs) != len(result):
                raise ValueError(f"{instruction.name} makes {len(result)} tensors, not {len(outs)}")
        elif "out" in instruction.fields:
            outs, result = [instruction.fields["out"]], [result]
        else:
            return
        for out, value in zip(outs, result, strict=True):
            if isinstance(out, Value):
                self._values[out.index] = value
                continue
            if out.index < self.graph.constants and not self._loading:
                raise ValueError(f"{instruction.name} writes a constant")
            self._tensors[out.index] = value

    # what the instructions read

    def f(self, field: str) -> Any:
        """A field as the file has it."""
        assert self._instruction is not None
        return self._instruction.fields[field]

    def value(self, reference: Any) -> Any:
        if isinstance(reference, Tensor):
            return self.tensor(reference.index)
        if isinstance(reference, Value):
            found = self._values[reference.index]
            if found is None:
                raise ValueError(f"integer {reference.index} is read before it is written")
            return found
        return reference

    def tensor(self, index: int) -> Any:
        found = self._tensors[index]
        if found is None:
            raise ValueError(f"tensor {index} is read before it is written")
        return found

    def x(self, field: str) -> Any:
        reference = self.f(field)
        if not isinstance(reference, Tensor):
            raise ValueError(f"{field} is not a tensor")
        return self.tensor(reference.index)

    def widened(self, field: str, x: Any) -> Any:
        """`x`, the tensor of `field`, in float32 if it is of a 16-bit type; kept when it is a constant."""
        if x.dtype not in self.half_types:
            return x
        index = self.f(field).index
        if index >= self.graph.constants:
            return x.astype(self.mx.float32)
        if index not in self._widened:
            self._widened[index] = x.astype(self.mx.float32)
        return self._widened[index]

    def optional(self, field: str) -> Any:
        return None if self.f(field) is None else self.x(field)

    def i(self, field: str) -> int:
        return int(self.value(self.f(field)))

    def dtype(self, scalar_type: int) -> Any:
        return self._store.dtype(scalar_type)

    @staticmethod
    def is_tensor(reference: Any) -> bool:
        return isinstance(reference, Tensor)

    @staticmethod
    def axis(value: int, size: int, what: str) -> int:
        found = value + size if value < 0 else value
        if not 0 <= found < size:
            raise ValueError(f"{what}: {value} is not within {size}")
        return found

    def check_indices(self, index: Any, size: int) -> None:
        """MLX does not check what it gathers; outside the table it reads whatever lies there."""
        low, high = int(self.mx.min(index).item()), int(self.mx.max(index).item())
        if low < 0 or high >= size:
            raise ValueError(f"an index from {low} to {high} into {size} elements")
