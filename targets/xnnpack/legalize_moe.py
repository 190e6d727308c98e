"""fused_moe, fused_moe_q  ->  moec::fused_moe_packed: the weights in the kernel's layout, its table of attributes.

Float experts stored [E, in, out] are transposed while packing; quantized codes are carried bit for bit, whichever
dimension their groups lie along.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from moec.compiler.ops import Experts, Routing, fused_moe, fused_moe_q
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Stage
from moec.runtime.moe_config import MoeConfig, WeightFormat
from moec.targets.xnnpack.cpu_ops import fused_moe_packed
from moec.targets.xnnpack.packed import Source, float_source, pack_into, quantized_source


def pack_moe() -> Pass:
    """`fused_moe`, `fused_moe_q` -> `fused_moe_packed`: weights as the blobs that the kernel reads."""
    return Pass("pack_moe", _run, needs=Stage.FUSED, gives=Stage.FUSED)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    nodes = [n for n in edit.graph.nodes if n.op == "call_function" and n.target in (fused_moe, fused_moe_q)]
    for node in nodes:
        _rewrite(edit, node)
    return PassResult(edit.done(), len(nodes)) if nodes else PassResult(program, 0)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by the names of its operator's schema, defaults left out."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _rewrite(edit: Editor, node: Node) -> None:
    given = arguments(node)
    how, what = Routing.parse(given["routing"]), Experts.parse(given["experts"])
    in_out = what.layout == "in_out"
    sources = _float_sources(given) if node.target is fused_moe else _quantized_sources(given, in_out)
    experts, d_model = (int(s) for s in given["router_weight"].meta["val"].shape)
    width = _width(given, what)
    halves = 2 if what.gated else 1
    transposed = in_out and node.target is fused_moe

    def blob(name: str, count: int, n: int, k: int, *, turned: bool = False) -> Node | None:
        source = sources.get(name)
        return None if source is None else pack_into(edit, [source], count=count, n=n, k=k, transposed=turned)

    shared_width = _shared_width(given)
    w13 = blob("w13", experts, halves * width, d_model, turned=transposed)
    w2 = blob("w2", experts, d_model, width, turned=transposed)
    shared_w13 = blob("shared_w13", 1, halves * shared_width, d_model)
    shared_w2 = blob("shared_w2", 1, d_model, shared_width)

    def fmt(name: str) -> WeightFormat:
        return sources[name].format if name in sources else WeightFormat()

    config, params = MoeConfig(
        experts=experts,
        d_model=d_model,
        expert_width=width,
        top_k=given["top_k"],
        how=how,
        what=what,
        w13=fmt("w13"),
        w2=fmt("w2"),
        shared_width=shared_width,
        shared_w13=fmt("shared_w13"),
        shared_w2=fmt("shared_w2"),
    ).encode()
    with edit.graph.inserting_before(node):
        packed = edit.call(
            fused_moe_packed,
            *(given[name] for name in ("x", "router_input", "router_weight", "router_bias", "selection_bias")),
            w13,
            given["b13"],
            w2,
            given["b2"],
            shared_w13,
            shared_w2,
            given["shared_gate"],
            config,
            params,
            like=node,
        )
    node.replace_all_uses_with(packed)
    edit.graph.erase_node(node)


def _float_sources(given: dict[str, Any]) -> dict[str, Source]:
    names = ("w13", "w2", "shared_w13", "shared_w2")
    return {name: float_source(given[name]) for name in names if given[name] is not None}


def _quantized_sources(given: dict[str, Any], in_out: bool) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for name in ("w13", "w2", "shared_w13", "shared_w2"):
        if given[f"{name}_codes"] is not None:
            found[name] = quantized_source(
                given[f"{name}_codes"],
                given[f"{name}_scales"],
                bits=given["bits"],
                group_size=given["group_size"],
                int8_activations=given["int8_activations"],
                axis_out=in_out and not name.startswith("shared"),  # shared weights are always [out, in]
            )
    return found


def _width(given: dict[str, Any], what: Experts) -> int:
    """F, from a down projection: [E, D, F] (out_in) or [E, F, D] (in_out), codes packed along the last dimension."""
    weight = given.get("w2", given.get("w2_codes"))
    shape = weight.meta["val"].shape  # type: ignore[union-attr]
    if what.layout == "in_out":
        return int(shape[1])
    return int(shape[2]) * (2 if given.get("bits") == 4 else 1)


def _shared_width(given: dict[str, Any]) -> int:
    weight = given.get("shared_w2", given.get("shared_w2_codes"))
    if weight is None:
        return 0
    return int(weight.meta["val"].shape[1]) * (2 if given.get("bits") == 4 else 1)
