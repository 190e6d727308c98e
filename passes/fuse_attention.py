"""Fuse cache update and attention into moec::cached_attention.

    sdpa(q, index_copy(K, pos, k), index_copy(V, pos, v), mask)  ->  moec::cached_attention(q, k, v, K, V, start_pos)

and the same spelled out in products around a softmax, with attention sinks or without (attention_forms.py).

Where keys and values are computed from caches row by row (latent attention), they are cached in place of what they are
computed from (attention_rows.py).

Several layers may read one cache, which one of them writes: each becomes the operator, given the same keys and values,
and writes the same rows again. They are fused together or not at all.

The mask and the write positions are verified by evaluating them: causal, or causal over a window, at sampled calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from moec.compiler.matching.evaluate import Call, PositionEvaluator, is_positions, sample_calls, window_of_mask
from moec.compiler.matching.read import VIEWS, Stuck, dim_of, is_op, same_size, shape, static, value
from moec.compiler.ops import CachedAttention
from moec.compiler.pipeline import Pass, PassResult, Refusal
from moec.compiler.program import Editor, Program, Stage, module_path
from moec.compiler.states import Appended, State
from moec.passes.attention_forms import AttentionForm, Side, attention_forms
from moec.passes.attention_rows import RowByRow

aten = torch.ops.aten
RULE = "fuse_attention"
REMEDY = "attention stays as it is, which runs slower; write each cache at start_pos with index_copy and mask causally"
MOVES = (aten.transpose.int, aten.permute.default, aten.expand.default, *VIEWS)


def fuse_attention() -> Pass:
    return Pass(RULE, _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


@dataclass(frozen=True)
class _Reading:
    """One attention: `end` is its result with merged heads."""

    form: AttentionForm
    end: Node
    keys: _Cache
    values: _Cache
    window: int


@dataclass(frozen=True)
class _Cache:
    """One cache: its buffer, the write that extends it, the new rows [1, T, KV, d], and where they go.

    computed: how rows are computed from those that were cached; they are None then, until attention is rewritten.
    """

    buffer: Node
    write: Node
    source: Node  # the updated cache, or what is computed from updated caches
    rows: Node | None  # in the layout of the source
    positions: Node
    heads_first: bool  # the source is [1, KV, S, d] rather than [1, S, KV, d]
    computed: RowByRow | None = None

    @property
    def length(self) -> int:
        return int(shape(self.source)[2 if self.heads_first else 1])

    @property
    def heads(self) -> int:
        return int(shape(self.source)[1 if self.heads_first else 2])

    @property
    def width(self) -> int:
        return int(shape(self.source)[3])


def _run(program: Program) -> PassResult:
    edit = program.edit()
    fuser = _Fuser(edit, program.info.max_tokens)
    refusals: list[Refusal] = []
    changed = 0
    found = attention_forms(edit.graph.nodes)
    refusals += [_refusal(stuck, stuck.node) for stuck in found if isinstance(stuck, Stuck)]
    for forms in _by_cache(form for form in found if isinstance(form, AttentionForm)):
        try:
            _check_private(forms)
            fuser.fuse(forms)
            changed += len(forms)
        except Stuck as stuck:
            refusals += [_refusal(stuck, form.node) for form in forms]
    return PassResult(edit.done(), changed, tuple(refusals)) if changed else PassResult(program, 0, tuple(refusals))


def _refusal(stuck: Stuck, block: Node) -> Refusal:
    return Refusal.at(RULE, stuck.node, stuck.reason, stuck.remedy or REMEDY, block=block)


def _by_cache(forms: Iterable[AttentionForm]) -> list[list[AttentionForm]]:
    """The attentions in order, grouped by the updated cache that their keys are read from."""
    found: dict[Node, list[AttentionForm]] = {}
    for form in forms:
        found.setdefault(_write(form.keys.node), []).append(form)
    return list(found.values())


def _write(node: Node) -> Node:
    """The node whose views and transposes keys or values are."""
    while is_op(node, *MOVES) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _check_private(forms: list[AttentionForm]) -> None:
    """Stuck if anything but these attentions reads the updated caches, through any of their views."""
    readers = {reader: operands for form in forms for reader, operands in form.readers.items()}
    pending = list({_write(side.node): None for form in forms for side in (form.keys, form.values)})
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.op == "output" or _reads_only_as(user, node, readers.get(user, ())):
                continue
            if not is_op(user, *MOVES):
                raise Stuck(node, "the updated cache has another reader than this attention")
            pending.append(user)


def _reads_only_as(user: Node, node: Node, operands: tuple[Node, ...]) -> bool:
    flat: list[Any] = []
    map_arg((user.args, user.kwargs), flat.append)
    return node in operands and flat.count(node) == operands.count(node)


class _Fuser:
    def __init__(self, edit: Editor, max_tokens: int) -> None:
        self._edit = edit
        self._max_tokens = max_tokens
        self._evaluator = PositionEvaluator(edit)
        self._windows: dict[tuple[Node, bool, int], int | None] = {}  # layers share their masks
        self._positions: dict[tuple[Node, int], bool] = {}
        self._order = {n: i for i, n in enumerate(edit.graph.nodes)}
        self._start = next(
            (
                n
                for n in edit.graph.nodes
                if n.op == "placeholder" and edit.weight_of(n) is None and n.meta["val"].dim() == 1
            ),
            None,
        )

    def fuse(self, forms: list[AttentionForm]) -> None:
        """Rewrite the attentions over one cache. Stuck when any part of one is not what the operator computes."""
        found = [self._read(form) for form in forms]
        writes = [(r.keys.write, r.values.write) for r in found]
        if any(w != writes[0] for w in writes):
            raise Stuck(forms[0].node, "layers share their keys, but not their values")
        layers = [module_path(form.node) for form in forms]
        window = found[0].window if all(r.window == found[0].window for r in found) else 0
        for cache in (found[0].keys, found[0].values):
            self._own_cache(cache, window, layers[0], tuple(layers[1:]))
        for reading in found:
            self._rewrite(reading)
        for write in writes[0]:
            self._edit.drop_mutation(write)

    def _read(self, form: AttentionForm) -> _Reading:
        node = form.node
        if self._start is None:
            raise Stuck(node, "the graph has no start position")
        keys, values = self._caches(form)
        if keys.buffer is values.buffer or keys.length != values.length or keys.heads != values.heads:
            raise Stuck(node, "keys and values do not come from two caches of one shape")
        if form.q.heads % keys.heads:
            raise Stuck(node, f"{form.q.heads} query heads over {keys.heads} key heads")
        for cache in (keys, values):
            self._check_positions(cache)
        return _Reading(form, self._merged_heads(node), keys, values, self._window(form, keys.length))

    def _rewrite(self, read: _Reading) -> None:
        edit, form, keys, values = self._edit, read.form, read.keys, read.values
        with edit.graph.inserting_before(form.node):
            query = _swap(edit, form.q.node) if form.q.heads_first else form.q.node
            made: dict[Node, Node] = {}
            rows = [_rows(edit, cache, made) for cache in (keys, values)]
            call = CachedAttention(
                q=query,
                k=rows[0],
                v=rows[1],
                k_cache=keys.buffer,
                v_cache=values.buffer,
                start_pos=self._start,
                scale=form.scale,
                window=read.window,
                sinks=None if form.sinks is None else self._flat(form.sinks),
                softcap=form.softcap,
            )
            fused = edit.emit(call, like=form.node)
        read.end.replace_all_uses_with(fused)

    def _flat(self, sinks: Node) -> Node:
        """[H] of [1, H, 1, 1]."""
        if value(sinks).dim() == 1:
            return sinks
        return self._edit.call(aten.reshape.default, sinks, [int(shape(sinks)[1])], like=sinks)

    def _own_cache(self, cache: _Cache, window: int, layer: str, readers: tuple[str, ...]) -> None:
        """Declare the buffer as the operator's state, float32 [1, S, KV, d]. Masked positions are never read."""
        name = str(self._edit.weight_of(cache.buffer))
        held = self._edit.states[name]
        positions = held.shape[held.update.axis] if isinstance(held.update, Appended) else cache.length
        shape = (1, positions, cache.heads, cache.width)
        self._edit.hold(State(name, shape, Appended(1, window), layer=layer, readers=readers))

    def _caches(self, form: AttentionForm) -> tuple[_Cache, _Cache]:
        """Keys and values: two written caches, or what is computed from two, row by row."""
        sources = [_source(side) for side in (form.keys, form.values)]
        if any(is_op(source, aten.index_copy.default) for source, _ in sources):
            keys, values = (self._cache(*source) for source in sources)
            return keys, values
        computed = [RowByRow(self._edit, source, 2 if first else 1) for source, first in sources]
        writes = {w.node: w for c in computed for w in c.writes}
        if len(writes) != 2:
            raise Stuck(form.node, f"keys and values are computed from {len(writes)} caches, not from two")
        self._check_own(form, computed)
        caches = [
            self._cache(w.node, w.axis == 2) for w in sorted(writes.values(), key=lambda w: self._order[w.buffer])
        ]
        for cache in caches:
            self._check_positions(cache)
        found = [
            _Cache(c.buffer, c.write, source, None, c.positions, first, rows)
            for c, (source, first), rows in zip(caches, sources, computed, strict=True)
        ]
        return found[0], found[1]

    def _check_own(self, form: AttentionForm, computed: list[RowByRow]) -> None:
        """Nothing but this attention reads what is computed from the caches. Stuck at another reader."""
        inside = {form.node, *form.readers, *(n for c in computed for n in (*c.axes, *c.inner))}
        for side in (form.keys, form.values):
            node = side.node
            while is_op(node, *MOVES):
                inside.add(node)
                node = node.args[0]  # type: ignore[assignment]
        for node in {n: None for c in computed for n in c.axes}:
            for user in node.users:
                if user.op != "output" and user not in inside:
                    raise Stuck(node, "the updated cache has another reader than this attention")

    def _cache(self, source: Node, heads_first: bool) -> _Cache:
        """A written cache."""
        if not is_op(source, aten.index_copy.default):
            raise Stuck(source, "keys and values must come from a cache written by index_copy")
        buffer, _, positions, rows = source.args
        if dim_of(source, 1, "dim", 4) != (2 if heads_first else 1):
            raise Stuck(source, "the cache is not written along its positions")
        if self._edit.weight_of(buffer) is None:
            raise Stuck(source, "the cache is not a buffer of the model")
        if set(buffer.users) != {source}:
            raise Stuck(buffer, "the cache has another reader than its update")
        if value(buffer).dtype != torch.float32:
            raise Stuck(buffer, "the cache is not float32")
        name = self._edit.weight_of(buffer)
        if self._edit.mutations_of(source) != [name]:
            raise Stuck(source, f"the updated cache is not returned as the new content of {name}, and of that alone")
        return _Cache(buffer, source, source, rows, positions, heads_first)  # type: ignore[arg-type]

    def _check_positions(self, cache: _Cache) -> None:
        key = (cache.positions, cache.length)
        if key not in self._positions:
            calls = sample_calls(cache.length, self._max_tokens)
            self._positions[key] = is_positions(lambda c: self._evaluator.values(cache.positions, c), calls)
        if not self._positions[key]:
            raise Stuck(cache.positions, "the cache is not written at start_pos, start_pos + 1, ...")

    def _window(self, form: AttentionForm, length: int) -> int:
        mask = form.mask
        if not isinstance(mask, Node):
            raise Stuck(form.node, "attention over the whole cache without a mask would read positions not written yet")
        key = (mask, form.hides, length)
        if key not in self._windows:

            def values(calls: list[Call]) -> Iterator[torch.Tensor]:
                return (~m if form.hides else m for m in self._evaluator.values(mask, calls))

            self._windows[key] = window_of_mask(values, length, self._max_tokens)
        window = self._windows[key]
        if window is None:
            raise Stuck(mask, "the mask is neither causal nor causal over a window")
        return window

    def _merged_heads(self, node: Node) -> Node:
        """The [1, T, H*d] value that follows: transpose(1, 2) and a reshape, nothing else reading in between."""
        turned = list(node.users)
        if len(turned) != 1 or not _swaps_heads(turned[0]):
            raise Stuck(turned[0] if turned else node, "the heads are not merged by transpose(1, 2) and a reshape")
        end = turned[0]
        while len(end.users) == 1 and is_op(next(iter(end.users)), *VIEWS):
            end = next(iter(end.users))
            if len(shape(end)) == 3:
                break
        sizes, source = shape(end), shape(node)
        width = static(sizes[-1])
        if len(sizes) != 3 or sizes[0] != 1 or not same_size(sizes[1], source[2]) or width != source[1] * source[3]:
            raise Stuck(end, "the heads are not merged into [1, T, H*d]")
        return end


