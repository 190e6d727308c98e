"""Flatten tokens: a MoE block that keeps the batch of one, [1, T, .], computed on rows [T, .] instead.

    block(x[1, T, D])  ->  view(block(view(x, [T, D])), [1, T, D])

Every node between the router's input and the combined output of the chosen experts loses its first
dimension, operator by operator; if one is unknown to this rule, the block stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from moec.compiler.matching.contraction import contraction
from moec.compiler.matching.graph import PostDominators
from moec.compiler.matching.read import arg, aten, is_op, rank
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Stage, writes

REGION = 2000  # nodes between a router's input and the sum of its experts: thirty for each of 64 experts
SHAPES = {aten.view.default, aten.reshape.default}
POINTWISE = {
    "add", "sub", "mul", "div", "maximum", "minimum", "sigmoid", "silu", "gelu", "relu", "tanh", "softplus", "exp",
    "log", "sqrt", "rsqrt", "square", "pow", "neg", "abs", "clamp", "clamp_min", "clamp_max", "hardtanh", "eq", "ne",
    "gt", "ge", "lt", "le", "logical_not", "logical_and", "logical_or", "bitwise_not", "bitwise_and", "bitwise_or",
    "_to_copy", "to", "where", "masked_fill", "zeros_like", "ones_like", "full_like", "alias", "clone", "one_hot",
}  # fmt: skip
# of operators over dimensions: where the dimension is given, and its default
DIMENSIONS: dict[str, tuple[int, str, Any]] = {
    "softmax": (1, "dim", None), "_softmax": (1, "dim", None), "sum": (1, "dim", None), "any": (1, "dim", None),
    "amax": (1, "dim", None), "max": (1, "dim", None), "argmax": (1, "dim", None), "topk": (2, "dim", -1),
    "sort": (1, "dim", -1), "gather": (1, "dim", None), "scatter": (1, "dim", None), "scatter_add": (1, "dim", None),
    "select": (1, "dim", None), "slice": (1, "dim", 0), "chunk": (2, "dim", 0), "split": (2, "dim", 0),
    "split_with_sizes": (2, "dim", 0), "unbind": (1, "dim", 0), "squeeze": (1, "dim", None), "cumsum": (1, "dim", None),
}  # fmt: skip
POSITIONS = {aten.nonzero_numpy.default, aten.where.default}
INDEXED = {aten.index.Tensor, aten.index_put.default}
BATCH = object()  # the indices of the batch, all zero, among those of the nonzero elements


class _Unknown(Exception):
    """An operator that this rule does not flatten."""


def flatten_tokens() -> Pass:
    return Pass("flatten_tokens", _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    if not any(_batched_topk(n) for n in program.graph.nodes):
        return PassResult(program, 0)
    edit = program.edit()
    changed = 0
    for node in list(edit.graph.nodes):
        if not _batched_topk(node) or not node.users:
            continue
        root = _router_input(node)
        end = None if root is None else _combined(node, root, PostDominators(edit.graph))
        if root is None or end is None:
            continue
        try:
            # the number of rows an expert gets depends on values; tracing must not ask for it
            with edit.fake_mode.shape_env.ignore_fresh_unbacked_symbols():
                _Region(edit, root, end).flatten()
            changed += 1
        except (_Unknown, GuardOnDataDependentSymNode):  # the latter: a size that only a value tells
            pass  # what was made so far is read by nobody
        edit.graph.eliminate_dead_code(is_impure_node=writes)
    return PassResult(edit.done(), changed) if changed else PassResult(program, 0)


def _batched_topk(node: Node) -> bool:
    source = (
        node.args[0] if is_op(node, aten.topk.default, aten.max.dim, aten.argmax.default, aten.sort.default) else None
    )
    return isinstance(source, Node) and _batched(source) and rank(source) == 3


def _batched(node: Any) -> bool:
    """[1, T, ...]"""
    result = node.meta.get("val") if isinstance(node, Node) else None
    return (
        isinstance(result, torch.Tensor)
        and result.dim() >= 2
        and isinstance(result.shape[0], int)
        and result.shape[0] == 1
    )


def _router_input(node: Node) -> Node | None:
    """The rows of the first linear above a choice, [1, T, D]."""
    for _ in range(16):
        sources = [n for n in node.all_input_nodes if n.op == "call_function" and _batched(n)]
        if not sources:
            return None
        source = sources[0]
        product = contraction(source)
        if product is not None:
            return next((o for o in product.operands if _batched(o) and rank(o) == 3), None)
        node = source
    return None


def _combined(topk: Node, root: Node, paths: PostDominators) -> Node | None:
    """The first value [1, T, D], as wide as the router reads, in which all that a choice leads to comes together."""
    node = paths.of(topk)
    while node is not None and node.op == "call_function":
        result = node.meta.get("val")
        if _batched(node) and result.is_floating_point() and str(result.shape) == str(root.meta["val"].shape):
            return node
        node = paths.of(node)
    return None


class _Region:
    """The nodes that depend on `root` [1, T, D], up to `end`."""

    def __init__(self, edit: Editor, root: Node, end: Node) -> None:
        self.edit, self.root, self.end = edit, root, end
        self.flat: dict[Node, Any] = {}  # a node without its first dimension; BATCH; a node of several results
        self.same: dict[Node, Node] = {}  # a node with the same value, of other operands
        self.inside = self._inside()

    def _inside(self) -> list[Node]:
        """What depends on the root and is needed for the end, in order."""
        below = {self.root}
        listed: list[Node] = []
        for node in self.edit.graph.nodes:
            if below & set(node.all_input_nodes):
                below.add(node)
                listed.append(node)
            if node is self.end:
                break
        above = {self.end}
        for node in reversed(listed):
            if node in above:
                above |= set(node.all_input_nodes)
        found = [n for n in listed if n in above]
        if not found or found[-1] is not self.end or len(found) > REGION:
            raise _Unknown
        return found

    def flatten(self) -> None:
        with self.edit.graph.inserting_after(self.root):
            self.flat[self.root] = self._row_view(self.root)
        for node in self.inside:
            with self.edit.graph.inserting_before(node):
                self._flatten(node)
        last = self.flat.get(self.end)
        if not isinstance(last, Node):
            raise _Unknown
        with self.edit.graph.inserting_after(self.end):
            whole = self.edit.call(aten.unsqueeze.default, last, 0, like=self.end)
        self.end.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)

    def _row_view(self, node: Node) -> Node:
        return self.edit.call(aten.squeeze.dim, node, 0, like=node)

    def _operand(self, value: Any, full: int) -> Any:
        """An operand of an operator whose result has `full` dimensions, for the result without the first."""
        if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            return value
        if value in self.flat:
            flat = self.flat[value]
            if not isinstance(flat, Node) or rank(value) != full:
                raise _Unknown
            return flat
        if value in self.same:
            value = self.same[value]
        if rank(value) < full:
            return value
        if rank(value) != full or not _batched(value):
            raise _Unknown
        return self._row_view(value)

    def _flatten(self, node: Node) -> None:
        schema = getattr(node.target, "_schema", None)
        name = "" if schema is None else schema.name.rpartition(":")[2]
        if node.op != "call_function":
            raise _Unknown
        if name == "sym_size" or (schema is None and node.target is not operator.getitem):
            self.same[node] = node  # a size
        elif not any(n in self.flat for n in node.all_input_nodes):
            self._again(node)
        elif node.target is operator.getitem:
            self._item(node)
        elif node.target in SHAPES:
            self._reshape(node)
        elif node.target in POSITIONS:
            self._made(node, self.edit.call(node.target, self._operand(node.args[0], rank(node.args[0])), like=node), 0)  # type: ignore[arg-type]
        elif node.target in INDEXED:
            self._indexed(node)
        elif name in POINTWISE:
            self._emit(node, lambda a: a, rank(node) - (1 if name == "one_hot" else 0))
        elif name in DIMENSIONS or name == "unsqueeze":
            self._over_dimensions(node, name, extra=1 if name == "unsqueeze" else 0)
        elif name in ("linear", "matmul") and rank(node.args[1]) == 2:  # type: ignore[arg-type]
            self._emit(node, lambda a: a, rank(node))
        elif name == "expand" and len(node.args[1]) == rank(node.args[0]):  # type: ignore[arg-type]
            self._emit(node, lambda a: [a[0], list(a[1])[1:]], rank(node))
        elif name in ("permute", "transpose"):
            self._permute(node, name)
        else:
            raise _Unknown

    def _emit(self, node: Node, change: Callable[[list[Any]], list[Any]], full: int) -> None:
        """`node` on operands of `full` dimensions without their first; `change` adapts the other arguments."""
        args = change([self._operand(a, full) for a in node.args])
        if any(isinstance(v, Node) for v in node.kwargs.values()):
            raise _Unknown
        self._made(node, self.edit.call(node.target, *args, like=node, **node.kwargs), 1)

    def _made(self, node: Node, new: Node, dropped: int) -> None:
        """Notes `new` for `node`, and checks that it differs in the first dimension only (or not at all)."""
        old, got = node.meta["val"], new.meta["val"]
        if node.target not in POSITIONS:
            for a, b in zip(old, got, strict=True) if isinstance(old, (tuple, list)) else [(old, got)]:
                first = [str(s) for s in a.shape[:dropped]]
                if (
                    [*first, *map(str, b.shape)] != [*map(str, a.shape)]
                    or a.dtype != b.dtype
                    or first != ["1"] * dropped
                ):
                    raise _Unknown
        self.flat[node] = new

    def _again(self, node: Node) -> None:
        """An operator on values that lost no dimension: the same, on its new operands."""
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.same.get(n, n))
        self.same[node] = self.edit.call(node.target, *args, like=node, **kwargs)

    def _item(self, node: Node) -> None:
        parent, index = node.args
        flat = self.flat[parent]  # type: ignore[index]
        if not isinstance(flat, Node) or not isinstance(index, int):
            raise _Unknown
        index %= len(flat.meta["val"]) + (parent.target in POSITIONS)  # type: ignore[union-attr]
        if parent.target not in POSITIONS:  # type: ignore[union-attr]
            self._made(node, self.edit.call(operator.getitem, flat, index, like=node), 1)
        else:
            self.flat[node] = BATCH if index == 0 else self.edit.call(operator.getitem, flat, index - 1, like=node)

    def _reshape(self, node: Node) -> None:
        flat, sizes = self.flat[node.args[0]], list(node.args[1])  # type: ignore[index,arg-type]
        if not isinstance(flat, Node):
            raise _Unknown
        if _batched(node) and sizes[0] == 1:
            self._made(node, self.edit.call(aten.reshape.default, flat, sizes[1:], like=node), 1)
        else:
            self.same[node] = self.edit.call(aten.reshape.default, flat, sizes, like=node)

    def _over_dimensions(self, node: Node, name: str, extra: int = 0) -> None:
        place, keyword, default = DIMENSIONS.get(name, (1, "dim", None))
        source: Any = node.args[0]
        full = rank(source)
        dims = arg(node, place, keyword, default)
        listed = list(dims) if isinstance(dims, (list, tuple)) else [dims]
        if any(not isinstance(d, int) or d % (full + extra) == 0 for d in listed):
            raise _Unknown
        moved: Any = [d % (full + extra) - 1 for d in listed]
        moved = moved if isinstance(dims, (list, tuple)) else moved[0]

        def change(args: list[Any]) -> list[Any]:
            given = args + [default] * (place + 1 - len(args)) if len(args) <= place else args
            return [*given[:place], moved, *given[place + 1 :]]

        if keyword in node.kwargs:
            raise _Unknown
        self._emit(node, change, full)

    def _permute(self, node: Node, name: str) -> None:
        full = rank(node)
        order = [int(d) % full for d in (node.args[1] if name == "permute" else node.args[1:3])]  # type: ignore[union-attr]
        if name == "transpose":
            if 0 in order:
                raise _Unknown
            self._emit(node, lambda a: [a[0], order[0] - 1, order[1] - 1], full)
            return
        if order[0] != 0:
            raise _Unknown
        self._emit(node, lambda a: [a[0], [d - 1 for d in order[1:]]], full)

    def _indexed(self, node: Node) -> None:
        """x[b, t], x[mask [1, T]], and their assignment: on rows, x[t] and x[mask]."""
        source, picks, rest = node.args[0], list(node.args[1]), node.args[2:]  # type: ignore[arg-type]
        flats = [self.flat.get(p) for p in picks]
        by_mask = len(picks) == 1 and isinstance(flats[0], Node) and flats[0].meta["val"].dtype == torch.bool
        by_place = len(picks) > 1 and flats[0] is BATCH and all(isinstance(f, Node) for f in flats[1:])
        if not (by_mask or by_place) or any(r in self.flat for r in rest if isinstance(r, Node)):
            raise _Unknown
        rows = self._operand(source, rank(source))  # type: ignore[arg-type]
        rest = torch.fx.node.map_arg(rest, lambda n: self.same.get(n, n))
        chosen = flats if by_mask else flats[1:]
        new = self.edit.call(node.target, rows, chosen, *rest, like=node, **node.kwargs)
        if node.target is aten.index.Tensor:
            self.same[node] = new
        else:
            self._made(node, new, 1)
