"""Make an exported graph functional by renaming operators, where nothing else is needed.

`ExportedProgram.run_decompositions({})` traces the graph again, some 10 ms per node. For a decoder it only does this:

    index_copy_(buffer, ..) -> buffer' = index_copy(buffer, ..), returned as the buffer's new content
    add_(x, y)              -> add(x, y), which later readers of x read
    flatten, unflatten, view_as, reshape -> view;   expand_as -> expand;   chunk -> split;   to -> _to_copy

A write to something that has views, or a composite operator that is not listed, gives None: such a graph is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument
from torch.fx import Node

from moec.compiler.program import Editor, Program

aten = torch.ops.aten
# operators that return their operand or a view of it, decided at run time; the rules of canonicalize know them
PLAIN = {
    aten.dropout.default,
    aten.contiguous.default,
    aten.matmul.default,
    aten.type_as.default,
    aten.one_hot.default,
    aten.__and__.Tensor,
}
RESHAPES = {aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default, aten.reshape.default}
TYPED = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other}
IN_PLACE = {
    aten.index_copy_.default: aten.index_copy.default,
    aten.index_add_.default: aten.index_add.default,
    aten.index_put_.default: aten.index_put.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.scatter_.src: aten.scatter.src,
    aten.scatter_.value: aten.scatter.value,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
}


def functional(program: Program) -> Editor | None:
    """An editor whose graph writes nothing; None when the graph must be traced for that."""
    edit = program.edit()
    worker = _Functional(edit)
    for node in list(edit.graph.nodes):
        if node.op == "call_function" and not worker.rewrite(node):
            return None
    worker.return_buffers()
    return edit


class _Functional:
    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._order = {n: i for i, n in enumerate(edit.graph.nodes)}
        self._sizes: dict[str, Node] = {}  # expression of a symbolic size -> a node that has it as its value
        self._buffers = {
            s.arg.name: str(s.target) for s in edit.input_specs if s.kind == InputKind.BUFFER and s.target is not None
        }
        self._written: dict[Node, Node] = {}  # buffer -> its newest content
        self._contents: dict[Node, list[Node]] = {}  # value -> what it was before each write to it

    def rewrite(self, node: Node) -> bool:
        """False if `node` cannot be made functional here."""
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        if schema is None:
            return True
        if target is aten.sym_size.int:
            self._sizes.setdefault(str(node.meta["val"]), node)
            return True
        if schema.is_mutable:
            return target in IN_PLACE and not node.kwargs.get("out") and self._write(node, IN_PLACE[target])
        if target in RESHAPES:
            return self._reshape(node)
        if target in TYPED:
            return self._cast(node)
        if target is aten.chunk.default:
            return self._chunk(node)
        if target is aten.expand_as.default:
            return self._expand(node)
        if target in PLAIN or target.namespace != "aten":
            return True
        return not (_aliases(schema) and has_kernel(target.name(), "CompositeImplicitAutograd"))

    def return_buffers(self) -> None:
        """Written buffers become results, in the order of the inputs, before the results of the model."""
        output = next(reversed(self._edit.graph.nodes))
        order = {n: i for i, n in enumerate(self._edit.graph.nodes)}
        written = sorted(self._written.items(), key=lambda item: order[item[0]])
        output.args = ((*(value for _, value in written), *output.args[0]),)
        output.meta.pop("val", None)
        self._edit.output_specs[:0] = [
            OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(value.name), self._buffers[buffer.name])
            for buffer, value in written
        ]

    def _write(self, node: Node, target: Callable[..., Any]) -> bool:
        """A write to `into` becomes a new value, which everything after it reads instead."""
        into: Any = node.args[0]
        root = next((b for b, newest in self._written.items() if newest is into), into)
        if not isinstance(into, Node) or (into.op == "placeholder" and into.name not in self._buffers):
            return False
        if into.op == "call_function" and root is into and _may_alias(into):
            return False  # a view: whatever else looks at its storage would have to be written as well
        here = self._order[node]
        before = [into, *self._contents.pop(into, [])]
        readers = [u for n in before for u in n.users if u is not node]
        if any(self._order.get(u, here) < here and _may_alias(u) for u in readers):
            return False  # a view of it was taken before, and sees the write
        if into.meta["val"].dtype != node.meta["val"].dtype:
            return False
        node.target = target
        if _changes_shape_or_type(node, into):
            return False
        for user in [u for u in into.users if u is not node and self._order.get(u, here) > here]:
            user.replace_input_with(into, node)
        self._contents[node] = before
        if root.op == "placeholder":
            self._written[root] = node
        return True

    def _reshape(self, node: Node) -> bool:
        source: Any = node.args[0]
        if node.target is aten.reshape.default:
            if _viewable(source.meta["val"], node.meta["val"]):  # else it stays a reshape: it copies
                node.target = aten.view.default
            return True
        sizes = [self._size(s) for s in node.meta["val"].shape]
        if any(s is None for s in sizes):
            return False
        node.target, node.args, node.kwargs = aten.view.default, (source, sizes), {}
        return True

    def _expand(self, node: Node) -> bool:
        sizes = [self._size(s) for s in node.meta["val"].shape]
        if any(s is None for s in sizes):
            return False
        node.target, node.args = aten.expand.default, (node.args[0], sizes)
        return True

    def _size(self, size: Any) -> Any:
        """The node whose value is a symbolic size; None for an expression that no input has as a size."""
        if isinstance(size, int) or str(size) in self._sizes:
            return size if isinstance(size, int) else self._sizes[str(size)]
        nodes = self._edit.graph.nodes
        first = next(n for n in nodes if n.op != "placeholder")
        for given in (n for n in nodes if n.op == "placeholder" and n.name not in self._buffers):
            for dim, extent in enumerate(given.meta["val"].shape):
                if str(extent) == str(size):
                    with self._edit.graph.inserting_before(first):
                        self._sizes[str(size)] = self._edit.call(aten.sym_size.int, given, dim)
                    return self._sizes[str(size)]
        return None

    def _cast(self, node: Node) -> bool:
        source: Any = node.args[0]
        copies = node.kwargs.get("copy") or True in node.args[2:]
        if source.meta["val"].dtype != node.meta["val"].dtype or copies:
            node.target, node.args = aten._to_copy.default, (source,)
            node.kwargs = {"dtype": node.meta["val"].dtype}
        else:  # its operand itself
            node.replace_all_uses_with(source)
            self._edit.graph.erase_node(node)
        return True

    def _chunk(self, node: Node) -> bool:
        source: Any = node.args[0]
        dim = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % source.meta["val"].dim()
        size = source.meta["val"].shape[dim]
        if not isinstance(size, int):
            return False
        given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        chunks: Any = node.args[1]
        node.target, node.kwargs = aten.split.Tensor, {}
        node.args = (source, -(-size // chunks), *(() if given == 0 else (given,)))
        return True


def _aliases(schema: Any) -> bool:
    return any(r.alias_info is not None for r in schema.returns)


def _may_alias(node: Node) -> bool:
    """Whether the result of `node` may share the storage of an operand."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return node.op == "call_function" and any(isinstance(a, Node) and _may_alias(a) for a in node.args)
    return _aliases(schema) or node.target in RESHAPES | TYPED | {aten.contiguous.default, aten.dropout.default}


def _changes_shape_or_type(node: Node, into: Node) -> bool:
    """Whether the functional form could give something else than an array like the one written."""
    a, b = node.meta["val"], into.meta["val"]
    return a.dtype != b.dtype or [str(s) for s in a.shape] != [str(s) for s in b.shape]


def _viewable(source: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether a reshape needs no copy: its result is known to lie on the operand's storage."""
    return source.untyped_storage()._cdata == result.untyped_storage()._cdata
