"""Fuse router, top-k, routed experts, shared expert and combine into one moec::fused_moe node per layer.

    sum_k w[t,k] * expert[i[t,k]](x[t]) (+ shared(x[t]))  ->  moec::fused_moe(x, router, experts, shared)

Found by what the nodes compute (`matching/moe.py`), never by module names. A block that is not understood completely
stays, with a Refusal that names the node; the dialect then refuses the program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from moec.compiler.dialect import picks_rows
from moec.compiler.errors import CompileError
from moec.compiler.matching.experts import expert_indexed
from moec.compiler.matching.graph import PostDominators
from moec.compiler.matching.moe import (
    MoeBlock,
    SharedExpert,
    Stack,
    check_closed,
    combines_of,
    read_block,
    read_shared,
)
from moec.compiler.matching.read import Stuck, aten, is_op
from moec.compiler.ops import FusedMoe
from moec.compiler.pipeline import Pass, PassResult, Refusal
from moec.compiler.program import Editor, LazyWeight, Program, Role, Stage, writes
from moec.compiler.weights import Origin, joined_codes, stacked_codes

RULE = "fuse_moe"


def fuse_moe() -> Pass:
    return Pass(RULE, _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    refusals: list[Refusal] = []
    folded: list[str] = []
    changed = 0
    paths = PostDominators(edit.graph)
    candidates: dict[tuple[Node, ...], None] = {}
    for node in edit.graph.nodes:
        if not is_op(node, aten.topk.default):
            continue
        try:
            candidates.setdefault(tuple(combines_of(node, paths)))
        except Stuck as stuck:
            refusals.append(_refusal(stuck, node))
    for ends in filter(None, candidates):
        try:
            block = _read(edit, ends)
        except Stuck as stuck:
            refusals.append(_refusal(stuck, ends[-1]))
            continue
        _rewrite(edit, block)
        changed += 1
        if block.expert_scale is not None:
            folded.append(str(edit.weight_of(block.expert_scale)))
    if changed:
        edit.graph.eliminate_dead_code(is_impure_node=writes)
    if not refusals:  # a dispatch that no topk leads to
        left = next((n for n in edit.graph.nodes if expert_indexed(edit, n) or picks_rows(n)), None)
        if left is not None:
            refusals.append(
                Refusal.at(
                    RULE,
                    left,
                    "experts are read here (or rows of their tokens), and no topk over a router's scores leads here",
                    "select the experts with torch.topk over scores [N, E]",
                )
            )
    if not changed:
        return PassResult(program, 0, tuple(refusals))
    return PassResult(edit.done(), changed, tuple(refusals), tuple(folded))


def _refusal(stuck: Stuck, block: Node) -> Refusal:
    return Refusal.at(RULE, stuck.node, stuck.reason, stuck.remedy, block=block, read=stuck.read)


def _read(edit: Editor, ends: tuple[Node, ...]) -> MoeBlock:
    """The block that ends at one of `ends`; else Stuck of the nearest miss: the attempt that understood most."""
    nearest: Stuck | None = None
    for end in ends:
        try:
            block = read_shared(edit, read_block(edit, end))
            check_closed(edit, block)
            return block
        except Stuck as stuck:
            if nearest is None or len(stuck.read) >= len(nearest.read):
                nearest = stuck
    assert nearest is not None
    raise nearest


def _rewrite(edit: Editor, block: MoeBlock) -> None:
    shared_w13 = shared_w2 = None
    if block.shared is not None:
        shared_w13, shared_w2 = _stacked_gate_up(edit, block.shared), block.shared.down
    w13, b13, w2, b2 = (_made(edit, w) for w in (block.w13, block.b13, block.w2, block.b2))
    selection_bias = None if block.selection_bias is None else _flat(edit, block.selection_bias)
    router_weight = _router_rows(edit, block.router_weight) if block.router_in_out else block.router_weight
    if block.expert_scale is not None:  # sum_k w_k s_k (W2 h + b2) = sum_k w_k ((s_k W2) h + s_k b2)
        w2, b2 = _scaled(edit, w2, block.expert_scale), None if b2 is None else _scaled(edit, b2, block.expert_scale)
    if block.up is not None:
        w13 = _joined_experts(edit, w13, block.up, block.experts.layout)
    with edit.graph.inserting_before(block.end):
        call = FusedMoe(
            x=block.x,
            router_input=block.router_input,
            router_weight=router_weight,
            router_bias=block.router_bias,
            selection_bias=selection_bias,
            w13=w13,
            b13=b13,
            w2=w2,
            b2=b2,
            shared_w13=shared_w13,
            shared_w2=shared_w2,
            shared_gate=None if block.shared is None else block.shared.scale_weight,
            top_k=block.top_k,
            routing=str(block.routing),
            experts=str(block.experts),
        )
        fused = edit.emit(call, like=block.end)
        for view in block.views:
            fused = edit.call(view.target, fused, *view.args[1:], like=view, **view.kwargs)
    block.end.replace_all_uses_with(fused)
    for node, role in (
        (router_weight, Role.ROUTER),
        (block.router_bias, Role.ROUTER),
        (selection_bias, Role.ROUTER),
        (w13, Role.EXPERT),
        (b13, Role.OTHER),
        (b2, Role.OTHER),
        (w2, Role.EXPERT),
        (shared_w2, Role.SHARED),
        (None if block.shared is None else block.shared.scale_weight, Role.ROUTER),  # it scales, and stays in float
    ):
        name = edit.weight_of(node) if node is not None else None
        if name is not None:
            edit.roles[name] = role


def _flat(edit: Editor, weight: Node) -> Node:
    """A weight [E], of one that is stored [1, E]."""
    name = str(edit.weight_of(weight))
    stored = edit.weights[name]
    if len(stored.shape) == 1:
        return weight
    flat = LazyWeight((max(stored.shape),), stored.dtype, lambda: stored.load().reshape(-1))
    return edit.add_weight(_unique(edit, f"{name}.flat"), flat, Role.ROUTER)


def _router_rows(edit: Editor, weight: Node) -> Node:
    """A weight [E, D], of one that is stored [D, E]."""
    name = str(edit.weight_of(weight))
    stored = edit.weights[name]
    rows = LazyWeight(stored.shape[::-1], stored.dtype, lambda: stored.load().t().contiguous())
    return edit.add_weight(_unique(edit, f"{name}.rows"), rows, Role.ROUTER)


def _scaled(edit: Editor, weight: Node, scale: Node) -> Node:
    """A weight (or bias) of all experts, [E, ...], each times its scale [E]."""
    name = str(edit.weight_of(weight))
    plain, factors = edit.weights[name], edit.weights[str(edit.weight_of(scale))]

    if plain.stored is not None:
        raise CompileError(
            "its experts have a scale each, which cannot be multiplied into their stored codes without rounding again",
            place=name,
            remedy="compile from a checkpoint of floats",
        )

    def load() -> torch.Tensor:
        return plain.load() * factors.load().reshape(-1, *[1] * (len(plain.shape) - 1))

    def unscaled(value: torch.Tensor) -> torch.Tensor:
        by = factors.load().reshape(-1, *[1] * (len(plain.shape) - 1))
        return torch.where(by == 0, 0.0, value / by)  # a scale of zero leaves nothing of its expert

    scaled = LazyWeight(plain.shape, plain.dtype, load, origins=plain.taken(name, unscaled))
    return edit.add_weight(_unique(edit, f"{name}.scaled"), scaled, edit.roles[name])


def _made(edit: Editor, weight: Node | Stack | None) -> Node | None:
    """`weight`, or a new one that reads the pieces of a stack when it is loaded, expert by expert."""
    if not isinstance(weight, Stack):
        return weight
    names = [[(str(edit.weight_of(p.weight)), p.index) for p in pieces] for pieces in weight.pieces]
    sources = {name: edit.weights[name] for pieces in names for name, _ in pieces}
    shape, dtype = weight.shape(), next(iter(sources.values())).dtype

    def load() -> torch.Tensor:
        result = torch.empty(shape, dtype=dtype)
        stacked: dict[str, torch.Tensor] = {}  # sources that hold more than one expert are read once
        for expert, pieces in enumerate(names):
            start = 0
            for name, index in pieces:
                if index is None:
                    part = sources[name].load()
                else:
                    part = stacked.setdefault(name, stacked[name] if name in stacked else sources[name].load())[index]
                size = part.shape[weight.out_dim]
                result[expert].narrow(weight.out_dim, start, size).copy_(part)
                start += size
        return result

    name = _unique(edit, _stack_name(names))
    pieces = [[(sources[source], index) for source, index in expert] for expert in names]
    codes = stacked_codes(pieces, weight.out_dim - len(shape) + 1, name)
    origins = _places(names, sources, weight.out_dim)
    return edit.add_weight(name, LazyWeight(shape, dtype, load, codes, origins), Role.EXPERT)


def _places(
    names: list[list[tuple[str, int | None]]], sources: Mapping[str, LazyWeight], out_dim: int
) -> tuple[Origin, ...]:
    """Where each piece of each expert lies in the stack."""
    origins: list[Origin] = []
    for expert, pieces in enumerate(names):
        start = 0
        for name, index in pieces:
            shape = sources[name].shape
            size = (shape if index is None else shape[1:])[out_dim]
            origins += sources[name].taken(name, _part(out_dim, start, size, expert), index)
            start += size
    return tuple(origins)


def _part(dim: int, start: int, size: int, expert: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of a weight (or of its matrix `expert`), `size` rows or columns from `start` on."""
    return lambda value: (value if expert is None else value[expert]).narrow(dim, start, size)


