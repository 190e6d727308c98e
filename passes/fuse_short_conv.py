"""Fuse a causal convolution of each channel over a carried state into moec::short_conv.

    z = before ++ x                                              along the tokens
    y = bias + sum over j of w[:, j] * z[t - (K-1) + j]          in any spelling, perhaps y * sigmoid(y)
    state = the last rows of z

What is made of z is recognised by what it computes: it is evaluated in float64 beside the operator's definition
(compiler/matching/identity.py). A state that is longer than the K-1 rows that a convolution needs is cut to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moec.compiler.matching.identity import agree, evaluated, is_analytic
from moec.compiler.matching.read import Stuck, dim_of, is_op, rank, same_size, shape, static
from moec.compiler.matching.state_graph import HeldState, content, replaced_states, start_of
from moec.compiler.ops import ShortConv
from moec.compiler.pipeline import Pass, PassResult, Refusal
from moec.compiler.program import Editor, LazyWeight, Program, Role, Stage, module_path
from moec.compiler.states import Shifted, State

aten = torch.ops.aten
RULE = "fuse_short_conv"
REMEDY = (
    "a convolution over carried inputs is z = cat((state, x)), a depthwise conv1d of z, and state = z[..., -(K-1):]"
)
TOKENS = (1, 2, 5, 11)
REGION = 60  # nodes between z and y: three a tap where taps are written out


def fuse_short_conv() -> Pass:
    return Pass(RULE, _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


@dataclass(frozen=True)
class _Joined:
    """z: the state's rows, then those of the call. `axis`: of its tokens, 1 or 2; the other one is of channels."""

    node: Node
    x: Node
    axis: int
    kept: int
    channels: int


@dataclass(frozen=True)
class _Read:
    """What z is turned into. `taps` [K, C] and `bias` are read as their weights lie."""

    y: Node
    weight: Node
    bias: Node | None
    taps: int
    transposed: bool  # the weight lies [C, (1,) K]
    silu: bool


def _run(program: Program) -> PassResult:
    edit = program.edit()
    refusals: list[Refusal] = []
    changed = 0
    for name, buffer, after in replaced_states(edit):
        if not _is_shifted(after):
            continue
        try:
            held = content(edit, name, buffer, after)
            _fuse(edit, held)
            changed += 1
        except Stuck as stuck:
            refusals.append(Refusal.at(RULE, stuck.node, stuck.reason, stuck.remedy or REMEDY, block=after))
    return PassResult(edit.done(), changed, tuple(refusals)) if changed else PassResult(program, 0, tuple(refusals))


def _is_shifted(after: Node) -> bool:
    """The end of a concatenation: whatever else a state is, it is not a convolution's."""
    return is_op(after, aten.slice.Tensor) and is_op(after.args[0], aten.cat.default)


def _fuse(edit: Editor, held: HeldState) -> None:
    joined = _joined(held)
    read = _output(edit, joined, held)
    start = start_of(edit)
    assert start is not None  # `content` read it
    edit.drop_mutation(held.after)
    kept = read.taps - 1
    (state,) = edit.hold(
        State(
            held.name, (1, kept, joined.channels), Shifted(axis=1), layer=module_path(read.y) or module_path(held.after)
        )
    )
    with edit.graph.inserting_before(read.y):
        x = joined.x if joined.axis == 1 else edit.call(aten.transpose.int, joined.x, 1, 2, like=read.y)
        call = ShortConv(
            x=x,
            weight=_taps(edit, read),
            bias=read.bias,
            state=state,
            start_pos=start,
            silu=read.silu,
        )
        fused = edit.emit(call, like=read.y)
        if shape(read.y)[1] == joined.channels and joined.axis == 2:
            fused = edit.call(aten.transpose.int, fused, 1, 2, like=read.y)
    read.y.replace_all_uses_with(fused)
    edit.graph.eliminate_dead_code()


