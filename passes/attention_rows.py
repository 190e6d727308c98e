"""Keys or values that are computed from caches row by row, as latent attention (MLA) does: the same of new rows only.

    f(index_copy(C, axis, positions, rows), ..)  ->  f(rows, ..)

f handles every position by itself: a linear, a split of features, heads that become a dimension, one head repeated
over all. Where it is cached in place of C, attention reads what f gave for each token once, and not f of the whole
context at every token.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from moec.compiler.matching.read import CASTS, VIEWS, Stuck, arg, aten, dim_of, is_op, rank, shape, static
from moec.compiler.ops import RmsNorm
from moec.compiler.program import Editor

MOST_NODES = 64  # of one side; fewer than twenty in every spelling seen
SAME = {aten.neg.default, *CASTS}
BINARY = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
PARTS = {
    aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.cat.default, aten.concat.default,
    aten.slice.Tensor,
}  # fmt: skip
JOINS = (aten.cat.default, aten.concat.default)
EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.new_zeros.default, aten.zeros.default)


@dataclass(frozen=True)
class Written:
    """A write that extends a cache: `node` is index_copy(buffer, axis, positions, rows)."""

    node: Node
    axis: int

    @property
    def buffer(self) -> Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def positions(self) -> Node:
        return self.node.args[2]  # type: ignore[return-value]

    @property
    def rows(self) -> Node:
        return self.node.args[3]  # type: ignore[return-value]


class RowByRow:
    """Keys or values `end`, computed from written caches. Stuck at what does not handle each position by itself."""

    def __init__(self, edit: Editor, end: Node, axis: int) -> None:
        self._edit = edit
        self.end = end
        self.axes: dict[Node, int] = {}  # of positions, in the order in which they are computed
        self.writes: list[Written] = []
        self.inner: set[Node] = set()  # what is read on the way and takes no part
        self._follow(end)
        if self.axes[end] != axis:
            raise Stuck(end, "keys and values do not have one row for each position")

    def of_rows(self, made: dict[Node, Node]) -> Node:
        """`end` of the new rows alone, at the current insertion point. `made`: what was made so for another side."""
        made.update((w.node, w.rows) for w in self.writes)
        first = self.writes[0]
        count = self._edit.call(aten.sym_size.int, first.rows, first.axis, like=self.end)
        for node in self.axes:
            if node not in made:
                made[node] = self._again(node, made, count)
        return made[self.end]

    def _follow(self, end: Node) -> None:
        pending = [end]
        while pending:
            node = pending[-1]
            if node in self.axes:
                pending.pop()
                continue
            if len(self.axes) + len(pending) > MOST_NODES:
                raise Stuck(end, "keys and values are computed from the cache in too many steps")
            if is_op(node, aten.index_copy.default) and self._edit.weight_of(node.args[0]) is not None:  # type: ignore[arg-type]
                axis = dim_of(node, 1, "dim", rank(node))
                assert axis is not None
                self.writes.append(Written(node, axis))
                self.axes[node] = axis
                continue
            left = [n for n in self._operands(node) if n not in self.axes]
            if left:
                pending += left
                continue
            self.axes[node] = self._axis(node)

    def _operands(self, node: Node) -> list[Node]:
        """What `node` reads but weights."""
        if is_op(node, aten.slice_scatter.default):
            return [part for _, part in self._filled(node)[1]]
        if node.op != "call_function":
            raise Stuck(node, "keys and values must come from a cache written by index_copy")
        return [n for n in node.all_input_nodes if self._edit.weight_of(n) is None]

    def _axis(self, node: Node) -> int:
        """Where the positions are in `node`, whose operands are known."""
        operands = self._operands(node)
        axes = {self.axes[n] for n in operands}
        if len(axes) != 1:
            raise self._stuck(node)
        (axis,) = axes
        if node.target is operator.getitem or node.target in SAME:
            return axis
        source, sizes = operands[0], shape(operands[0])
        if is_op(node, *VIEWS):
            return self._viewed(node, source, axis)
        if is_op(node, aten.transpose.int):
            a, b = (int(d) % len(sizes) for d in node.args[1:3])  # type: ignore[call-overload]
            return {a: b, b: a}.get(axis, axis)
        if is_op(node, aten.permute.default):
            return [int(d) % len(sizes) for d in node.args[1]].index(axis)  # type: ignore[union-attr,call-overload]
        last = axis == len(sizes) - 1
        if is_op(node, aten.linear.default) and not last and node.args[0] is source and len(operands) == 1:
            return axis
        norm = RmsNorm[Node].find(node)
        if norm is not None and norm.x is source and not last:
            return axis
        if is_op(node, aten.slice_scatter.default):
            if self._filled(node)[0] != axis:
                return axis
        elif node.target in PARTS:
            place, default = (1, 0) if is_op(node, *JOINS, aten.slice.Tensor) else (2, 0)
            ranks = {rank(n) for n in operands}
            if len(ranks) == 1 and dim_of(node, place, "dim", ranks.pop(), default) != axis:
                return axis
        elif is_op(node, aten.expand.default):
            more = rank(node) - len(sizes)
            if shape(node)[axis + more] == sizes[axis]:
                return axis + more
        elif node.target in BINARY and self._is_alike(node, axis):
            return axis
        raise self._stuck(node)

    def _viewed(self, node: Node, source: Node, axis: int) -> int:
        """Where the dimension of positions is after a reshape that leaves it whole."""
        old, new = shape(source), shape(node)
        if all(static(s) is not None for s in (*old, *new)):
            before = math.prod(old[:axis])
            for place, size in enumerate(new):
                if size == old[axis] and math.prod(new[:place]) == before:
                    return place
        raise self._stuck(node)

    def _is_alike(self, node: Node, axis: int) -> bool:
        """Operands that are computed from caches lie position by position; a weight is one row for all of them."""
        width = rank(node)
        for operand in node.all_input_nodes:
            own = width - rank(operand)
            if operand in self.axes:
                if own or shape(operand)[axis] != shape(node)[axis]:
                    return False
            elif axis >= own and shape(operand)[axis - own] != 1:
                return False
        return True

    def _filled(self, node: Node) -> tuple[int, list[tuple[int, Node]]]:
        """(dim, parts in order) of a value that was made empty and filled part by part, all of it."""
        dim = int(arg(node, 2, "dim", 0)) % rank(node)
        size = static(shape(node)[dim])
        found: dict[int, tuple[int, Node]] = {}
        below: Any = node
        while is_op(below, aten.slice_scatter.default):
            if int(arg(below, 2, "dim", 0)) % rank(node) != dim or arg(below, 5, "step", 1) != 1 or size is None:
                raise self._stuck(below)
            copied: Any = below.args[1]
            part: Any = copied.args[1] if is_op(copied, aten.copy.default) else copied
            first, end = slice(arg(below, 3, "start"), arg(below, 4, "end")).indices(size)[:2]
            same = [str(s) for s in shape(part)] == [str(s) for s in shape(copied)]
            if not same or shape(copied)[dim] != end - first or first in found:
                raise self._stuck(below)
            found[first] = end, part
            self.inner |= {below, copied, *(n for n in copied.all_input_nodes if n is not part)} - {part}
            below = below.args[0]
        starts = sorted(found)
        ends = [found[s][0] for s in starts]
        if not is_op(below, *EMPTY) or [0, *ends] != [*starts, size]:
            raise self._stuck(node)
        self.inner.add(below)
        return dim, [(s, found[s][1]) for s in starts]

    def _again(self, node: Node, made: Mapping[Node, Node], count: Node) -> Node:
        """`node` of new rows."""
        edit, axis = self._edit, self.axes[node]
        if is_op(node, aten.slice_scatter.default):
            dim, parts = self._filled(node)
            return edit.call(aten.cat.default, [made[p] for _, p in parts], dim, like=node)
        source = made[self._operands(node)[0]]
        if is_op(node, *VIEWS, aten.expand.default):
            sizes: list[Any] = list(shape(node))
            sizes[axis] = count if is_op(node, *VIEWS) else -1
            target = aten.reshape.default if is_op(node, *VIEWS) else aten.expand.default
            return edit.call(target, source, sizes, like=node)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
        return edit.call(node.target, *args, like=node, **kwargs)

    def _stuck(self, node: Node) -> Stuck:
        return Stuck(node, "keys and values are computed from a cache, and not each position by itself")
