"""Comparing graphs: right rewrites pass, and every wrong one of a list is caught, where it was made."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

from moec.analysis.verify.graphs import Sample, compare_programs, compare_regions, pass_checks
from moec.analysis.verify.structure import structure_faults
from moec.compiler.program import Editor, LazyWeight, Program
from moec.compiler.source import NamedWeights
from moec.compiler.spec.model import Spec
from moec.passes.canonicalize import canonicalize
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.decoder import Decoder
from moec.sources.decoder.export import export_decoder

aten = torch.ops.aten
CONFIG = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 48, "heads": 3, "kv_heads": 1, "head_dim": 16,
    "vocab_size": 89, "context": 40, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 7, "top_k": 3, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip
SAMPLE = Sample("words", tuple(torch.randint(0, 89, (14,), generator=torch.Generator().manual_seed(3)).tolist()))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(11)
    spec = Spec.model_validate({"name": "t", "model": CONFIG, "quantization": "none"})
    assert isinstance(spec.model, DecoderConfig)
    weights = {}
    for name, parameter in Decoder(spec.model).named_parameters():
        value = torch.randn(parameter.shape) * 0.3
        weights[name] = LazyWeight(tuple(value.shape), torch.float32, lambda v=value: v)
    return canonicalize().run(export_decoder(spec.model, "t", NamedWeights(weights), max_tokens=16)).program


def _nodes(edit: Editor, target: object) -> list[Node]:
    return [n for n in edit.graph.nodes if n.target == target]


def _replace(edit: Editor, node: Node, target: Callable, *args: object) -> Node:
    with edit.graph.inserting_after(node):
        new = edit.graph.call_function(target, args)  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def _sigmoid_as_tanh(edit: Editor) -> None:
    """sigmoid(x) = (1 + tanh(x / 2)) / 2: the same function by other operators."""
    for node in _nodes(edit, aten.sigmoid.default):
        x = node.args[0]
        with edit.graph.inserting_after(node):
            half = edit.graph.call_function(aten.mul.Scalar, (x, 0.5))
        with edit.graph.inserting_after(half):
            tanh = edit.graph.call_function(aten.tanh.default, (half,))
        with edit.graph.inserting_after(tanh):
            shifted = edit.graph.call_function(aten.add.Scalar, (tanh, 1.0))
        for n in (half, tanh, shifted):
            n.meta = dict(node.meta)
        _replace(edit, shifted, aten.mul.Scalar, shifted, 0.5)
        last = shifted.next
        node.replace_all_uses_with(last)


def _swap_gate_and_up(edit: Editor) -> None:
    silu = _nodes(edit, aten.silu.default)[0]
    gate = silu.args[0]
    (product,) = silu.users
    up = next(a for a in product.args if a is not silu)
    new = _replace(edit, product, aten.mul.Tensor, silu, gate)
    silu.args = (up,)
    assert new.op == "call_function"


def _drop_selection_bias(edit: Editor) -> None:
    topk = _nodes(edit, aten.topk.default)[1]
    add = topk.args[0]
    assert isinstance(add, Node)
    assert add.target == aten.add.Tensor
    _replace(edit, add, aten.mul.Scalar, add.args[0], 1.0)


def _another_scale(edit: Editor) -> None:
    node = next(n for n in edit.graph.nodes if n.target in (aten.mul.Tensor, aten.mul.Scalar) and 2.5 in n.args)
    _replace(edit, node, node.target, node.args[0], 2.4)


def _smallest_instead_of_largest(edit: Editor) -> None:
    topk = _nodes(edit, aten.topk.default)[0]
    _replace(edit, topk, aten.topk.default, topk.args[0], topk.args[1], -1, False)


def _weights_from_biased_scores(edit: Editor) -> None:
    gather = _nodes(edit, aten.gather.default)[0]
    topk = next(a.args[0] for a in gather.args if isinstance(a, Node) and a.target is operator.getitem)
    _replace(edit, gather, aten.gather.default, topk.args[0], *gather.args[1:])


def _float16_router(edit: Editor) -> None:
    node = _nodes(edit, aten.sigmoid.default)[0]
    with edit.graph.inserting_before(node):
        half = edit.graph.call_function(aten.to.dtype, (node.args[0], torch.float16))
    half.meta = dict(node.meta)
    with edit.graph.inserting_after(half):
        back = edit.graph.call_function(aten.to.dtype, (half, torch.float32))
    back.meta = dict(node.meta)
    _replace(edit, node, aten.sigmoid.default, back)


def _another_eps(edit: Editor) -> None:
    node = next(n for n in edit.graph.nodes if n.target == aten.rms_norm.default)
    _replace(edit, node, aten.rms_norm.default, *node.args[:-1], 1e-3)


def _rewritten(program: Program, rewrite: Callable[[Editor], None]) -> Program:
    edit = program.edit()
    rewrite(edit)
    return edit.done()


def test_a_right_rewrite_passes(program):
    after = _rewritten(program, _sigmoid_as_tanh)
    checks = pass_checks("tanh", program, after, 2, [SAMPLE])
    assert all(c.passed for c in checks), [c.line() for c in checks]
    assert len(compare_regions(program, after, SAMPLE)) >= 2, "both layers must have been compared on their own"


WRONG = [
    _swap_gate_and_up,
    _drop_selection_bias,
    _another_scale,
    _smallest_instead_of_largest,
    _weights_from_biased_scores,
    _float16_router,
    _another_eps,
]


@pytest.mark.parametrize("rewrite", WRONG, ids=lambda f: f.__name__.strip("_"))
def test_a_wrong_rewrite_is_caught(program, rewrite):
    after = _rewritten(program, rewrite)
    (comparison,) = compare_programs(program, after, [SAMPLE])
    assert comparison.ratio > 3, "far beyond the tolerance, not by a hair"
    assert not all(c.passed for c in pass_checks("wrong", program, after, 1, [SAMPLE]))


@pytest.mark.parametrize(
    ("rewrite", "layer"), [(_drop_selection_bias, 1), (_another_scale, 0), (_smallest_instead_of_largest, 0)]
)
def test_the_wrong_layer_is_named(program, rewrite, layer):
    regions = compare_regions(program, _rewritten(program, rewrite), SAMPLE)
    worst = max(regions, key=lambda r: r.ratio)
    assert worst.ratio > 1
    assert f"model.layers.{layer}.feed_forward" in worst.where


def test_an_error_is_not_blamed_on_later_layers(program):
    def both(edit: Editor) -> None:
        _another_scale(edit)  # layer 0, wrong
        _sigmoid_as_tanh(edit)  # both layers, right

    regions = compare_regions(program, _rewritten(program, both), SAMPLE)
    assert {r.where.split(".")[2] for r in regions if r.ratio > 1} == {"0"}
    assert any(r.ratio <= 1 and r.where.startswith("model.layers.1") for r in regions)


def test_structure_sees_what_numbers_cannot(program):
    assert structure_faults(program, program, 0) == []
    assert "reports 1 changes" in structure_faults(program, program, 1)[0]
    changed = _rewritten(program, _sigmoid_as_tanh)
    assert "reports no change" in structure_faults(program, changed, 0)[0]


def test_a_lost_weight_is_named(program):
    def without_bias(edit: Editor) -> None:
        _drop_selection_bias(edit)

    faults = structure_faults(program, _rewritten(program, without_bias), 1)
    assert any("router weights" in f for f in faults), faults


def test_a_weight_read_twice_is_named(program):
    def twice(edit: Editor) -> None:
        node = _nodes(edit, aten.sigmoid.default)[0]
        linear = node.args[0]
        assert isinstance(linear, Node)
        _replace(edit, node, aten.sigmoid.default, linear)
        with edit.graph.inserting_after(linear):
            again = edit.graph.call_function(linear.target, linear.args)
        again.meta = dict(linear.meta)
        linear.replace_all_uses_with(again)
        with edit.graph.inserting_after(again):
            both = edit.graph.call_function(aten.maximum.default, (linear, again))
        both.meta = dict(linear.meta)
        again.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)

    faults = structure_faults(program, _rewritten(program, twice), 1)
    assert any("router.weight is read by 2 nodes" in f for f in faults), faults


def test_a_shape_that_the_graph_declares_wrongly_is_named(program):
    def lie(edit: Editor) -> None:
        node = _nodes(edit, aten.sigmoid.default)[0]
        new = _replace(edit, node, aten.sigmoid.default, node.args[0])
        new.meta["val"] = new.meta["val"].to(torch.float16)

    after = _rewritten(program, lie)
    (comparison,) = compare_programs(program, after, [SAMPLE])
    assert any("declares torch.float16" in f for f in comparison.faults), comparison.faults


def test_sample_calls_cover_the_ids():
    for n in range(1, 12):
        ids = tuple(range(n))
        calls = Sample("s", ids).calls()
        assert [i for _, part in calls for i in part] == list(ids)
        assert [start for start, _ in calls] == [part[0] for _, part in calls]
