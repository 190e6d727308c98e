"""`moec::FusedMoE` in standard ONNX: the reference body. Of the experts, only those that a token selected are read.

    indices, weights = route(router_input)
    y[n] = sum_k weights[n, k] * expert_{indices[n, k]}(x[n])  (+ shared(x[n]))

INT4 tensors cannot be indexed in ONNX: Gather, Slice and Split exclude them, and Scan has no INT4 kernel in ONNX
Runtime. So every expert is an input of its own, inside an `If` whose condition is that some token selected it. A step
of one token dequantizes K experts, a long prompt each expert once.

N tokens, E experts, K experts per token, D model width, F expert width.
"""

from __future__ import annotations

from onnx import FunctionProto, OperatorSetIdProto, helper

from moec.targets.onnx.moe_form import MoeForm
from moec.targets.onnx.moe_math import activate, dequantized, in_halves, route
from moec.targets.onnx.nodes import OPSET, Nodes

DOMAIN, FUNCTION = "moec", "FusedMoE"
RESULTS = ("y", "indices", "weights")


def input_names(form: MoeForm) -> list[str]:
    """The function's inputs, in order; weights of an expert e as `w13.e`, `w13.e.scales`, `w2.e`, `w2.e.scales`."""
    optional = ("router_bias", "selection_bias", "b13", "b2")
    names = ["x", "router_input", "router_weight", *(n for n in optional if n in form.present)]
    parts = ("", ".scales") if form.bits else ("",)
    if form.shared_width:
        names += [f"{w}{part}" for w in ("shared_w13", "shared_w2") for part in parts]
    if "shared_gate" in form.present:
        names.append("shared_gate")
    return names + [f"{w}.{e}{part}" for e in range(form.experts) for w in ("w13", "w2") for part in parts]


def moe_function(
    b: Nodes,
    form: MoeForm,
    inputs: list[str],
    results: tuple[str, str | None],
    overload: str,
    *opsets: OperatorSetIdProto,
) -> FunctionProto:
    """The function of `b`'s nodes over `inputs`; y is the sum of the `results` of routed and shared experts."""
    routed, shared = results
    if shared is None:
        b.op("Identity", routed, out="y")
    else:
        b.op("Add", routed, shared, out="y")
    return helper.make_function(
        DOMAIN,
        FUNCTION,
        inputs,
        list(RESULTS),
        b.nodes,
        [helper.make_opsetid("", OPSET), *opsets],
        attributes=list(form.attributes),
        overload=overload,
    )


def standard_function(form: MoeForm, overload: str, *, wide_scales: bool) -> FunctionProto:
    b = Nodes()
    route(b, form, indices="indices", weights="weights")
    routed = _routed(b, form, wide_scales)
    shared = _shared(b, form, wide_scales) if form.shared_width else None
    return moe_function(b, form, input_names(form), (routed, shared), overload)


def _matrix(b: Nodes, form: MoeForm, name: str, wide: bool) -> str:
    return dequantized(b, name, f"{name}.scales", form.group_size, wide=wide) if form.bits else name


def _routed(b: Nodes, form: MoeForm, wide: bool) -> str:
    """[N, D]. Rows are computed expert by expert, put back at slot n*K + k, and summed in rank order."""
    slots = b.reshape("indices", -1)
    slot_weights = b.reshape("weights", -1, 1)
    places, rows = [], []
    for e in range(form.experts):
        hit = b.op("NonZero", b.op("Equal", slots, b.scalar(e)))
        place = b.op("Squeeze", hit, b.ints(0))
        some = b.op("Greater", b.op("Size", place), b.scalar(0))
        then, other = b.subgraph(), b.subgraph()
        y = _expert(then, form, e, place, slot_weights, wide)
        none = other.op("Slice", "x", other.ints(0), other.ints(0))
        branches = {"then_branch": then.as_branch(f"expert_{e}", y), "else_branch": other.as_branch("none", none)}
        places.append(place)
        rows.append(b.op("If", some, **branches))
    shape = b.op("Concat", b.op("Shape", slots), b.ints(form.width), axis=0)
    target = b.op("Unsqueeze", b.op("Concat", *places, axis=0), b.ints(1))
    y = b.op("ScatterND", b.op("ConstantOfShape", shape), target, b.op("Concat", *rows, axis=0))
    if form.routing.apply == "output":
        y = b.op("Mul", y, slot_weights)
    return b.op("ReduceSum", b.reshape(y, -1, form.top_k, form.width), b.ints(1), keepdims=0)


def _expert(b: Nodes, form: MoeForm, e: int, place: str, slot_weights: str, wide: bool) -> str:
    """[n, D] of the n slots at `place`, which selected expert e."""
    x = b.op("Gather", "x", b.op("Div", place, b.scalar(form.top_k)))
    if form.routing.apply == "input":
        x = b.op("Mul", x, b.op("Gather", slot_weights, place))
    transposed = int(form.what.layout == "out_in")

    def product(value: str, weight: str, bias: str) -> str:
        c = [b.op("Gather", bias, b.scalar(e))] if bias in form.present else []
        return b.op("Gemm", value, _matrix(b, form, f"{weight}.{e}", wide), *c, transB=transposed)

    return product(activate(b, product(x, "w13", "b13"), form.what), "w2", "b2")


def _shared(b: Nodes, form: MoeForm, wide: bool) -> str:
    hidden = b.op("Gemm", "x", _matrix(b, form, "shared_w13", wide), transB=1)
    y = b.op("Gemm", activate(b, hidden, in_halves(form.what)), _matrix(b, form, "shared_w2", wide), transB=1)
    if "shared_gate" not in form.present:
        return y
    return b.op("Mul", b.op("Sigmoid", b.op("Gemm", "x", "shared_gate", transB=1)), y)