def _stack_name(names: list[list[tuple[str, int | None]]]) -> str:
    """What the names of all experts share: `a.3.gate.weight`, `a.3.up.weight`, ... -> `a.gate+up.weight`."""
    common = []
    for column in zip(*names, strict=True):
        parts = [name.split(".") for name, _ in column]
        if len({len(p) for p in parts}) > 1:
            return "+".join(name for name, _ in names[0])
        common.append([words[0] for words in zip(*parts, strict=True) if len(set(words)) == 1])
    if len({len(c) for c in common}) > 1 or not common[0]:
        return "+".join(name for name, _ in names[0])
    return ".".join("+".join(dict.fromkeys(words)) for words in zip(*common, strict=True))


def _unique(edit: Editor, name: str) -> str:
    if edit.placeholder_of(name) is None:
        return name
    return next(n for i in itertools.count(2) if edit.placeholder_of(n := f"{name}_{i}") is None)


def _joined_experts(edit: Editor, gate: Node, up: Node, layout: str) -> Node:
    """Gates and ups of all experts in one weight, [E, 2F, D] or [E, D, 2F]."""
    first, second = str(edit.weight_of(gate)), str(edit.weight_of(up))
    a, b = edit.weights[first], edit.weights[second]
    dim = 1 if layout == "out_in" else 2
    sizes = list(a.shape)
    sizes[dim] += b.shape[dim]
    name = f"{first}+{second.rpartition('.')[2]}"
    codes = joined_codes([a, b], dim - 3, name)
    origins = (
        *a.taken(first, _part(dim, 0, a.shape[dim])),
        *b.taken(second, _part(dim, a.shape[dim], b.shape[dim])),
    )
    joined = LazyWeight(tuple(sizes), a.dtype, lambda: torch.cat([a.load(), b.load()], dim), codes, origins)
    return edit.add_weight(name, joined, Role.EXPERT)


