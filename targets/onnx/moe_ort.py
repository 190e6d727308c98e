"""`moec::FusedMoE` on ONNX Runtime's own kernels: experts by QMoE, the shared expert by MatMulNBits.

QMoE selects by `router_probs` and weighs by `router_weights`. Both are dense [N, E] and made from our own top-k: the
selected experts get the numbers K .. 1 (0 elsewhere), and the combine weights, normalised and scaled, as they are. So
every way of routing is expressed, and ties cannot be resolved in two ways.

What QMoE cannot hold is refused by `check`, before anything is written. Its limits on the CPU, all measured:
groups along the input, SwiGLU with gate and up rows alternating, symmetric INT4. INT8 experts it multiplies with
activations rounded to INT8 at every accuracy level (1e-2 relative).

N tokens, E experts, K experts per token, D model width, F expert width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from onnx import FunctionProto, helper

from moec.compiler.errors import CompileError
from moec.targets.onnx.moe_form import MoeForm
from moec.targets.onnx.moe_math import activate, in_halves, route
from moec.targets.onnx.moe_standard import moe_function
from moec.targets.onnx.nodes import MICROSOFT, Nodes
from moec.targets.onnx.weights import Change

STANDARD = "or compile with `flavour: standard`"


def check(form: MoeForm, where: str) -> None:
    """CompileError naming the first thing that QMoE cannot hold."""
    what, how = form.what, form.routing
    symmetric = what.up_min == -what.up_max and what.gate_min == -math.inf and what.gate_max == what.up_max
    faults = [
        (form.bits == 0, "its experts are not quantized, QMoE takes INT4", "set `experts: int4`"),
        (form.bits == 8, "its experts are INT8 codes here, which QMoE multiplies with activations rounded to INT8",
         "set `experts: int4`"),
        (what.layout == "in_out", "its experts are grouped along their output, QMoE takes groups along the input",
         "set `expert_group_axis: in` (a checkpoint's own INT4 codes cannot be regrouped)"),
        (not what.gated or what.activation != "silu",
         f"its experts compute {'' if what.gated else 'ungated '}{what.activation}, QMoE takes SwiGLU", ""),
        (not symmetric, "its clamps are not QMoE's: gate below a limit, up within plus and minus the same limit", ""),
        (how.apply == "input", "its routing weights act on the experts' input, QMoE's on their output", ""),
        (form.group_size < 16 or form.group_size & (form.group_size - 1) != 0,
         f"its group size is {form.group_size}, QMoE takes powers of two from 16", "choose another group_size"),
    ]  # fmt: skip
    for wrong, fault, remedy in faults:
        if wrong:
            raise CompileError(fault, place=where, remedy=f"{remedy}, {STANDARD}" if remedy else STANDARD[3:])


def _offset(codes: torch.Tensor) -> torch.Tensor:
    """Two's complement nibbles or bytes -> the same plus 8 or 128, which flips the top bit of each."""
    return codes ^ 0x88 if codes.dtype == torch.uint8 else codes.view(torch.uint8) ^ 0x80


def _alternating(rows: torch.Tensor) -> torch.Tensor:
    """[E, 2F, .] with gate rows first -> gate and up rows in turn."""
    gate, up = rows.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


OFFSET = Change("offset", _offset)
ALTERNATING = Change("alternating", _alternating)
ALTERNATING_FLOAT32 = Change("alternating.float32", lambda rows: _alternating(rows.to(torch.float32)), widens=True)
ALTERNATING_OFFSET = Change("alternating.offset", lambda codes: _alternating(_offset(codes)))


def input_names(form: MoeForm) -> list[str]:
    """The function's inputs, in order."""
    names = ["x", "router_input", "router_weight"]
    names += [n for n in ("router_bias", "selection_bias", "b13", "b2") if n in form.present]
    if form.shared_width:
        names += ["shared_w13", "shared_w13.scales", "shared_w2", "shared_w2.scales"]
    if "shared_gate" in form.present:
        names.append("shared_gate")
    return [*names, "w13", "w13.scales", "w2", "w2.scales"]


def ort_function(form: MoeForm, overload: str, *, wide_scales: bool) -> FunctionProto:
    b = Nodes()

    def scales(name: str) -> str:
        return name if wide_scales else b.op("Cast", name, to=1)

    route(b, form, indices="indices", weights="weights")
    routed = _routed(b, form, scales("w13.scales"), scales("w2.scales"))
    shared = _shared(b, form, scales("shared_w13.scales"), scales("shared_w2.scales")) if form.shared_width else None
    return moe_function(b, form, input_names(form), (routed, shared), overload, helper.make_opsetid(MICROSOFT, 1))


def _routed(b: Nodes, form: MoeForm, w13_scales: str, w2_scales: str) -> str:
    shape = b.op("Concat", b.dimension("x", 0), b.ints(form.experts), axis=0)
    nothing = b.op("ConstantOfShape", shape)
    ranks = np.arange(form.top_k, 0, -1, dtype=np.float32)[None]
    spread = b.op("Expand", b.constant(ranks), b.op("Shape", "indices"))
    probs = b.op("ScatterElements", nothing, "indices", spread, axis=1)
    weights = b.op("ScatterElements", nothing, "indices", "weights", axis=1)
    limit: dict[str, Any] = {} if form.what.up_max == math.inf else {"swiglu_limit": form.what.up_max}
    biases = [name if name in form.present else "" for name in ("b13", "b2")]
    return b.op(
        "QMoE",
        *("x", probs, "w13", w13_scales, biases[0], "w2", w2_scales, biases[1]),
        *("", "", "", "", "", "", weights),
        domain=MICROSOFT,
        k=form.top_k,
        expert_weight_bits=form.bits,
        block_size=form.group_size,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=form.what.alpha,
        activation_beta=form.what.up_offset,
        normalize_routing_weights=0,
        accuracy_level=0,
        **limit,
    )


def nbits(b: Nodes, x: str, codes: str, scales: str, *, n: int, k: int, bits: int, group: int) -> str:
    """x [.., k] times a weight [n, k] as MatMulNBits holds it, with float activations."""
    attributes: dict[str, Any] = {"N": n, "K": k, "bits": bits, "block_size": group, "accuracy_level": 0}
    return b.op("MatMulNBits", x, codes, scales, domain=MICROSOFT, **attributes)


def _shared(b: Nodes, form: MoeForm, w13_scales: str, w2_scales: str) -> str:
    how: dict[str, Any] = {"bits": form.bits, "group": form.group_size}
    hidden = nbits(b, "x", "shared_w13", w13_scales, n=form.shared_outer, k=form.width, **how)
    hidden = activate(b, hidden, in_halves(form.what))
    y = nbits(b, hidden, "shared_w2", w2_scales, n=form.width, k=form.shared_width, **how)
    if "shared_gate" not in form.present:
        return y
    return b.op("Mul", b.op("Sigmoid", b.op("Gemm", "x", "shared_gate", transB=1)), y)
