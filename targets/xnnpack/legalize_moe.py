"""fused_moe, fused_moe_q  ->  moec::fused_moe_packed: the weights in the kernel's layout, its table of attributes.

Float experts stored [E, in, out] are transposed while packing; quantized codes are carried bit for bit, whichever
dimension their groups lie along.
"""

from __future__ import annotations

from torch.fx import Node

from moec.compiler.ops import FusedMoe, FusedMoeQ, RoutedMoe
from moec.compiler.ops.moe_call import WEIGHTS
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Stage
from moec.runtime.moe_config import MoeConfig, WeightFormat
from moec.targets.xnnpack.cpu_ops import FusedMoePacked
from moec.targets.xnnpack.packed import Source, float_source, pack_into, quantized_source


def pack_moe() -> Pass:
    """`fused_moe`, `fused_moe_q` -> `fused_moe_packed`: weights as the blobs that the kernel reads."""
    return Pass("pack_moe", _run, needs=Stage.FUSED, gives=Stage.FUSED)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    nodes = [n for n in edit.graph.nodes if RoutedMoe.find(n) is not None]
    for node in nodes:
        _rewrite(edit, node)
    return PassResult(edit.done(), len(nodes)) if nodes else PassResult(program, 0)


def _rewrite(edit: Editor, node: Node) -> None:
    moe = RoutedMoe[Node].of(node)
    sizes, mlp = moe.sizes, moe.mlp
    transposed = mlp.layout == "in_out" and isinstance(moe, FusedMoe)
    sources = {name: source for name in WEIGHTS if (source := _source(moe, name)) is not None}
    halves = 2 if mlp.gated else 1

    def blob(name: str, count: int, n: int, k: int, *, transposed: bool = False) -> Node:
        return pack_into(edit, [sources[name]], count=count, n=n, k=k, transposed=transposed)

    def fmt(name: str) -> WeightFormat:
        return sources[name].format if name in sources else WeightFormat()

    w13 = blob("w13", sizes.experts, halves * sizes.expert_width, sizes.d_model, transposed=transposed)
    w2 = blob("w2", sizes.experts, sizes.d_model, sizes.expert_width, transposed=transposed)
    shared_w13 = shared_w2 = None
    if moe.has_shared:
        shared_w13 = blob("shared_w13", 1, halves * sizes.shared_width, sizes.d_model)
        shared_w2 = blob("shared_w2", 1, sizes.d_model, sizes.shared_width)
    config, params = MoeConfig(
        experts=sizes.experts,
        d_model=sizes.d_model,
        expert_width=sizes.expert_width,
        top_k=moe.top_k,
        how=moe.selection,
        what=mlp,
        w13=fmt("w13"),
        w2=fmt("w2"),
        shared_width=sizes.shared_width,
        shared_w13=fmt("shared_w13"),
        shared_w2=fmt("shared_w2"),
    ).encode()
    packed = FusedMoePacked(
        x=moe.x,
        router_input=moe.router_input,
        router_weight=moe.router_weight,
        router_bias=moe.router_bias,
        selection_bias=moe.selection_bias,
        w13=w13,
        b13=moe.b13,
        w2=w2,
        b2=moe.b2,
        shared_w13=shared_w13,
        shared_w2=shared_w2,
        shared_gate=moe.shared_gate,
        config=config,
        params=params,
    )
    with edit.graph.inserting_before(node):
        new = edit.emit(packed, like=node)
    node.replace_all_uses_with(new)
    edit.graph.erase_node(node)


def _source(moe: RoutedMoe[Node], name: str) -> Source | None:
    """One of `WEIGHTS` as the kernel reads it; None if the block has none of that name."""
    if isinstance(moe, FusedMoeQ):
        weight = moe.weight(name)
        if weight is None:
            return None
        return quantized_source(
            *weight,
            bits=moe.bits,
            group_size=moe.group_size,
            int8_activations=moe.int8_activations,
            activation_block=moe.activation_block,
            axis_out=moe.mlp.layout == "in_out" and not name.startswith("shared"),  # shared weights are [out, in]
            levels=moe.levels,
        )
    assert isinstance(moe, FusedMoe)
    plain = moe.weight(name)
    return None if plain is None else float_source(plain)