def _stacked_gate_up(edit: Editor, shared: SharedExpert) -> Node:
    """A weight [2S, D], gate rows first, from the two of the graph."""
    gate_name, up_name = str(edit.weight_of(shared.gate)), str(edit.weight_of(shared.up))
    prefix, _, leaf = gate_name.rpartition(".")
    parent = prefix.rpartition(".")[0]
    name = f"{parent}.gate_up_proj.{leaf}" if parent else f"{gate_name}+{up_name}"
    name = _unique(edit, name)  # there may be such a weight, or a block that shares this one's
    return edit.add_weight(name, stacked(edit, gate_name, up_name, name), Role.SHARED)


def stacked(edit: Editor, gate: str, up: str, name: str) -> LazyWeight:
    """Rows of `gate`, then rows of `up`. Stored codes stay codes, and must then be of one format in both."""
    first, second = edit.weights[gate], edit.weights[up]
    rows = first.shape[0]
    shape = (rows + second.shape[0], *first.shape[1:])
    codes = joined_codes([first, second], -2, name)
    origins = (*first.taken(gate, _part(0, 0, rows)), *second.taken(up, _part(0, rows, second.shape[0])))
    return LazyWeight(shape, first.dtype, lambda: torch.cat([first.load(), second.load()]), codes, origins)
