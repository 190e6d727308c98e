"""Writes runtime/runner/operator_table.cpp: the operators that the native runtime has, and the kind of each argument.

`python -m moec.targets.xnnpack.operator_table` after a change of ExecuTorch's version or of our operators; a test
compares.
Names are those of the registry of the executorch wheel with our kernels loaded, schemas are torch's.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import moec.targets.xnnpack.cpu_ops  # noqa: F401  (defines the schemas of our operators)
from moec.runtime.native import kernels_library

TABLE = Path(__file__).resolve().parents[2] / "runtime" / "runner" / "operator_table.cpp"
_LETTERS = {
    "Tensor": "T", "int": "i", "float": "d", "number": "s", "bool": "b", "str": "S", "List[int]": "I",
    "List[float]": "D", "List[bool]": "B", "List[Tensor]": "L", "List[Optional[Tensor]]": "O",
}  # fmt: skip
# operators of the runtime itself, whose results are numbers: torch knows them by other schemas, or not at all
_NUMBERS = {
    "aten::sym_size.int": "Tii!", "aten::sym_numel": "Ti!", "aten::_local_scalar_dense": "Tl!",
    "executorch_prim::et_view.default": "TIV!",
    **{f"executorch_prim::{name}.Scalar": "ssa!" for name in ("add", "sub", "mul")},
    **{f"executorch_prim::{name}.Scalar": "ssb!" for name in ("eq", "ge", "gt", "le", "lt")},
    **{f"executorch_prim::{name}.Scalar": "izi!" for name in ("floordiv", "mod")},
    **{f"executorch_prim::{name}.int": "izi!" for name in ("floordiv", "mod")},
    **{f"executorch_prim::{name}.Scalar": "si!" for name in ("ceil", "round", "sym_int", "trunc")},
    **{f"executorch_prim::{name}.Scalar": "iii!" for name in ("sym_max", "sym_min")},
    "executorch_prim::truediv.Scalar": "ssd!", "executorch_prim::sym_float.Scalar": "sd!",
    "executorch_prim::neg.Scalar": "sa!", "executorch_prim::sym_not.Scalar": "bb!",
}  # fmt: skip
# what older artifacts name (runtime/kernels/registration/old_operators.cpp): torch knows no such schemas
OLD = {
    "moec::cached_attention.out": "TTTT!T!TdiT!=8",
    "moec::cached_attention_q8.out": "TTTT!T!T!T!TdiT!=a",
    "moec::cached_attention.scales_out": "TTTT!T!TdiT?!T?!T!=a",
    "moec::cached_attention.sinks_out": "TTTT!T!TdiT?!T?!T?T!=b",
}
_HEAD = """// Written by targets/xnnpack/operator_table.py: the operators of this runtime, and the kinds of
// their arguments, results last.
//   T tensor  i int  d float  s any number  b bool  S string  I D B lists of them  L tensors  O optional tensors
//   ?  may be absent     !  is written     =N  the result that is argument N (0 .. 9, a ..)
//   a  int if all operands are, else float   l  the number that a tensor's type says
//   z  a positive int that nobody writes
//   V  a tensor that takes the memory of argument 0   _  a value that nobody reads
// Operators of ExecuTorch that are not here (control flow, copies between devices) are refused.
#include "operator_table.h"

#include <cstring>

const OperatorEntry kOperators[] = {
"""
_TAIL = """
};

const unsigned kOperatorCount = sizeof kOperators / sizeof kOperators[0];

const OperatorEntry* find_operator(const char* name) {
  unsigned low = 0, high = kOperatorCount;
  while (low < high) {
    const unsigned middle = (low + high) / 2;
    const int order = std::strcmp(kOperators[middle].name, name);
    if (order == 0) return &kOperators[middle];
    if (order < 0)
      low = middle + 1;
    else
      high = middle;
  }
  return nullptr;
}
"""


def table() -> str:
    """The text of operator_table.cpp, from the wheel that is installed."""
    import torch
    from executorch.extension.pybindings import portable_lib

    ctypes.CDLL(str(kernels_library()), mode=ctypes.RTLD_GLOBAL)
    lines = []
    for name in sorted(set(portable_lib._get_operator_names())):
        letters = _NUMBERS.get(name, OLD.get(name))
        if letters is None and name.partition("::")[0] in ("aten", "moec", "dim_order_ops"):
            base, _, overload = name.partition(".")
            letters = _encoded(torch._C._get_schema(base, overload))
        if letters is not None:
            lines.append(f'    {{"{name}", "{letters}"}},')
    return _HEAD + "\n".join(lines) + _TAIL


def _encoded(schema: object) -> str:
    letters, written = "", {}
    for index, argument in enumerate(schema.arguments):  # type: ignore[attr-defined]
        kind = str(argument.type)
        optional = kind.startswith("Optional[")
        letters += _LETTERS[kind[len("Optional[") : -1] if optional else kind] + "?" * optional
        if argument.alias_info is not None and argument.alias_info.is_write:
            letters += "!"
            written[frozenset(argument.alias_info.before_set)] = "0123456789abcdefghijklmnopqrstuvwxyz"[index]
    if len(schema.returns) != 1:  # type: ignore[attr-defined]
        return letters + "_"  # what returns nothing, or several: ExecuTorch's emitter adds one value that nobody reads
    return letters + "".join("=" + written[frozenset(r.alias_info.before_set)] for r in schema.returns)  # type: ignore[attr-defined]


def main() -> int:
    TABLE.write_text(table(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
