"""Emits the arithmetic of a MoE block as ONNX operators, for function bodies; `compiler/ops/moe_math.py` defines it.

N tokens, E experts, K experts per token, D model width, F expert width.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import numpy_helper

from moec.compiler.ops import Experts, Routing
from moec.targets.onnx.moe_form import MoeForm
from moec.targets.onnx.nodes import Nodes


def score(b: Nodes, logits: str, kind: str) -> str:
    if kind == "softmax":
        return b.op("Softmax", logits, axis=-1)
    if kind == "sigmoid":
        return b.op("Sigmoid", logits)
    return b.op("Sqrt", b.op("Softplus", logits))


def route(b: Nodes, form: MoeForm, *, indices: str, weights: str) -> None:
    """Define `indices` int64 [N, K], best first, and `weights` float [N, K]. `Routing`, steps 1 to 7."""
    how = form.routing
    bias = "router_bias" if "router_bias" in form.present else ""
    logits = b.op("Gemm", "router_input", "router_weight", bias, transB=1)
    scores = logits if how.selects_logits else score(b, logits, how.score)
    choice = scores
    if "selection_bias" in form.present:
        if how.bias_on == "scores" or how.after_topk:
            choice = b.op("Add", scores, "selection_bias")
        else:
            choice = score(b, b.op("Add", logits, "selection_bias"), how.score)
    if how.groups:
        choice = _within_groups(b, choice, form.experts, how)
    b.ops("TopK", choice, b.ints(form.top_k), outs=[b.name("best"), indices], axis=-1)
    if how.score == "sparsemixer":
        chosen = _near_weights(b, form, scores, indices)
    else:
        chosen = b.op("GatherElements", scores, indices, axis=-1)
    if how.after_topk:
        chosen = score(b, chosen, how.score)
    if how.normalize == "sum":
        total = b.op("ReduceSum", chosen, b.ints(-1), keepdims=1)
        if how.eps:
            total = b.op("Add", total, b.float(how.eps))
        if how.clamp_min:
            total = b.op("Max", total, b.float(how.clamp_min))
        chosen = b.op("Div", chosen, total)
    b.op("Mul", chosen, b.float(how.scale), out=weights)


def _near_weights(b: Nodes, form: MoeForm, logits: str, indices: str) -> str:
    """`Routing`, step 5, with sparsemixer: `moe_math.near_weights`."""
    size, left, weights = b.op("Abs", logits), logits, []
    lowest, places = b.float(-math.inf), b.constant(np.arange(form.experts, dtype=np.int64))
    for k in range(form.top_k):
        index = b.op("Slice", indices, b.ints(k), b.ints(k + 1), b.ints(1))
        best = b.op("GatherElements", logits, index, axis=-1)
        ratio = b.op("Div", b.op("Sub", best, logits), b.op("Max", size, best))
        far = b.op("Greater", ratio, b.float(form.routing.threshold))
        shares = b.op("Softmax", b.op("Where", far, lowest, left), axis=-1)
        weights.append(b.op("GatherElements", shares, index, axis=-1))
        if k + 1 < form.top_k:
            left = b.op("Where", b.op("Equal", places, index), lowest, left)
    return b.op("Concat", *weights, axis=-1)


def _within_groups(b: Nodes, choice: str, experts: int, how: Routing) -> str:
    """`choice` with the experts of groups that do not survive set to `fill`."""
    grouped = b.reshape(choice, -1, how.groups, experts // how.groups)
    if how.group_score == "max":
        rank = b.op("ReduceMax", grouped, b.ints(-1), keepdims=0)
    else:
        best, _ = b.ops("TopK", grouped, b.ints(2), outs=[b.name("best"), b.name("at")], axis=-1)
        rank = b.op("ReduceSum", best, b.ints(-1), keepdims=0)
    _, kept = b.ops("TopK", rank, b.ints(how.keep), outs=[b.name("best"), b.name("kept")], axis=-1)
    ones = b.op("ConstantOfShape", b.op("Shape", kept), value=numpy_helper.from_array(np.ones(1, np.float32)))
    zeros = b.op("ConstantOfShape", b.op("Shape", rank))
    mask = b.op("Greater", b.op("ScatterElements", zeros, kept, ones, axis=-1), b.float(0.0))
    fill = b.float(0.0 if how.fill == "zero" else -math.inf)
    return b.reshape(b.op("Where", b.op("Unsqueeze", mask, b.ints(-1)), grouped, fill), -1, experts)


def activate(b: Nodes, hidden: str, what: Experts) -> str:
    """[n, 2F] (or [n, F] when not gated) -> [n, F]."""
    if not what.gated:
        return _activation(b, _clamped(b, hidden, what.gate_min, what.gate_max), what)
    if what.interleaved:
        pairs = b.op("Reshape", hidden, b.ints(0, -1, 2))
        gate, up = (b.op("Squeeze", part, b.ints(-1)) for part in b.split(pairs, 2))
    else:
        gate, up = b.split(hidden, 2)
    gate = _clamped(b, gate, what.gate_min, what.gate_max)
    up = _clamped(b, up, what.up_min, what.up_max)
    if what.up_offset:
        up = b.op("Add", up, b.float(what.up_offset))
    return b.op("Mul", _activation(b, gate, what), up)


def _clamped(b: Nodes, x: str, low: float, high: float) -> str:
    if low == -math.inf and high == math.inf:
        return x
    bounds = [b.float(v) if math.isfinite(v) else "" for v in (low, high)]
    return b.op("Clip", x, *bounds[: 1 if not bounds[1] else 2])


def _activation(b: Nodes, x: str, what: Experts) -> str:
    if what.activation == "silu":
        inner = x if what.alpha == 1.0 else b.op("Mul", x, b.float(what.alpha))
        return b.op("Mul", x, b.op("Sigmoid", inner))
    if what.activation.startswith("gelu"):
        return b.op("Gelu", x, approximate="tanh" if what.activation == "gelu_tanh" else "none")
    positive = b.op("Relu", x)
    return positive if what.activation == "relu" else b.op("Mul", positive, positive)


def in_halves(what: Experts) -> Experts:
    """The shared expert's form: gate rows first, stored [out, in]."""
    return Experts(**{**what.__dict__, "layout": "out_in", "interleaved": False})


def dequantized(b: Nodes, codes: str, scales: str, group_size: int, *, wide: bool, axis: int = 1) -> str:
    """scale * code in float32, in blocks of `group_size` along `axis`. `wide`: the scales are float32 already."""
    # a float16 product of scale and code would be rounded: scales are widened first, which is exact
    factor = scales if wide else b.op("Cast", scales, to=1)
    return b.op("DequantizeLinear", codes, factor, axis=axis, block_size=group_size)
