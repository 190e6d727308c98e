"""Compiles a linalg-on-tensors module to machine code with MLIR and LLVM, and calls it. In a worker process only.

Arguments and results are memrefs: C structs of two pointers, an offset, sizes and strides. Results come as one struct
of such structs, which the callee fills; their memory is malloc's and ours to free.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from moec.targets.mlir import pipelines

# LLVM's level: 3 takes twice as long to compile and is no faster on these loops, whose sums it may not reorder
LEVEL = 2
_NAMES = {"f32": "float32", "f16": "float16", "f64": "float64", "i1": "bool", "i8": "int8", "i32": "int32",
          "i64": "int64"}  # fmt: skip


def _memref(rank: int) -> type[ctypes.Structure]:
    extents: list[Any] = [("sizes", ctypes.c_int64 * rank), ("strides", ctypes.c_int64 * rank)] if rank else []
    fields = [("allocated", ctypes.c_void_p), ("aligned", ctypes.c_void_p), ("offset", ctypes.c_int64), *extents]
    return type(f"MemRef{rank}", (ctypes.Structure,), {"_fields_": fields})


def _described(array: np.ndarray) -> ctypes.Structure:
    made = _memref(array.ndim)()
    made.allocated = made.aligned = array.ctypes.data
    if array.ndim:
        strides = [s // array.itemsize for s in array.strides]
        made.sizes, made.strides = (ctypes.c_int64 * array.ndim)(*array.shape), (ctypes.c_int64 * array.ndim)(*strides)
    return made


class Compiled:
    """`compiled(arrays) -> arrays` for one function of a module's text."""

    def __init__(self, text: str, entry: str) -> None:
        """LoweringFault for a text that cannot be read or lowered."""
        from torch_mlir import ir
        from torch_mlir.execution_engine import ExecutionEngine

        module = pipelines.parse(text)
        with module.context:
            function = next(f for f in module.body.operations if f.operation.name == "func.func"
                            and ir.StringAttr(f.attributes["sym_name"]).value == entry)  # fmt: skip
            function.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
            kind = ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value)
            self.arguments = [_type(t) for t in kind.inputs]
            self.results = [_type(t) for t in kind.results]
        pipelines.run(module, pipelines.TO_LLVM, "lowering to LLVM")
        try:
            self._engine = ExecutionEngine(module, opt_level=LEVEL)
            address = self._engine.raw_lookup("_mlir_ciface_" + entry)
        except RuntimeError as error:
            raise pipelines.LoweringFault("compiling with LLVM", str(error)) from None
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        names = [(f"r{i}", _memref(rank)) for i, (_, rank) in enumerate(self.results)]
        self._struct = type("Results", (ctypes.Structure,), {"_fields_": names})
        self._free = ctypes.CDLL(None).free
        self._free.argtypes = [ctypes.c_void_p]

    def __call__(self, arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Results as arrays of their own. The arguments' dtypes and ranks are the text's; they are not written."""
        for index, (array, (dtype, rank)) in enumerate(zip(arguments, self.arguments, strict=True)):
            if array.dtype != dtype or array.ndim != rank:
                raise ValueError(f"argument {index} is {array.dtype} of rank {array.ndim}, not {dtype} of {rank}")
        results: Any = self._struct()
        described = [results, *(_described(a) for a in arguments)]
        pointers = [ctypes.c_void_p(ctypes.addressof(d)) for d in described]
        packed = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(p) for p in pointers))
        self._call(ctypes.addressof(packed))
        found = [self._copied(getattr(results, f"r{i}"), dtype) for i, (dtype, _) in enumerate(self.results)]
        given = {a.ctypes.data for a in arguments}
        for address in {getattr(results, f"r{i}").allocated for i in range(len(self.results))} - given - {None}:
            self._free(address)
        return found

    @staticmethod
    def _copied(memref: Any, dtype: np.dtype) -> np.ndarray:
        shape = tuple(getattr(memref, "sizes", ()))
        count = int(np.prod(shape, dtype=np.int64))
        if not count:
            return np.empty(shape, dtype)
        raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(memref.aligned + memref.offset * dtype.itemsize)
        return np.frombuffer(memoryview(raw), dtype).reshape(shape).copy()


def _type(kind: Any) -> tuple[np.dtype, int]:
    """(element type, rank) of a tensor type."""
    from torch_mlir import ir

    tensor = ir.RankedTensorType(kind)
    return np.dtype(_NAMES[str(tensor.element_type)]), tensor.rank
