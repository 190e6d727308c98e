"""Handlers of our operators, all but the MoE block: which instructions of the delegate compute each.

T tokens, H query heads, G key/value heads, d head width, S cache positions. The KV caches of a Metal program are
[1, G, S, d]: the layout attention reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

import moec.compiler.ops as ops
from moec.compiler.ops.call import shape_of
from moec.targets.metal.context import Context
from moec.targets.metal.emitter import Emitter, Slot


def linear_q(c: Context, n: Node) -> Slot:
    call = ops.LinearQ[Node].of(n)
    weight = c.quantized_weight(call.codes, call.scales, call.bits, call.group_size)
    out, x = c.result(n), slot_of(c, call.x)
    y = c.e.emit("QuantizedMatmul", x=x, transpose=True, out=out if call.bias is None else None, **weight.fields)
    if call.bias is not None:
        y = c.e.add(y, c.plain(call.bias), out)
    return y if out is not None else c.finish(n, y)


def embedding_q(c: Context, n: Node) -> Slot:
    call = ops.EmbeddingQ[Node].of(n)
    weight = c.quantized_weight(call.codes, call.scales, call.bits, call.group_size)
    index = slot_of(c, call.ids)
    rows = {name: c.e.take(slot, index, 0) for name, slot in weight.fields.items() if isinstance(slot, Slot)}
    return c.e.emit(
        "Dequantize",
        **{**weight.fields, **rows},
        dtype=scalar_type(c.dtype),
        out=c.P.make_or_get_slot(n),
    )


def rms_norm(c: Context, n: Node) -> Slot:
    call = ops.RmsNorm[Node].of(n)
    scale = None if call.weight is None else c.plain(call.weight)
    return c.e.emit("RMSNorm", x=slot_of(c, call.x), weight=scale, eps=float(call.eps), out=c.P.make_or_get_slot(n))


def rope(c: Context, n: Node) -> Slot:
    """x * C + x[partner] * S, with cos and sin spread over the pair once per program."""
    call = ops.Rope[Node].of(n)
    cos, sin, interleaved = call.cos, call.sin, call.interleaved
    e, half = c.e, int(shape_of(cos)[-1])
    signs = [-1.0, 1.0] * half if interleaved else [-1.0] * half + [1.0] * half
    partner = [i ^ 1 for i in range(2 * half)] if interleaved else [(i + half) % (2 * half) for i in range(2 * half)]
    kind = "interleaved" if interleaved else "halves"
    partner_slot = c.P.make_or_get_constant(f"rope.partner.{kind}.{half}", torch.tensor(partner, dtype=torch.int32))
    sign_slot = c.P.make_or_get_constant(f"rope.sign.{kind}.{half}", torch.tensor(signs))

    def spread(table: Slot, out: Slot | None) -> Slot:
        """[T, d/2] -> [T, 1, d], each angle at both elements of its pair."""
        if interleaved:
            doubled = e.emit("Repeat", x=table, repeats=e.int_or_vid(2), axis=-1)
        else:
            doubled = e.emit("Concatenate", tensors=[e.tid(table), e.tid(table)], axis=-1)
        return e.emit("ExpandDims", x=doubled, axis=1, out=out)

    cos_T1d = e.persistent(("cos", cos, kind), lambda out: _discard(spread(slot_of(c, cos), out)))
    sin_T1d = e.persistent(
        ("sin", sin, kind), lambda out: _discard(e.multiply(spread(slot_of(c, sin), None), sign_slot, out))
    )
    value = slot_of(c, call.x)
    straight = e.multiply(value, cos_T1d)
    crossed = e.multiply(e.take(value, partner_slot, -1), sin_T1d)
    if c.dtype == torch.float32:
        return e.add(straight, crossed, c.P.make_or_get_slot(n))
    return c.finish(n, e.add(straight, crossed))


def cached_attention(c: Context, n: Node) -> Slot:
    call = ops.CachedAttention[Node].of(n)
    e = c.e
    start, stop = positions(c, call.q, call.start_pos)
    seen: list[Slot] = []
    for new, cache, scales in call.parts():
        if scales is None:
            slot = slot_of(c, cache)
            e.update(slot, e.transpose(slot_of(c, new), (0, 2, 1, 3)), 2, start, stop)
            seen.append(e.slice(slot, 2, 0, stop))
            continue
        value = e.transpose(slot_of(c, new), (0, 2, 1, 3))
        codes, row_scale = _quantize_rows(e, value if c.dtype == torch.float32 else e.cast(value, torch.float32))
        e.update(slot_of(c, cache), codes, 2, start, stop)
        e.update(slot_of(c, scales), row_scale, 2, start, stop)
        q_seen = e.cast(e.slice(slot_of(c, cache), 2, 0, stop), c.dtype)
        s_seen = e.slice(slot_of(c, scales), 2, 0, stop)
        seen.append(e.multiply(q_seen, s_seen if c.dtype == torch.float32 else e.cast(s_seen, c.dtype)))
    if call.sinks is not None or call.softcap > 0:
        return _attend_in_products(c, n, call, seen[0], seen[1], start, stop)
    return _attend(c, n, call.q, seen[0], seen[1], start, stop, float(call.scale), int(call.window))


def _quantize_rows(e: Emitter, x: Slot) -> tuple[Slot, Slot]:
    """`quant.quantize_rows` in fp32: (int8 codes, scales [..., 1]). The floor keeps 127/0 finite."""
    peak = e.emit("Max", x=e.unary("Abs", x), axes=[-1], keepdims=True)
    inverse = e.binary("Divide", e.scalar(127.0), e.binary("Maximum", peak, e.scalar(1e-36)))
    rounded = e.emit("Round", x=e.multiply(x, inverse), decimals=0)
    codes = e.emit("Clip", x=rounded, a_min=e.scalar(-127.0), a_max=e.scalar(127.0))
    return e.cast(codes, torch.int8), e.binary("Divide", peak, e.scalar(127.0))


def _attend(c: Context, n: Node, q: Node, k: Slot, v: Slot, start: Slot, stop: Slot, scale: float, window: int) -> Slot:
    e = c.e
    q_1HTd = e.transpose(slot_of(c, q), (0, 2, 1, 3))
    if window:
        attention: dict[str, Any] = {"mask": _window_mask(c, start, stop, window), "causal": False}
    else:
        attention = {"causal": True}  # the last query sees all of k: MLX aligns the diagonal at the end
    y_1HTe = e.emit("Sdpa", q=q_1HTd, k=k, v=v, scale=scale, **attention)
    y_1THe = e.transpose(y_1HTe, (0, 2, 1, 3))
    return e.reshape(y_1THe, (1, -1, int(n.meta["val"].shape[-1])), c.P.make_or_get_slot(n))


def _attend_in_products(c: Context, n: Node, call: Any, k: Slot, v: Slot, start: Slot, stop: Slot) -> Slot:
    """Attention by products: the delegate's has no sinks and caps no scores. Query heads of a key head are rows of one
    product."""
    e = c.e
    tokens = e.size(slot_of(c, call.q), 1)
    heads, kv, width = int(shape_of(call.q)[2]), int(shape_of(call.k)[2]), int(shape_of(call.q)[3])
    scale = float(call.scale) / (float(call.softcap) or 1.0)
    q_1HTd = e.multiply(e.transpose(slot_of(c, call.q), (0, 2, 1, 3)), e.scalar(scale, c.dtype))
    scores = e.emit("Addmm", mat1=e.reshape(q_1HTd, (1, kv, -1, width)), mat2=e.transpose(k, (0, 1, 3, 2)))
    if call.softcap > 0:  # the query has been divided by it
        scores = e.multiply(e.unary("Tanh", scores), e.scalar(float(call.softcap), c.dtype))
    scores_1HTS = e.reshape(scores, (1, heads, -1, stop))
    lowest = e.scalar(float(torch.finfo(c.dtype).min), c.dtype)
    seen_TS = _seen_mask(c, start, stop, int(call.window))
    scores_1HTS = e.emit("Where", condition=seen_TS, x=scores_1HTS, y=lowest)
    if call.sinks is None:
        weights = e.emit("Softmax", x=scores_1HTS, axis=-1, precise=True)
    else:
        sink = e.reshape(slot_of(c, call.sinks), (1, heads, 1, 1))
        shape = [e.int_or_vid(size) for size in (1, heads, tokens, 1)]
        beside = e.emit("BroadcastTo", x=sink if c.dtype == torch.float32 else e.cast(sink, c.dtype), shape=shape)
        every = e.emit("Concatenate", tensors=[e.tid(scores_1HTS), e.tid(beside)], axis=-1)
        weights = e.slice(e.emit("Softmax", x=every, axis=-1, precise=True), 3, 0, stop)
    y_1HTe = e.emit("Addmm", mat1=e.reshape(weights, (1, kv, -1, stop)), mat2=v)
    y_1THe = e.transpose(e.reshape(y_1HTe, (1, heads, -1, int(shape_of(call.v)[3]))), (0, 2, 1, 3))
    return e.reshape(y_1THe, (1, -1, int(n.meta["val"].shape[-1])), c.P.make_or_get_slot(n))


def _seen_mask(c: Context, start: Slot, stop: Slot, window: int) -> Slot:
    """bool [T, stop]: key j is seen by the query at p when j <= p, and p - window < j where there is a window."""
    if window:
        return _window_mask(c, start, stop, window)
    e = c.e

    def emit(out: Slot) -> None:
        p_T1 = e.emit("ExpandDims", x=e.arange(start, stop, torch.int32), axis=1)
        e.binary("LessEqual", e.emit("ExpandDims", x=e.arange(0, stop, torch.int32), axis=0), p_T1, out)

    return e.persistent(("mask", start, 0), emit)


def _window_mask(c: Context, start: Slot, stop: Slot, window: int) -> Slot:
    """bool [T, stop]: key j is seen by the query at p when p - window < j <= p."""
    e = c.e

    def emit(out: Slot) -> None:
        p_T1 = e.emit("ExpandDims", x=e.arange(start, stop, torch.int32), axis=1)
        j_1S = e.emit("ExpandDims", x=e.arange(0, stop, torch.int32), axis=0)
        width = c.P.make_or_get_constant(f"scalar.int32.{window}", torch.tensor(window, dtype=torch.int32))
        past = e.binary("LessEqual", j_1S, p_T1)
        near = e.binary("Less", e.binary("Subtract", p_T1, j_1S), width)
        e.binary("LogicalAnd", past, near, out)

    return e.persistent(("mask", start, window), emit)


def positions(c: Context, q: Node, start_pos: Node) -> tuple[Slot, Slot]:
    """The integers start and start + T of this call."""
    e = c.e
    start = e.persistent(("start", start_pos), lambda out: e.item(slot_of(c, start_pos), out), integer=True)
    stop = e.persistent(
        ("stop", start_pos), lambda out: _discard(e.add_int(start, e.size(slot_of(c, q), 1), out)), integer=True
    )
    return start, stop


def operands(n: Node) -> tuple[Any, ...]:
    """The arguments of an operator of torch's own, by position."""
    return n.args


def slot_of(c: Context, node: Any) -> Slot:
    return c.P.slot_map([node])[0]


def scalar_type(dtype: torch.dtype) -> int:
    from moec.targets.metal.emitter import torch_dtype_to_scalar_type

    return int(torch_dtype_to_scalar_type(dtype))


def _discard(slot: Slot) -> None:
    """For emitters that were given their slot."""


HANDLERS = {
    ops.linear_q: linear_q,
    ops.embedding_q: embedding_q,
    ops.rms_norm: rms_norm,
    ops.rope: rope,
    ops.cached_attention: cached_attention,
}
