"""Attention over a KV cache that is an input and an output, in standard ONNX.

    present = concat(past, new);   y = softmax(scale * q present_k^T + mask, and sinks) present_v; scores capped by tanh

Names are those that ONNX Runtime's users know: `past_key_values.N.key`, `present.N.key`, [1, KV, positions, d]. An INT8
cache has its scales beside it, `past_key_values.N.key_scale` [1, KV, positions]. The length of the past is where a
call's tokens begin: there is no `position_ids`. `attention_mask` [1, positions] hides positions that are 0 in it.

T tokens of a call, P positions of the past, S = P + T, H query heads, KV key/value heads, d head width, e value width.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.ops import CachedAttention
from moec.compiler.ops.call import shape_of
from moec.compiler.program import module_path
from moec.targets.onnx.context import Context
from moec.targets.onnx.facts import PAST, PRESENT

MASK = "attention_mask"
P, T, S = "past_sequence_length", "sequence_length", "total_sequence_length"
HIDDEN = float(np.finfo(np.float32).min)  # finite: a row that may see nothing must not become NaN


def past_length(c: Context) -> str:
    """int64 [1]. The caches are declared before the nodes are lowered."""
    return c.once("past_length", lambda: c.b.dimension(f"{PAST}.0.key", 2))


def token_count(c: Context) -> str:
    return c.once("token_count", lambda: c.b.dimension("input_ids", 1))


def total_length(c: Context) -> str:
    return c.once("total_length", lambda: c.b.op("Add", past_length(c), token_count(c)))


def declare_cache(c: Context, node: Node) -> None:
    """The inputs and outputs of the next attention layer. Codes stay codes unless the target's option wants floats."""
    attention = CachedAttention[Node].of(node)
    n = len(c.caches)
    coded = attention.coded and c.options.kv_cache == "spec"
    if coded:
        c.coded.add(node)
    element = TensorProto.INT8 if coded else TensorProto.FLOAT
    layer = {}
    for part, cache in (("key", attention.k_cache), ("value", attention.v_cache)):
        _, _, heads, width = (int(d) for d in shape_of(cache))
        c.add_input(f"{PAST}.{n}.{part}", element, (1, heads, P, width))
        c.add_output(f"{PRESENT}.{n}.{part}", element, (1, heads, S, width))
        layer[part] = [1, heads, width]
        if coded:
            c.add_input(f"{PAST}.{n}.{part}_scale", TensorProto.FLOAT, (1, heads, P))
            c.add_output(f"{PRESENT}.{n}.{part}_scale", TensorProto.FLOAT, (1, heads, S))
    c.layers[node] = n
    c.caches.append(layer)


def cached_attention(c: Context, node: Node) -> str:
    call = CachedAttention[Node].of(node)
    q, k, v = call.q, call.k, call.v
    if c.values.get(call.start_pos) != past_length(c):
        raise CompileError("attention does not begin at start_pos", place=module_path(node) or node.name)
    n = c.layers[node]
    keys, values = (
        _extended(c, f"{n}.{part}", c.value(new), coded=node in c.coded) for part, new in (("key", k), ("value", v))
    )
    heads, width = (int(d) for d in shape_of(q)[2:])
    kv_heads, value_width = int(shape_of(k)[2]), int(shape_of(v)[3])
    b = c.b
    scale = float(call.scale) / (float(call.softcap) or 1.0)
    query = b.op("Mul", b.op("Transpose", c.value(q), perm=[0, 2, 1, 3]), b.float(scale))
    # the queries of heads that share keys are rows of one product: no key is repeated
    query = b.reshape(query, 1, kv_heads, -1, width)
    scores = b.op("MatMul", query, b.op("Transpose", keys, perm=[0, 1, 3, 2]))
    if call.softcap > 0:  # the query has been divided by it
        scores = b.op("Mul", b.op("Tanh", scores), b.float(float(call.softcap)))
    by_head = c.once(("by_head", heads), lambda: b.op("Concat", b.ints(1, heads), token_count(c), b.ints(-1), axis=0))
    scores = b.op("Reshape", scores, by_head)
    weights = _weights(c, b.op("Where", _mask(c, int(call.window)), scores, b.float(HIDDEN)), call.sinks, heads)
    by_group = c.once(("by_group", kv_heads), lambda: b.op("Concat", b.ints(1, kv_heads, -1), total_length(c), axis=0))
    y = b.op("MatMul", b.op("Reshape", weights, by_group), values)
    y = b.op("Transpose", b.reshape(y, 1, heads, -1, value_width), perm=[0, 2, 1, 3])
    return b.reshape(y, 1, -1, heads * value_width, out=node.name)


