"""Typed calls: the signature that a class makes, and what a node gives back by name."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

import moec.targets.xnnpack.cpu_ops
from moec.compiler import ops
from moec.compiler.ops.call import Call, V, Written, find_call, signature
from tests.harness import run
from tests.passes.moe_zoo import program

# as they stand in artifacts that were written: a .pte names an operator and passes its arguments by position
SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor? weight, float eps) -> Tensor",
    "rope": "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    "linear_q": "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int bits, int group_size, "
    'bool int8_activations, int activation_block=0, str levels="") -> Tensor',
    "embedding_q": '(Tensor ids, Tensor codes, Tensor scales, int bits, int group_size, str levels="") -> Tensor',
    "cached_attention": "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor start_pos, "
    "float scale, int window, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, Tensor? sinks=None, "
    "float softcap=0.0) -> Tensor",
    "fused_moe": "(Tensor x, Tensor router_input, Tensor router_weight, Tensor? router_bias, Tensor? selection_bias, "
    "Tensor w13, Tensor? b13, Tensor w2, Tensor? b2, Tensor? shared_w13, Tensor? shared_w2, Tensor? shared_gate, "
    "int top_k, str routing, str experts) -> Tensor",
    "fused_moe_q": "(Tensor x, Tensor router_input, Tensor router_weight, Tensor? router_bias, "
    "Tensor? selection_bias, Tensor w13_codes, Tensor w13_scales, Tensor? b13, Tensor w2_codes, Tensor w2_scales, "
    "Tensor? b2, Tensor? shared_w13_codes, Tensor? shared_w13_scales, Tensor? shared_w2_codes, "
    "Tensor? shared_w2_scales, Tensor? shared_gate, int top_k, str routing, str experts, int bits, int group_size, "
    'bool int8_activations, int activation_block=0, str levels="") -> Tensor',
    "short_conv": "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, Tensor start_pos, bool silu) -> Tensor",
    "gated_delta": "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor(a!) state, Tensor start_pos, "
    "float scale, float eps) -> Tensor",
    "selective_scan": "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor(a!) state, "
    "Tensor start_pos) -> Tensor",
    "head_linear": "(Tensor x, Tensor weight, Tensor? scales, int heads, int begin, int end, bool transposed, "
    'int bits=0, int group_size=0, bool int8_activations=False, int activation_block=0, str levels="") -> Tensor',
    "latent_attention": "(Tensor q, Tensor q_rope, Tensor latents, Tensor rope, Tensor(a!) latent_cache, "
    "Tensor(b!) rope_cache, Tensor start_pos, float scale, int window, Tensor(c!)? latent_scale=None, "
    "Tensor(d!)? rope_scale=None) -> Tensor",
    "head_linear_packed": "(Tensor x, Tensor w, int heads, int n, int k, int format) -> Tensor",
    "linear_packed": "(Tensor x, Tensor w, Tensor? bias, int n, int k, int format) -> Tensor",
    "gated_linear_packed": "(Tensor x, Tensor w, int f, int k, int format, int activation) -> Tensor",
    "embedding_packed": "(Tensor ids, Tensor w, int n, int k, int format) -> Tensor",
    "fused_moe_packed": "(Tensor x, Tensor router_input, Tensor router_weight, Tensor? router_bias, "
    "Tensor? selection_bias, Tensor w13, Tensor? b13, Tensor w2, Tensor? b2, Tensor? shared_w13, "
    "Tensor? shared_w2, Tensor? shared_gate, int[] config, float[] params) -> Tensor",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_that_of_artifacts_already_written(name: str) -> None:
    assert moec.targets.xnnpack.cpu_ops.OUT_FORMS
    expected = torch._C.parse_schema(f"moec::{name}{SCHEMAS[name]}")
    assert str(getattr(torch.ops.moec, name).default._schema) == str(expected)


@dataclass(frozen=True)
class Odd(Call[V]):
    x: V
    state: Written[V]
    more: Written[V] | None
    sizes: list[int]
    limit: float | None

    def eager(self) -> V:
        return self.x

    def fake(self) -> V:
        return self.x


def test_an_operator_without_a_reference_cannot_be_made() -> None:
    @dataclass(frozen=True)
    class Bare(Call[V]):
        x: V

    with pytest.raises(TypeError, match=r"abstract.*eager.*fake"):
        Bare("x")  # type: ignore[abstract]


def test_a_signature_is_made_of_the_fields() -> None:
    assert signature(Odd) == "Tensor x, Tensor(a!) state, Tensor(b!)? more, int[] sizes, float? limit"
    assert signature(Odd, in_place=False) == "Tensor x, Tensor state, Tensor? more, int[] sizes, float? limit"


def test_operands_attributes_and_states_are_told_apart() -> None:
    call: Odd[str] = Odd("x", "s", None, [1], None)
    assert [(p.name, value) for p, value in call.operands()] == [("x", "x"), ("state", "s")]
    assert call.written() == {"state": "s"}
    assert call.map(str.upper) == Odd("X", "S", None, [1], None)
    assert call.arguments() == ("x", "s", None, [1], None)


def test_a_node_reads_by_name_and_only_as_what_it_is() -> None:
    from moec.passes.fuse_moe import fuse_moe

    fused = run(fuse_moe(), program()).program
    node = next(n for n in fused.graph.nodes if n.target is ops.fused_moe)
    moe = ops.FusedMoe.of(node)
    assert [getattr(moe, f.name) for f in fields(moe)] == list(node.args)
    assert type(find_call(node)) is ops.FusedMoe
    assert ops.MoeCall.find(node) is not None
    assert ops.RoutedMoe.find(node) is not None
    assert ops.LinearQ.find(node) is None
    with pytest.raises(AssertionError, match="no LinearQ"):
        ops.LinearQ.of(node)
    others = [n for n in fused.graph.nodes if n is not node]
    assert not any(ops.MoeCall.find(n) for n in others)
    assert f"router_weight=@{fused.weight_of(moe.router_weight)}" in fused.text()
    assert "router_bias" not in fused.text(), "absent operands are left out"


def test_the_digest_does_not_depend_on_how_operands_are_printed() -> None:
    from moec.compiler.program import program_text

    before = program()
    assert program_text(before, names=False) == program_text(before), "no operator of ours: nothing to name"


def test_sizes_are_read_through_every_layout() -> None:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    for layout in ("out_in", "in_out"):
        turn = (lambda t: t.transpose(1, 2).contiguous()) if layout == "in_out" else (lambda t: t)
        for shared in (0, 7):
            x = draw(3, 4)
            moe = ops.FusedMoe(
                x, x, draw(6, 4), None, None, turn(draw(6, 10, 4)), None, turn(draw(6, 4, 5)), None,
                draw(2 * shared, 4) if shared else None, draw(4, shared) if shared else None, None, 2, "",
                str(ops.Experts(layout=layout)),
            )  # fmt: skip
            assert moe.sizes == ops.MoeSizes(experts=6, d_model=4, expert_width=5, shared_width=shared)
            assert moe.eager().shape == (3, 4)
