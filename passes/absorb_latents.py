"""Latent attention that caches latents, in place of the keys and values of every head.

    kv = c W^T                                W [H * U, R], its rows head after head
    k = cat(kv[.., a:b], expand(r)), v = kv[.., v:w]
    cached_attention(q, k, v, K, V, ..)
        ->  q' = head_linear(q[.., :b-a], W, a, b, transposed)
            y = latent_attention(q', q[.., b-a:], c, r, C, R, ..)
            head_linear(y, W, v, w)

The product that expands latents to keys moves to the side of the queries, that to values to the side of the results
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Caches hold R + P numbers a position instead of H * (d + e), and a token
reads them once for all heads; a score costs R + P products instead of d, which prompts pay. Codes of W stay as they
are.

Run after weights are quantized, for targets that have the operators: calibration sees the linear that the model has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import (
    VIEWS,
    Stuck,
    arg,
    dim_of,
    is_op,
    piece,
    rank,
    same_shape,
    same_size,
    shape,
    static,
    unpad,
)
from moec.compiler.ops import CachedAttention, HeadLinear, LatentAttention, LinearQ, cached_attention
from moec.compiler.pipeline import Pass, PassResult, Refusal
from moec.compiler.program import Editor, Program, Stage
from moec.compiler.states import Appended

aten = torch.ops.aten
RULE = "absorb_latents"
REMEDY = "the keys and values of every head are cached, which takes more memory"
LANES = 16  # widths are multiples of it, so that no row of a cache ends inside a register
SWAPS = (aten.transpose.int, aten.permute.default)


def absorb_latents() -> Pass:
    return Pass(RULE, _run, needs=Stage.FUSED, gives=Stage.FUSED)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    changed = 0
    refusals = []
    for node in [n for n in edit.graph.nodes if n.op == "call_function" and n.target is cached_attention]:
        latent = _Latent.find(edit, node)
        if latent is None:
            continue
        try:
            latent.check()
        except Stuck as stuck:
            refusals.append(Refusal.at(RULE, stuck.node, stuck.reason, stuck.remedy or REMEDY, block=node))
            continue
        latent.rewrite()
        changed += 1
    if not changed:
        return PassResult(program, 0, tuple(refusals))
    return PassResult(edit.done(), changed, tuple(refusals))


@dataclass(frozen=True)
class _Part:
    """Features [begin, end) of every head of `source`, a value [1, T, 1 or H, width] in any order of the middle two."""

    source: Node
    begin: int
    end: int

    @property
    def width(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class _Latent:
    edit: Editor
    node: Node
    call: CachedAttention[Node]
    linear: Node  # of all heads, [1, T, H * U]
    keys: _Part  # of a head's share of `linear`, [begin, end) within it
    values: _Part
    rotated: Node  # [1, T, 1, P], the same for all heads, in any order of the middle two
    rotated_first: bool  # whether it comes before the other part of a key

    @staticmethod
    def find(edit: Editor, node: Node) -> _Latent | None:
        """The attention if its keys and values are expanded from one value by one linear; None otherwise."""
        call: CachedAttention[Node] = CachedAttention.of(node)
        heads = int(shape(call.q)[2])
        parts = [_expanded(p, heads) for p in _joined(_features(call.k))]
        value = _expanded(_features(call.v), heads)
        linears = [p for p in parts if isinstance(p, _Part)]
        shared = [p for p in parts if isinstance(p, Node)]
        if len(parts) != 2 or len(linears) != 1 or len(shared) != 1 or not isinstance(value, _Part):
            return None
        if value.source is not linears[0].source:
            return None
        return _Latent(edit, node, call, value.source, linears[0], value, shared[0], parts[0] is shared[0])

    @property
    def weight(self) -> Node:
        quantized = LinearQ[Node].find(self.linear)
        return self.linear.args[1] if quantized is None else quantized.codes  # type: ignore[return-value]

    @property
    def latents(self) -> Node:
        """What the linear reads, [1, (1,) T, R]."""
        quantized = LinearQ[Node].find(self.linear)
        return self.linear.args[0] if quantized is None else quantized.x  # type: ignore[return-value]

    def check(self) -> None:
        """Stuck if the absorbed form does not compute the same, or its kernel does not take it."""
        call, states = self.call, self.edit.states
        if call.sinks is not None or call.softcap > 0:
            raise Stuck(self.node, "latent attention with sinks or capped scores")
        quantized = LinearQ[Node].find(self.linear)
        bias = arg(self.linear, 2, "bias") if quantized is None else quantized.bias
        if bias is not None:
            raise Stuck(self.linear, "the linear that expands latents has a bias")
        if self.edit.weight_of(self.weight) is None:
            raise Stuck(self.linear, "what expands latents is computed, and no weight")
        if any(states[str(self.edit.weight_of(c))].readers for c in (call.k_cache, call.v_cache)):
            raise Stuck(self.node, "layers share the cache of latent attention")
        heads, latent, rotated = int(shape(call.q)[2]), int(shape(self.latents)[-1]), int(shape(self.rotated)[-1])
        if latent % LANES or rotated % LANES:
            raise Stuck(self.linear, f"latents of {latent} beside {rotated}: widths must be multiples of {LANES}")
        if latent + rotated >= heads * int(shape(call.k)[3] + shape(call.v)[3]):
            raise Stuck(self.linear, f"latents of {latent} beside {rotated} are no smaller than the keys and values")

    def rewrite(self) -> None:
        edit, call = self.edit, self.call
        width, rotated = self.keys.width, int(shape(self.rotated)[-1])
        part_at, rotated_at = (rotated, 0) if self.rotated_first else (0, width)
        with edit.graph.inserting_before(self.node):
            q = _queries(edit, call.q, part_at, part_at + width)
            q_rope = _queries(edit, call.q, rotated_at, rotated_at + rotated)
            (c_cache, c_scale), (r_cache, r_scale) = self._caches()
            attended = LatentAttention(
                q=edit.emit(self._product(q, self.keys, transposed=True), like=self.node),
                q_rope=q_rope,
                latents=_rows(edit, self.latents),
                rope=_rows(edit, self.rotated),
                latent_cache=c_cache,
                rope_cache=r_cache,
                start_pos=call.start_pos,
                scale=call.scale,
                window=call.window,
                latent_scale=c_scale,
                rope_scale=r_scale,
            )
            y = edit.emit(attended, like=self.node)
            y = edit.emit(self._product(y, self.values, transposed=False), like=self.node)
            merged = edit.call(aten.reshape.default, y, [1, -1, int(shape(self.node)[-1])], like=self.node)
        self.node.replace_all_uses_with(merged)
        edit.graph.erase_node(self.node)

    def _product(self, x: Node, rows: _Part, *, transposed: bool) -> HeadLinear[Node]:
        linear: HeadLinear[Node] = HeadLinear(
            x=x,
            weight=self.weight,
            scales=None,
            heads=int(shape(self.call.q)[2]),
            begin=rows.begin,
            end=rows.end,
            transposed=transposed,
        )
        held = LinearQ[Node].find(self.linear)
        if held is None:
            return linear
        return replace(
            linear,
            scales=held.scales,
            bits=held.bits,
            group_size=held.group_size,
            int8_activations=held.int8_activations,
            activation_block=held.activation_block,
            levels=held.levels,
        )

    def _caches(self) -> list[tuple[Node, Node | None]]:
        """The state of the keys holds latents, that of the values rotated parts."""
        found = []
        for cache, width in (
            (self.call.k_cache, shape(self.latents)[-1]),
            (self.call.v_cache, shape(self.rotated)[-1]),
        ):
            held = self.edit.states[str(self.edit.weight_of(cache))]
            assert isinstance(held.update, Appended)
            now = self.edit.hold(replace(held, shape=(1, held.shape[1], 1, int(width))))
            found.append((now[0], now[1] if len(now) == 2 else None))
        return found


def _features(node: Node) -> _Part:
    """The whole rows of `node` [1, T, H, width], traced to the value that they are read from."""
    return _traced(_Part(node, 0, int(shape(node)[-1])))


def _traced(part: _Part) -> _Part:
    """Below what moves no feature out of its head: swaps of the other dimensions, parts along the features."""
    while True:
        node = part.source
        last = rank(node) - 1
        cut = piece(node)
        if cut is not None and cut[1] == last and cut[4] == 1:
            part = _Part(cut[0], part.begin + cut[2], part.end + cut[2])
        elif is_op(node, *SWAPS) and _keeps_last(node):
            part = replace(part, source=node.args[0])
        elif is_op(node, *VIEWS) and unpad(node) is not node and shape(unpad(node))[-1] == shape(node)[-1]:
            part = replace(part, source=unpad(node))
        else:
            return part


def _keeps_last(node: Node) -> bool:
    last = rank(node) - 1
    if is_op(node, aten.transpose.int):
        return last not in {int(d) % (last + 1) for d in node.args[1:3]}  # type: ignore[call-overload]
    return int(node.args[1][-1]) % (last + 1) == last  # type: ignore[index,call-overload,arg-type]


def _joined(part: _Part) -> list[_Part]:
    """The parts that a row is joined of, in order; the part itself if it is none, or not all of one."""
    node = part.source
    if not is_op(node, aten.cat.default) or dim_of(node, 1, "dim", rank(node), 0) != rank(node) - 1:
        return [part]
    if (part.begin, part.end) != (0, int(shape(node)[-1])):
        return [part]
    return [_features(n) for n in node.args[0]]  # type: ignore[union-attr]


def _expanded(part: _Part, heads: int) -> _Part | Node | None:
    """A part of each head's share of a linear; or the node [1, T, 1, width] that is the same for all heads."""
    node = part.source
    if is_op(node, aten.expand.default):
        below: Node = node.args[0]  # type: ignore[assignment]
        whole = (part.begin, part.end) == (0, int(shape(node)[-1])) and shape(below)[-1] == part.width
        return below if whole and _one_for_all(below, node, heads) else None
    linear = node.args[0] if is_op(node, *VIEWS) else None
    if not isinstance(linear, Node):
        return None
    linear = unpad(linear)
    if not is_op(linear, aten.linear.default) and LinearQ.find(linear) is None:
        return None
    *tokens, features = _long(linear)
    width = static(shape(node)[-1])
    if width is None or features != heads * width or not same_shape(_long(node), [*tokens, heads, width]):
        return None
    return _Part(linear, part.begin, part.end)


