"""Short calls for the delegate's instructions: each emits one, into a slot of its own unless `out` is given.

A `Slot` names a tensor or an integer of the delegate. Slots made here live until the handler of the current node ends,
those of `persistent` until the end of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.targets.metal.delegate_package import activate

activate()

from executorch.backends.mlx.builder.op_helpers import (  # noqa: E402
    emit_if_else,
    torch_dtype_to_scalar_type,
)
from executorch.backends.mlx.builder.slot_manager import IdSpace, IdType, Slot  # noqa: E402
from executorch.backends.mlx.serialization import mlx_graph_schema as schema  # noqa: E402

Int = Any  # an int or the Slot of one


class Emitter:
    """Instructions for one program builder `P`."""

    def __init__(self, builder: Any) -> None:
        self.P = builder
        self._persistent: dict[object, Slot] = {}

    # slots

    def tensor(self) -> Slot:
        return self.P.make_tmp_slot()[1]

    def integer(self) -> Slot:
        return self.P.make_tmp_value_slot()[1]

    def persistent(self, key: object, emit: Callable[[Slot], None], *, integer: bool = False) -> Slot:
        """The slot of `key`, emitted once per program: positions, masks and tables that every layer reads."""
        if key in self._persistent:
            return self._persistent[key]
        manager = self.P.slot_manager
        pool = (manager.vid_managers if integer else manager.tid_managers)[IdSpace.Temp]
        slot = Slot(IdType.SymInt if integer else IdType.Tensor, IdSpace.Temp, pool.get_id())
        manager.name_to_slot[f"moec_persistent_{len(self._persistent)}"] = slot
        self._persistent[key] = slot
        emit(slot)
        return slot

    def tid(self, slot: Slot) -> Any:
        return self.P.slot_to_tid(slot)

    def emit(self, name: str, *, out: Slot | None = None, **fields: Any) -> Slot:
        """Emit instruction `name`Node. Slots among the fields become tensor references, the rest is passed as it is."""
        target = out if out is not None else self.tensor()
        self.P.emit(getattr(schema, f"{name}Node")(out=self.tid(target), **self._references(fields)))
        return target

    def emit_at_load(self, name: str, out: Slot, **fields: Any) -> None:
        """An instruction that runs once, when the file is loaded; `out` is a constant's slot."""
        self.P.emit_init(getattr(schema, f"{name}Node")(out=self.tid(out), **self._references(fields)))

    def _references(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {k: self.tid(v) if isinstance(v, Slot) else v for k, v in fields.items()}

    # integers

    def int_or_vid(self, value: Int) -> Any:
        return self.P.to_int_or_vid(value)

    def size(self, x: Slot, dim: int) -> Slot:
        out = self.integer()
        self.P.emit(schema.SymSizeNode(a=self.tid(x), dim=dim, out=self.P.slot_to_vid(out)))
        return out

    def _integer_op(self, name: str, a: Int, b: Int, out: Slot | None) -> Slot:
        target = out if out is not None else self.integer()
        node = getattr(schema, f"{name}IntNode")
        self.P.emit(node(a=self.int_or_vid(a), b=self.int_or_vid(b), out=self.P.slot_to_vid(target)))
        return target

    def add_int(self, a: Int, b: Int, out: Slot | None = None) -> Slot:
        return self._integer_op("Add", a, b, out)

    def multiply_int(self, a: Int, b: Int, out: Slot | None = None) -> Slot:
        return self._integer_op("Multiply", a, b, out)

    def floor_divide_int(self, a: Int, b: Int, out: Slot | None = None) -> Slot:
        return self._integer_op("FloorDivide", a, b, out)

    def item(self, x: Slot, out: Slot) -> None:
        self.P.emit(schema.ItemIntNode(x=self.tid(x), out=self.P.slot_to_vid(out)))

    def when(self, condition: Slot, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
        """Run-time branch: `then` if the integer is not zero. Both must write the same slots."""
        emit_if_else(self.P, self.int_or_vid(condition), then, otherwise)

    # tensors

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> Slot:
        name = f"scalar.{str(dtype).removeprefix('torch.')}.{value!r}"
        return self.P.make_or_get_constant(name, torch.tensor(value, dtype=dtype))

    def cast(self, x: Slot, dtype: torch.dtype, out: Slot | None = None) -> Slot:
        return self.emit("AsType", x=x, scalar_type=torch_dtype_to_scalar_type(dtype), out=out)

    def reshape(self, x: Slot, shape: Sequence[Int], out: Slot | None = None) -> Slot:
        return self.emit("Reshape", x=x, shape=[self.int_or_vid(s) for s in shape], out=out)

    def transpose(self, x: Slot, perm: Sequence[int], out: Slot | None = None) -> Slot:
        return self.emit("Transpose", x=x, perm=list(perm), out=out)

    def slice(self, x: Slot, axis: int, start: Int, stop: Int, out: Slot | None = None, step: int = 1) -> Slot:
        return self.emit(
            "Slice",
            x=x,
            axis=self.int_or_vid(axis),
            start=self.int_or_vid(start),
            stop=self.int_or_vid(stop),
            step=step,
            out=out,
        )

    def update(self, cache: Slot, value: Slot, axis: int, start: Int, stop: Int) -> None:
        """Write `value` into a mutable buffer in place."""
        self.emit(
            "SliceUpdate",
            dst=cache,
            update=value,
            axis=self.int_or_vid(axis),
            start=self.int_or_vid(start),
            stop=self.int_or_vid(stop),
            out=cache,
        )

    def take(self, x: Slot, index: Slot, axis: int, out: Slot | None = None) -> Slot:
        return self.emit("Take", x=x, index=schema.IntOrVidOrTid.from_tid(self.tid(index)), axis=axis, out=out)

    def arange(self, start: Int, stop: Int, dtype: torch.dtype, out: Slot | None = None) -> Slot:
        return self.emit(
            "ARange",
            start=self.int_or_vid(start),
            stop=self.int_or_vid(stop),
            step=self.int_or_vid(1),
            scalar_type=torch_dtype_to_scalar_type(dtype),
            out=out,
        )

    def binary(self, name: str, a: Slot, b: Slot, out: Slot | None = None) -> Slot:
        return self.emit(name, a=a, b=b, out=out)

    def add(self, a: Slot, b: Slot, out: Slot | None = None) -> Slot:
        return self.binary("Add", a, b, out)

    def multiply(self, a: Slot, b: Slot, out: Slot | None = None) -> Slot:
        return self.binary("Multiply", a, b, out)

    def unary(self, name: str, x: Slot, out: Slot | None = None) -> Slot:
        return self.emit(name, x=x, out=out)

    def sum(self, x: Slot, axis: int, *, keepdims: bool = False, out: Slot | None = None) -> Slot:
        return self.emit("Sum", x=x, axes=[axis], keepdims=keepdims, out=out)

    def split_halves(self, x: Slot, width: int) -> tuple[Slot, Slot]:
        """The first and the last `width` elements of the last axis of 2*width."""
        first, second = self.tensor(), self.tensor()
        sizes = [self.int_or_vid(width), self.int_or_vid(width)]
        self.P.emit(schema.SplitNode(x=self.tid(x), outs=[self.tid(first), self.tid(second)], sizes=sizes, axis=-1))
        return first, second
