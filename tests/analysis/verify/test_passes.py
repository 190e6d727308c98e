"""A pipeline checked pass by pass, and the culprit found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moec.analysis.verify.graphs import Sample
from moec.analysis.verify.passes import bisect_passes, verify_passes
from moec.analysis.verify.weights import adversarial_weights
from moec.compiler.errors import UserError
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, Program, Stage
from moec.compiler.source import NamedWeights
from moec.compiler.spec.model import Spec
from moec.passes.canonicalize import canonicalize
from moec.passes.fuse_rms_norm import fuse_rms_norm
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.export import export_decoder
from moec.sources.decoder.layout import weight_layout
from tests.analysis.verify.fakes import CONFIG

aten = torch.ops.aten
SAMPLES = [Sample("words", (3, 14, 15, 92, 6, 5, 35, 89, 79, 3, 23)), Sample("same", (8,) * 9)]


@pytest.fixture(scope="module")
def program() -> Program:
    spec = Spec.model_validate({"name": "t", "model": CONFIG, "quantization": "none"})
    assert isinstance(spec.model, DecoderConfig)
    layout = weight_layout(spec.model)
    weights = adversarial_weights({n: i.shape for n, i in layout.items()}, {n: i.role for n, i in layout.items()})
    return export_decoder(spec.model, "t", NamedWeights(weights), max_tokens=16)


def _pass(name: str, rewrite: Callable[[Editor], int]) -> Pass:
    def run(program: Program) -> PassResult:
        edit = program.edit()
        changed = rewrite(edit)
        return PassResult(edit.done(), changed)

    return Pass(name, run, Stage.CANONICAL, Stage.CANONICAL)


def _halve_second_silu(edit: Editor) -> int:
    """Wrong in one layer: silu(x) / 2 in the second routed block."""
    node = [n for n in edit.graph.nodes if n.target == aten.silu.default][2]
    with edit.graph.inserting_after(node):
        half = edit.graph.call_function(aten.mul.Scalar, (node, 0.5))
    half.meta = dict(node.meta)
    node.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)
    return 1


def _nothing(edit: Editor) -> int:
    return 0


def test_right_passes_are_reported_one_by_one(program):
    report = verify_passes(program, [canonicalize(), fuse_rms_norm(), _pass("nothing", _nothing)], SAMPLES)
    assert report.exit_status == 0, report.text()
    names = [c.name for c in report.checks]
    assert "canonicalize: end to end" in names
    assert "fuse_rms_norm: each rewrite alone" in names
    assert [n for n in names if n.startswith("nothing")] == ["nothing: structure"]
    assert report.figures["nothing"].startswith("0 changed")


def test_only_one_pass_can_be_asked_for(program):
    report = verify_passes(program, [canonicalize(), fuse_rms_norm()], SAMPLES, only="fuse_rms_norm")
    assert {c.name.split(":")[0] for c in report.checks} == {"fuse_rms_norm"}
    with pytest.raises(UserError, match="no pass 'fuse'; name one of canonicalize"):
        verify_passes(program, [canonicalize()], SAMPLES, only="fuse")


def test_a_wrong_pass_fails_and_is_found(program):
    passes = [canonicalize(), fuse_rms_norm(), _pass("halve", _halve_second_silu), _pass("nothing", _nothing)]
    report = verify_passes(program, passes, SAMPLES)
    assert report.exit_status == 1
    assert {c.name for c in report.failures} == {"halve: end to end", "halve: each rewrite alone"}
    found = bisect_passes(program, passes, SAMPLES)
    assert found.culprit == "halve"
    assert found.passes == ("canonicalize", "fuse_rms_norm", "halve")
    assert found.region is not None
    assert found.region.where.startswith("model.layers.1.feed_forward")
    assert "model.layers.1.feed_forward" in found.text()
    assert found.to_json()["culprit"] == "halve"


def test_no_culprit(program):
    found = bisect_passes(program, [canonicalize(), fuse_rms_norm()], SAMPLES)
    assert found.culprit is None
    assert "all 2 passes keep" in found.text()
