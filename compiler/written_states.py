"""The states of an exported graph, read from how it writes its buffers.

    index_copy(buffer, axis, positions, rows)      Appended(axis)
    cached_attention(..., k_cache, v_cache, ...)   Appended(1, window), in codes where scales are beside them
    anything else that writes                      Replaced: nothing is assumed of what stays

A source that knows more of a state declares it: `assemble(..., states=...)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from moec.compiler.ops import CachedAttention, find_call
from moec.compiler.states import PER_TOKEN_AND_HEAD, Appended, Extent, Positions, Replaced, State, Update

aten = torch.ops.aten
APPENDS = (aten.index_copy.default, aten.index_copy_.default)


def written_states(exported: ExportedProgram, context: int) -> dict[str, State]:
    """By name, in the order of the graph's inputs. `context`: the positions that the model was exported for."""
    names = {
        s.arg.name: str(s.target)
        for s in exported.graph_signature.input_specs
        if s.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    updates: dict[Node, Update | None] = {}
    coded: set[Node] = set()
    for buffer, how in _writes(exported):
        if buffer.name in names:
            updates[buffer] = how if updates.get(buffer, how) == how else Replaced()
    for node in exported.graph.nodes:
        attention = CachedAttention[Node].find(node)
        if attention is None:
            continue
        written = attention.written()
        appended = Appended(axis=1, window=int(attention.window))
        for cache, scales in (("k_cache", "k_scale"), ("v_cache", "v_scale")):
            updates[written[cache]] = appended
            if scales in written:
                coded.add(written[cache])
                updates[written[scales]] = None  # part of the state that it scales
    found = {}
    for node in exported.graph.nodes:
        update = updates.get(node)
        if node.op == "placeholder" and update is not None:
            name, value = names[node.name], node.meta["val"]
            shape = tuple(_extent(int(d), axis, update, context) for axis, d in enumerate(value.shape))
            dtype = "float32" if node in coded else str(value.dtype).removeprefix("torch.")
            found[name] = State(name, shape, update, dtype, PER_TOKEN_AND_HEAD if node in coded else None)
    return found


def _extent(size: int, axis: int, update: Update, context: int) -> Extent:
    """Along the axis of positions: as many as the context has, or fewer. A buffer that is longer has its own size."""
    if not isinstance(update, Appended) or axis != update.axis or size > context:
        return size
    return Positions(None if size == context else size)


def _writes(exported: ExportedProgram) -> Iterator[tuple[Node, Update]]:
    """Every write to a placeholder: in place, or as a result that becomes its new content."""
    nodes = {n.name: n for n in exported.graph.nodes}
    inputs = {str(s.target): s.arg.name for s in exported.graph_signature.input_specs if s.target is not None}
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            buffer = nodes[inputs[str(spec.target)]]
            yield buffer, _chain(nodes[spec.arg.name], buffer)
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable or find_call(node) is not None:
            continue
        if node.target is aten.detach_.default:  # of a constant that a forward makes: no value changes
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
                buffer = _root(value)
                yield buffer, _appended(node) if buffer is value and node.target in APPENDS else Replaced()


def _root(value: Node) -> Node:
    """Through views of a buffer, and through in-place operators, which return what they wrote."""
    while value.op == "call_function" and value.args and isinstance(value.args[0], Node) and _is_view(value):
        value = value.args[0]
    return value


def _is_view(node: Node) -> bool:
    """Whether its result may be memory of its first operand, and not its own."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _chain(value: Node, buffer: Node) -> Update:
    """How `value` is made of `buffer`: by one write along an axis, or several along the same."""
    found: Update | None = None
    while value is not buffer:
        if value.op != "call_function" or value.target not in APPENDS:
            return Replaced()
        update = _appended(value)
        if found is not None and found != update:
            return Replaced()
        found, source = update, value.args[0]
        assert isinstance(source, Node)
        value = source
    return found or Replaced()


def _appended(node: Node) -> Update:
    axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    into = node.args[0]
    assert isinstance(into, Node)
    return Appended(int(axis) % into.meta["val"].dim())