def _weights(c: Context, scores_1HTS: str, sinks: Node | None, heads: int) -> str:
    """softmax over the positions; a sink is one more score of each head, whose weight is dropped."""
    b = c.b
    if sinks is None:
        return b.op("Softmax", scores_1HTS, axis=-1)
    sizes = c.once(("beside", heads), lambda: b.op("Concat", b.ints(1, heads), token_count(c), b.ints(1), axis=0))
    beside = b.op("Expand", b.reshape(c.value(sinks), 1, heads, 1, 1), sizes)
    every = b.op("Softmax", b.op("Concat", scores_1HTS, beside, axis=-1), axis=-1)
    return b.op("Slice", every, b.ints(0), total_length(c), b.ints(-1))


def _extended(c: Context, name: str, new_1TGd: str, *, coded: bool) -> str:
    """float [1, KV, S, d]: the cache with the tokens of this call, which is also its output."""
    b = c.b
    new = b.op("Transpose", new_1TGd, perm=[0, 2, 1, 3])
    if not coded:
        return b.op("Concat", f"{PAST}.{name}", new, out=f"{PRESENT}.{name}", axis=2)
    codes, scales = _quantized_rows(c, new)
    codes = b.op("Concat", f"{PAST}.{name}", codes, out=f"{PRESENT}.{name}", axis=2)
    scales = b.op("Concat", f"{PAST}.{name}_scale", scales, out=f"{PRESENT}.{name}_scale", axis=2)
    return b.op("Mul", b.op("Cast", codes, to=TensorProto.FLOAT), b.op("Unsqueeze", scales, b.ints(-1)))


def _quantized_rows(c: Context, x: str) -> tuple[str, str]:
    """`quant.quantize_rows`: int8 codes [.., d], and scales [..]."""
    b = c.b
    peak = b.op("ReduceMax", b.op("Abs", x), b.ints(-1), keepdims=1)
    full, zero = b.float(127.0), b.float(0.0)
    inverse = b.op("Where", b.op("Greater", peak, zero), b.op("Div", full, peak), zero)
    codes = b.op("Clip", b.op("Round", b.op("Mul", x, inverse)), b.float(-127.0), full)
    scales = b.op("Squeeze", b.op("Div", peak, full), b.ints(-1))
    return b.op("Cast", codes, to=TensorProto.INT8), scales


def _mask(c: Context, window: int) -> str:
    """bool [T, S]: position j is seen from p when p - window < j <= p (no lower limit when window is 0)."""
    b = c.b

    def scalar(value: str) -> str:
        return b.op("Squeeze", value, b.ints(0))

    def positions() -> str:
        p = b.op("Range", scalar(past_length(c)), scalar(total_length(c)), b.scalar(1))
        return b.op("Unsqueeze", p, b.ints(1))

    def make() -> str:
        p_T1 = c.once("positions", positions)
        j_S = c.once("seen", lambda: b.op("Range", b.scalar(0), scalar(total_length(c)), b.scalar(1)))
        seen = b.op("And", b.op("LessOrEqual", j_S, p_T1), b.op("Cast", MASK, to=TensorProto.BOOL))
        if window:
            seen = b.op("And", seen, b.op("Less", b.op("Sub", p_T1, j_S), b.scalar(window)))
        return seen

    return c.once(("mask", window), make)
