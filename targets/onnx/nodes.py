"""Builds a list of ONNX nodes: fresh names, constants stated once, subgraphs. Of graphs and of function bodies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

# `axis` and `block_size` of DequantizeLinear and INT4 tensors begin here; ONNX Runtime knows this opset since 1.20
OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"


class Nodes:
    """Nodes in order. Values are named by strings; an empty string is an input left out."""

    def __init__(self, outer: Nodes | None = None) -> None:
        self.nodes: list[NodeProto] = []
        self._outer = outer
        self._fresh: Iterable[int] = count() if outer is None else outer._fresh
        self._constants: dict[tuple[Any, ...], str] = {}

    def name(self, hint: str) -> str:
        """A name that no other value of this graph and of its subgraphs has."""
        return f"{hint}_{next(iter(self._fresh))}"

    def op(self, kind: str, *inputs: str, out: str | None = None, domain: str = "", **attributes: Any) -> str:
        """A node of one output; returns that value's name."""
        return self.ops(kind, *inputs, outs=[out or self.name(kind)], domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outs: Sequence[str], domain: str = "", **attributes: Any) -> Sequence[str]:
        """A node of several outputs, under the names `outs`."""
        self.nodes.append(helper.make_node(kind, list(inputs), list(outs), domain=domain, **attributes))
        return outs

    def split(self, x: str, parts: int, axis: int = -1) -> Sequence[str]:
        return self.ops("Split", x, outs=[self.name("Split") for _ in range(parts)], axis=axis, num_outputs=parts)

    def constant(self, value: np.ndarray) -> str:
        """The name of a constant; equal ones are one node."""
        key = (value.dtype.str, value.shape, value.tobytes())
        found = self._known(key)
        if found is not None:
            return found
        name = self.name("const")
        tensor = numpy_helper.from_array(value)
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        self._constants[key] = name
        return name

    def _known(self, key: tuple[Any, ...]) -> str | None:
        found = self._constants.get(key)
        return found if found is not None or self._outer is None else self._outer._known(key)

    def ints(self, *values: int) -> str:
        """int64 [n]."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        """int64, no dimension."""
        return self.constant(np.array(value, np.int64))

    def float(self, value: float) -> str:
        """float32, no dimension."""
        return self.constant(np.array(value, np.float32))

    def reshape(self, x: str, *dims: int, out: str | None = None) -> str:
        return self.op("Reshape", x, self.ints(*dims), out=out)

    def dimension(self, x: str, axis: int) -> str:
        """int64 [1]: the size of `x` along `axis`, counted from the front."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def subgraph(self) -> Nodes:
        """The nodes of a branch, which may read every value defined so far."""
        return Nodes(self)

    def as_branch(self, name: str, output: str, element: int = TensorProto.FLOAT) -> GraphProto:
        return helper.make_graph(self.nodes, name, [], [helper.make_tensor_value_info(output, element, None)])
