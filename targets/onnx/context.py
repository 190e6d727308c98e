"""Shared by the handlers while a program becomes an ONNX graph: values by node, caches, functions, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import FunctionProto, TensorProto, ValueInfoProto, helper
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.program import Program, module_path
from moec.targets.onnx.moe_form import MoeForm
from moec.targets.onnx.nodes import MICROSOFT, Nodes
from moec.targets.onnx.options import Options
from moec.targets.onnx.weights import AS_STORED, ELEMENT, Change, ExternalWeights

NUMPY = {
    torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_,
    torch.int8: np.int8, torch.uint8: np.uint8,
}  # fmt: skip


@dataclass
class Context:
    """`values`: the ONNX value of each lowered node. `taps`: for each MoE layer, the values that a trace reads.
    `layers`: the number of each attention node; `coded`: those whose caches hold codes."""

    program: Program
    options: Options
    b: Nodes = field(default_factory=Nodes)
    values: dict[Node, str] = field(default_factory=dict)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)
    functions: dict[tuple[MoeForm, bool], FunctionProto] = field(default_factory=dict)
    taps: list[dict[str, str]] = field(default_factory=list)
    caches: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[Node, int] = field(default_factory=dict)
    coded: set[Node] = field(default_factory=set)
    pieces: dict[Node, Sequence[str]] = field(default_factory=dict)
    _memory: dict[Any, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = ExternalWeights(self.program)

    @property
    def ort(self) -> bool:
        return self.options.flavour == "ort"

    def value(self, node: Any) -> str:
        """The ONNX value of an fx node; a weight becomes an initializer, floats in float32."""
        if node in self.values:
            return self.values[node]
        name = self.program.weight_of(node)
        if name is None:
            raise AssertionError(f"{node} was not lowered")
        self.values[node] = self.weights.plain(name)
        return self.values[node]

    def weight_name(self, node: Node) -> str:
        """The weight that a node stands for; CompileError for a computed value where only a weight will do."""
        name = self.program.weight_of(node)
        if name is None:
            raise CompileError(f"{node.name} must be a weight here", place=module_path(node) or node.name)
        return name

    def scales(self, node: Node, *, first: int = 0, dims: tuple[int, ...] = (), suffix: str = "",
               change: Change = AS_STORED) -> str:  # fmt: skip
        """Scales as the checkpoint holds them (float16, or float32), or `dims` of them from element `first` on."""
        name = self.weight_name(node)
        stored = self.program.weights[name]
        element = ELEMENT[stored.dtype]
        return self.weights.tensor(name, element, dims or stored.shape, first=first, name=name + suffix, change=change)

    def wide(self, node: Node) -> bool:
        return self.program.weights[self.weight_name(node)].dtype == torch.float32

    def once(self, key: Any, make: Callable[[], str]) -> str:
        """A value that many nodes need, made where it is first asked for."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    def widened(self, scales: str, wide: bool) -> str:
        return scales if wide else self.once(("wide", scales), lambda: self.b.op("Cast", scales, to=TensorProto.FLOAT))

    # --- arguments ----------------------------------------------------------------------------------------------------

    def operand(self, value: Any, dtype: torch.dtype) -> str:
        """A node's value, or a Python number as a scalar of `dtype`."""
        if isinstance(value, Node):
            return self.value(value)
        return self.b.constant(np.array(value, NUMPY[dtype]))

    def shape(self, dims: Sequence[Any]) -> str:
        """int64 [n] from integers and symbolic sizes (int64 scalars)."""
        if all(isinstance(d, int) for d in dims):
            return self.b.ints(*dims)
        symbols = [d for d in dims if isinstance(d, Node)]
        if len(symbols) == 1 and -1 not in dims:  # the one that is open
            return self.b.ints(*(-1 if isinstance(d, Node) else d for d in dims))
        return self.extent(dims)

    def extent(self, dims: Sequence[Any]) -> str:
        """int64 [n] where -1 has a meaning of its own."""
        parts = [
            self.b.op("Unsqueeze", self.value(d), self.b.ints(0)) if isinstance(d, Node) else self.b.ints(int(d))
            for d in dims
        ]
        return parts[0] if len(parts) == 1 else self.b.op("Concat", *parts, axis=0)

    # --- inputs, outputs ----------------------------------------------------------------------------------------------

    def add_input(self, name: str, element: int, dims: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element, list(dims)))
        return name

    def add_output(self, name: str, element: int, dims: Sequence[int | str]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, element, list(dims)))

    @property
    def domains(self) -> set[str]:
        used = {n.domain for n in self.b.nodes}
        return used | ({MICROSOFT} if any(o.domain == MICROSOFT for f in self.functions.values()
                                          for o in f.opset_import) else set())  # fmt: skip