def _taps(edit: Editor, read: _Read) -> Node:
    """The weight as [K, C]: itself, or a weight made of it."""
    if not read.transposed and rank(read.weight) == 2:
        return read.weight
    name = str(edit.weight_of(read.weight))
    made = f"{name}.taps"
    known = edit.placeholder_of(made)
    if known is not None:
        return known
    weight, given = edit.weights[name], edit.weights[name].shape
    channels = weight.shape[0] if read.transposed else weight.shape[-1]

    def load() -> Tensor:
        flat = weight.load().to(torch.float32)
        return (
            flat.reshape(channels, read.taps).t().contiguous() if read.transposed else flat.reshape(read.taps, channels)
        )

    def back(value: Tensor) -> Tensor:
        return (value.t() if read.transposed else value).reshape(given)

    lazy = LazyWeight((read.taps, channels), torch.float32, load, origins=weight.taken(name, back))
    return edit.add_weight(made, lazy, edit.roles[name])


def _joined(held: HeldState) -> _Joined:
    z = held.after.args[0]
    assert isinstance(z, Node)
    parts = z.args[0]
    axis = dim_of(z, 1, "dim", rank(z), 0)
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or parts[0] is not held.before or rank(z) != 3:
        raise Stuck(z, f"the state {held.name} is not put in front of what a call adds")
    if axis not in (1, 2) or shape(z)[0] != 1:
        raise Stuck(z, "the state is not joined along the tokens")
    x = parts[1]
    assert isinstance(x, Node)
    kept, channels = static(shape(held.buffer)[axis]), static(shape(held.buffer)[3 - axis])
    if kept is None or channels is None:
        raise Stuck(z, "the state has no fixed size")
    if x.meta["val"].dtype != torch.float32:
        raise Stuck(x, "what the state carries is not float32")
    joined = _Joined(z, x, axis, kept, channels)
    for tokens in TOKENS:
        value = _random((1, kept + tokens, channels) if axis == 1 else (1, channels, kept + tokens), tokens)
        wanted = value.narrow(axis, tokens, kept)
        if not agree(evaluated(held.after, {z: value}, tokens), wanted):
            raise Stuck(held.after, f"the state is not the last {kept} rows")
    return joined