def _one_for_all(below: Node, wide: Node, heads: int) -> bool:
    """Whether `wide` repeats `below`, which is [T, P] beside dimensions of one, once for each head and no more."""
    new = shape(wide)
    old = (*([1] * (len(new) - rank(below))), *shape(below))
    grown = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if not same_size(a, b)]
    return len(_long(below)) == 2 and len(grown) == 1 and static(old[grown[0]]) == 1 and static(new[grown[0]]) == heads


def _long(node: Node) -> list[Any]:
    """The sizes of a value's dimensions but those of one."""
    return [s for s in shape(node) if static(s) != 1]


def _queries(edit: Editor, q: Node, begin: int, end: int) -> Node:
    """q[..., begin:end] of [1, T, H, width]: the value that it is joined from where there is one."""
    below: Any = q.args[0] if is_op(q, aten.transpose.int) and {int(d) % 4 for d in q.args[1:3]} == {1, 2} else q  # type: ignore[call-overload]
    if is_op(below, aten.cat.default) and dim_of(below, 1, "dim", 4, 0) == 3:
        at = 0
        for part in below.args[0]:
            if (at, at + int(shape(part)[-1])) == (begin, end):
                return part if below is q else edit.call(aten.transpose.int, part, 1, 2, like=part)
            at += int(shape(part)[-1])
    return edit.call(aten.slice.Tensor, q, 3, begin, end, like=q)


def _rows(edit: Editor, node: Node) -> Node:
    """[1, T, width] of a value that has dimensions of one beside these."""
    node = unpad(node)
    while rank(node) > 3:
        spare = next(i for i in range(1, rank(node) - 1) if static(shape(node)[i]) == 1)
        node = edit.call(aten.squeeze.dim, node, spare, like=node)
    return node if rank(node) == 3 else edit.call(aten.unsqueeze.default, node, 0, like=node)
