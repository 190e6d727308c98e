"""Helpers that read one node of a canonical graph, without guessing.

Every helper returns None when the node does not have the form. `Stuck` carries the node at which a parse ended.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch.fx import Node

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
CASTS = {aten._to_copy.default, aten.to.dtype}
SOFTMAX = (aten.softmax.int, aten._softmax.default)


class Stuck(Exception):
    """A parse met something it cannot explain: the node, why in words, and what a model's author can do about it.

    `read` lists the parts understood before: of several attempts, the one with most is the nearest miss.
    """

    def __init__(self, node: Node, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason
        self.remedy = remedy
        self.read: tuple[str, ...] = ()


F = TypeVar("F", bound=Callable[..., Any])


def advises(remedy: str) -> Callable[[F], F]:
    """What to do about a parse that stopped anywhere inside the function; the innermost advice stands."""

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def parse(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Stuck as stuck:
                stuck.remedy = stuck.remedy or remedy
                raise

        return cast(F, parse)

    return wrap


def is_op(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value(node: Node) -> torch.Tensor:
    """The fake tensor of a node."""
    return node.meta["val"]


def shape(node: Node) -> tuple[Any, ...]:
    """Sizes of a node's value: numbers, or symbols where they are dynamic."""
    return tuple(value(node).shape)


def rank(node: Node) -> int:
    """How many dimensions a node's value has."""
    return value(node).dim()


def static(size: Any) -> int | None:
    """`size` as a number, None when it is symbolic."""
    return size if isinstance(size, int) else None


def same_size(a: Any, b: Any) -> bool:
    """Equal sizes, decided without adding a guard: numbers by value, symbols by their expression."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Equal shapes, decided without adding a guard."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def unview(node: Node, passed: list[Node] | None = None) -> Node:
    """Through reshapes that keep the order of elements, to what they reshape. `passed` collects the nodes skipped."""
    while is_op(node, *VIEWS):
        if passed is not None:
            passed.append(node)
        node = node.args[0]
    return node


def token_rows(node: Node, width: Any) -> Node:
    """Through reshapes to the first value that is rows [N, width]; below all reshapes if none is."""
    while is_op(node, *VIEWS) and not (rank(node) == 2 and same_size(shape(node)[1], width)):
        node = node.args[0]  # type: ignore[assignment]
    return node


def unpad(node: Node) -> Node:
    """Through reshapes that only insert or drop dimensions of size one."""
    while is_op(node, *VIEWS) and _without_ones(node) == _without_ones(node.args[0]):
        node = node.args[0]
    return node


def _without_ones(node: Node) -> list[str]:
    return [str(s) for s in shape(node) if str(s) != "1"]


def uncast(node: Any) -> Node:
    """Through casts that lose nothing: float32 to float32 is gone already, so only widening ones are left to skip."""
    while is_op(node, *CASTS) and value(node).dtype == torch.float32 and value(node.args[0]).dtype.is_floating_point:
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Argument by position or keyword, with the schema's default."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def dim_of(node: Node, index: int, name: str, ndim: int, default: Any = None) -> int | None:
    """A dimension argument made non-negative."""
    d = arg(node, index, name, default)
    if isinstance(d, (list, tuple)):
        d = d[0] if len(d) == 1 else None
    return None if d is None else d % ndim


def scalar(node: Any) -> float | None:
    """A Python number."""
    return float(node) if isinstance(node, (int, float)) and not isinstance(node, bool) else None


def binary(node: Any, *targets: Any) -> tuple[Any, Any] | None:
    """The two operands of a binary operator without an alpha."""
    if not is_op(node, *targets) or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    return node.args[0], node.args[1]


def with_scalar(node: Any, *targets: Any) -> tuple[Node, float] | None:
    """`op(x, number)`, or `op(number, x)` for commutative operators."""
    pair = binary(node, *targets)
    if pair is None:
        return None
    a, b = pair
    if isinstance(a, Node) and scalar(b) is not None:
        return a, float(b)
    if isinstance(b, Node) and scalar(a) is not None and is_op(node, aten.mul.Tensor, aten.add.Tensor):
        return b, float(a)
    return None


def only_user(node: Node) -> Node | None:
    """The one node that reads this one; None when there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def piece(node: Any) -> tuple[Node, int, int, int, int] | None:
    """(source, dim, start, stop, step) if `node` is a static part of `source` along one dimension that it keeps."""
    if not isinstance(node, Node):
        return None
    if is_op(node, aten.slice.Tensor):
        source: Node = node.args[0]
        dim = dim_of(node, 1, "dim", rank(source), 0)
        size = static(shape(source)[dim]) if dim is not None else None
        start, stop, step = arg(node, 2, "start", None), arg(node, 3, "end", None), arg(node, 4, "step", 1)
        if dim is None or size is None or not isinstance(step, int):
            return None
        if not isinstance(start, (int, type(None))) or not isinstance(stop, (int, type(None))):
            return None
        first, last, stride = slice(start, stop, step).indices(size)
        return source, dim, first, last, stride
    parent = node.args[0] if node.target is operator.getitem else None
    if not isinstance(parent, Node) or not is_op(parent, *SPLITS):
        return None
    index: int = node.args[1]
    source = parent.args[0]
    dim = dim_of(parent, 2, "dim", rank(source), 0)
    sizes = [static(v.shape[dim]) for v in parent.meta["val"]] if dim is not None else []
    if dim is None or any(s is None for s in sizes):
        return None
    start = sum(s for s in sizes[:index] if s is not None)
    return source, dim, start, start + (sizes[index] or 0), 1