def _random(size: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _output(edit: Editor, joined: _Joined, held: HeldState) -> _Read:
    """The last value that is made of z and weights alone, read as a convolution. Stuck if there is none."""
    region = _region(edit, joined, held)
    reason: Stuck | None = None
    for y in reversed(region):
        if not _covers(y, joined) or not _is_exit(y, region, joined.node, held.after):
            continue
        try:
            return _as_convolution(edit, y, joined)
        except Stuck as stuck:
            reason = reason or stuck
    raise reason or Stuck(joined.node, "what is made of the carried inputs is no value [1, tokens, channels] alone")


def _region(edit: Editor, joined: _Joined, held: HeldState) -> list[Node]:
    """The nodes behind z that are made of it and of weights, in their order."""
    fixed: set[Node] = set()  # weights, and what is made of them alone

    def known(n: Node) -> bool:
        if n in found or n in fixed or n is joined.node:
            return True
        if edit.weight_of(n) is not None:
            return edit.roles[str(edit.weight_of(n))] is not Role.CACHE
        if isinstance(n.meta.get("val"), torch.SymInt):
            return True
        inner = n.op == "call_function" and is_analytic(n) and all(known(i) for i in n.all_input_nodes)
        if inner:
            fixed.add(n)
        return inner

    found: list[Node] = []
    position = {n: i for i, n in enumerate(edit.graph.nodes)}
    pending = [joined.node]
    seen: set[Node] = {held.after}
    while pending and len(found) < REGION:
        pending.sort(key=lambda n: -position[n])
        node = pending.pop()
        if node is not joined.node:
            if not is_analytic(node) or not all(known(i) for i in node.all_input_nodes):
                continue
            found.append(node)
        for user in node.users:
            if user not in seen and user.op == "call_function":
                seen.add(user)
                pending.append(user)
    return found


def _covers(y: Node, joined: _Joined) -> bool:
    """Of the shape of x."""
    value = y.meta.get("val")
    return (
        isinstance(value, Tensor)
        and len(value.shape) == 3
        and all(same_size(a, b) for a, b in zip(value.shape, shape(joined.x), strict=True))
    )


def _is_exit(y: Node, region: list[Node], z: Node, after: Node) -> bool:
    """Whether everything that z reaches goes through y: nothing else behind it is left when y is replaced."""
    needed, pending = set[Node](), [y]
    while pending:
        node = pending.pop()
        if node not in needed and (node in region or node is z):
            needed.add(node)
            pending += node.all_input_nodes
    inner = needed - {y}
    return z in needed and all(
        u in needed or u is after for n in inner for u in n.users if u.op != "output" or n is not z
    )


def _as_convolution(edit: Editor, y: Node, joined: _Joined) -> _Read:
    used = _weights(edit, y, joined.node)
    sizes = {w: tuple(int(s) for s in shape(w)) for w in used}
    biases = [w for w in used if sizes[w] == (joined.channels,)]
    filters = [w for w in used if w not in biases]
    if len(filters) != 1 or len(biases) > 1:
        raise Stuck(y, f"it is made of {len(used)} weights, a convolution of a filter and perhaps a bias")
    weight, bias = filters[0], biases[0] if biases else None
    forms = _forms(sizes[weight], joined.channels)
    if not forms:
        raise Stuck(
            weight, f"a filter {list(sizes[weight])} is not one row of taps for each of {joined.channels} channels"
        )
    values = {w: _random(sizes[w], 77 + i) for i, w in enumerate(used)}
    for taps, transposed in forms:
        if taps < 2 or taps - 1 > joined.kept:
            raise Stuck(weight, f"a convolution of {taps} taps over a state of {joined.kept} rows")
        flat = values[weight].reshape(joined.channels, taps).t() if transposed else values[weight].reshape(taps, -1)
        for silu in (False, True):
            if all(_computes(y, joined, values, flat, None if bias is None else values[bias], silu, t) for t in TOKENS):
                return _Read(y, weight, bias, taps, transposed, silu)
    raise Stuck(y, "it does not compute a causal convolution of the last tokens, alone or with SiLU")


def _forms(size: tuple[int, ...], channels: int) -> list[tuple[int, bool]]:
    """(taps, whether it lies [C, K]) that a filter of this shape may have."""
    flat = [s for s in size if s != 1] if len(size) == 3 else list(size)
    if len(flat) != 2:
        return []
    return [(flat[1 - i], i == 0) for i in (0, 1) if flat[i] == channels]


def _computes(
    y: Node, joined: _Joined, values: dict[Node, Tensor], taps: Tensor, bias: Tensor | None, silu: bool, tokens: int
) -> bool:
    rows = _random((1, joined.kept + tokens, joined.channels), tokens)
    z = rows if joined.axis == 1 else rows.transpose(1, 2)
    wanted: Any = torch.zeros(1, tokens, joined.channels, dtype=torch.float64) if bias is None else bias
    skip = joined.kept - (len(taps) - 1)
    for j, tap in enumerate(taps):
        wanted = wanted + tap * rows[:, skip + j : skip + j + tokens]
    if silu:
        wanted = wanted * torch.sigmoid(wanted)
    found = evaluated(y, {**values, joined.node: z}, tokens)
    return agree(found, wanted if joined.axis == 1 else wanted.transpose(1, 2))


def _weights(edit: Editor, y: Node, z: Node) -> list[Node]:
    """Those that `y` is made of, z apart."""
    found: dict[Node, None] = {}
    seen, pending = {z}, [y]
    while pending:
        node = pending.pop()
        if node in seen or isinstance(node.meta.get("val"), torch.SymInt):
            continue
        seen.add(node)
        if edit.weight_of(node) is not None:
            found[node] = None
        pending += node.all_input_nodes
    return list(found)