def _source(side: Side) -> tuple[Node, bool]:
    """What keys or values are views of, their heads perhaps repeated, and whether its heads come first."""
    source, heads_first = side.node, side.heads_first
    if heads_first:
        source = _unrepeat(source)
        if _swaps_heads(source) and is_op(source.args[0], aten.index_copy.default):
            return source.args[0], False  # type: ignore[return-value]
    return source, heads_first


def _rows(edit: Editor, cache: _Cache, made: dict[Node, Node]) -> Node:
    """[1, T, KV, d], at the current insertion point."""
    rows = cache.rows if cache.computed is None else cache.computed.of_rows(made)
    assert rows is not None
    return _swap(edit, rows) if cache.heads_first else rows


def _swaps_heads(node: Any) -> bool:
    """transpose(1, 2) of four dimensions."""
    return is_op(node, aten.transpose.int) and {d % 4 for d in node.args[1:3]} == {1, 2}


def _swap(edit: Editor, node: Node) -> Node:
    """[1, a, b, d] -> [1, b, a, d], undoing a transpose that is already there."""
    if _swaps_heads(node):
        return node.args[0]
    return edit.call(aten.transpose.int, node, 1, 2, like=node)


def _unrepeat(node: Any) -> Any:
    """Below a repetition of heads [1, KV, S, d] -> [1, KV, 1, S, d] -> [1, KV, n, S, d] -> [1, KV*n, S, d]."""
    if not is_op(node, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return node
    wide = node.args[0]
    if not is_op(wide, aten.expand.default) or not is_op(wide.args[0], aten.unsqueeze.default):
        return node
    inner = wide.args[0]
    if dim_of(inner, 1, "dim", 5) != 2 or len(shape(node)) != 4 or len(shape(wide)) != 5:
        return node
    merged = static(shape(node)[1]) == shape(wide)[1] * shape(wide)[2] and same_size(shape(node)[2], shape(wide)[3])
    return inner.args[0] if merged else node
