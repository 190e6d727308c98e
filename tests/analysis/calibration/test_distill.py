"""Distilled scales: gradients stretch by stretch, what they gain on held-out text, and what must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moec.analysis.calibration import distill
from moec.analysis.calibration.calibrate import calibrate_weights
from moec.analysis.calibration.gradients import Gradients
from moec.analysis.calibration.streaming import LayerStream
from moec.analysis.verify.artifact import verify_artifact
from moec.checkpoints.synthesize import synthesize
from moec.compiler import build
from moec.compiler.errors import CompileError
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec
from tests.analysis.calibration.models import float_program, spec_of

QUIET = Progress(quiet=True)
DENSE = {"moe": None, "ffn_width": 96, "architecture": "mobilellm"}
TOKENS = torch.randint(0, 97, (48,), generator=torch.Generator().manual_seed(4)).tolist()  # two calls of at most 32


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEC_CALIBRATION_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(distill, "_BATCH", 64)  # of 2,048 tokens that there are
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def mixture() -> Program:
    return float_program()


@pytest.fixture(scope="module")
def dense() -> Program:
    return float_program(DENSE)


def spec(tokens: int = 2048, **quantization: Any) -> Spec:
    return spec_of(calibration={"tokens": tokens, "tokens_per_expert": 8}, embedding="int8", **quantization)


def calibrated(program: Program, tokens: int = 2048, **quantization: Any) -> Program:
    found = spec(tokens, **quantization).quantization
    assert found is not None

    def encode(_: Program) -> Any:
        return lambda text: [b % 97 for b in text.encode()]

    return run_passes(program, [calibrate_weights(found, encode, QUIET)])


@pytest.mark.parametrize("model", ["mixture", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_whole_program(
    model: str, dtype: torch.dtype, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one graph of autograd through all stretches, in float32. With float32 products they are the same sums but
    for their order: 1e-4 of the largest. Products of bfloat16 have 8 bits, as have the weights: cosine above 0.98.
    """
    monkeypatch.setattr(distill, "product_dtype", lambda: dtype)
    program: Program = request.getfixturevalue(model)
    stream = LayerStream(program, [TOKENS], result=True)
    work = Gradients(stream)
    calls = work.alone()
    assert [len(c.ids) for c in calls] == [32, 16]
    types = distill._types(program)
    assert {dtype, torch.float32} <= set(types.values())

    def loss(number: int, logits_TV: Tensor) -> Tensor:
        return functional.cross_entropy(logits_TV, torch.tensor(calls[number].ids), reduction="sum")

    def values(names: list[str], kinds: dict[str, torch.dtype]) -> dict[str, Tensor]:
        loaded = {n: program.weights[n].load().to(kinds[n]) for n in names}
        return {n: v.clone().requires_grad_() for n, v in loaded.items() if v.is_floating_point()}

    found: dict[str, Tensor] = {}

    def collect(stretch: Any, given: dict[str, Tensor]) -> None:
        for name, value in given.items():
            if value.grad is not None:
                found[name] = found.get(name, 0) + value.grad.float()

    total = work.backward(calls, lambda s: values(work.names(s), types), loss, collect)
    whole = values([n for s in work.stretches for n in work.names(s)], dict.fromkeys(program.weights, torch.float32))
    expected = 0.0
    for number, call in enumerate(calls):
        for stretch in work.stretches:
            call = work._run(stretch, call, whole)
        value = loss(number, work._result(call))
        expected += float(value.detach())
        value.backward()
    assert total == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 2e-2)
    assert set(found) == {n for n, v in whole.items() if v.grad is not None}
    assert len(found) > 10
    for name, grad in found.items():
        wanted = whole[name].grad
        assert wanted is not None
        if dtype is torch.float32:
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        else:
            assert float(functional.cosine_similarity(grad.flatten(), wanted.flatten(), 0)) > 0.98, name


def stored(program: Program) -> dict[str, Any]:
    return {n: w.stored.load() for n, w in program.weights.items() if w.stored is not None}


@pytest.mark.parametrize(("model", "axis"), [("mixture", "in"), pytest.param("mixture", "out", marks=pytest.mark.slow)])
def test_scales_alone_change(
    model: str, axis: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged on the text that they are fitted to: what random experts learn of so little text says nothing of other."""
    monkeypatch.setattr(distill, "_held_out", lambda calls: ([*range(len(calls))],) * 2)
    program: Program = request.getfixturevalue(model)
    first = stored(calibrated(program, method="awq_gptq", expert_group_axis=axis))
    done = calibrated(program, method="distilled", expert_group_axis=axis)
    after = stored(done)
    assert done.calibration is not None
    report = dict(done.calibration())
    assert report["method"] == "distilled"
    assert report["distilled"]["taken"]
    assert 0 < report["distilled"]["held_out"]["after"] < report["distilled"]["held_out"]["before"]
    assert set(after) == set(first)
    changed = 0
    for name, tensor in after.items():
        assert torch.equal(tensor.codes, first[name].codes)
        assert tensor.scales.dtype == torch.float16
        changed += not torch.equal(tensor.scales, first[name].scales)
        if tensor.bits == 8:
            assert torch.equal(tensor.scales, first[name].scales)
    assert changed == sum(t.bits == 4 for t in after.values()) > 4


def test_held_out_text_is_predicted_better(dense: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8,192 tokens it gains an eighth; of 2,048 between one and four in a hundred, by the processor's sums."""
    monkeypatch.setattr(distill, "_BATCH", 256)
    done = calibrated(dense, tokens=8192, method="distilled")
    assert done.calibration is not None
    report = dict(done.calibration())["distilled"]
    assert report["taken"]
    assert 0 < report["held_out"]["after"] < 0.97 * report["held_out"]["before"]


def test_what_does_not_help_is_not_taken(dense: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that breaks the model leaves the codes of the method it begins with."""
    monkeypatch.setattr(distill, "_RATE", 3.0)
    first = stored(calibrated(dense, method="awq_gptq"))
    done = calibrated(dense, method="distilled")
    for name, tensor in stored(done).items():
        assert torch.equal(tensor.codes, first[name].codes)
        assert torch.equal(tensor.scales, first[name].scales)
    assert done.calibration is not None
    report = dict(done.calibration())["distilled"]
    assert not report["taken"]
    assert report["held_out"]["after"] >= report["held_out"]["before"]


def test_the_method_it_begins_with_is_kept_beside_it(
    dense: Program, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are found by a later run with that method, and never written again."""
    stored(calibrated(dense, method="distilled"))
    assert len(list(cache.glob("*/calibration.json"))) == 2
    before = {f: f.read_bytes() for f in cache.glob("*/*")}
    monkeypatch.setattr("moec.analysis.calibration.calibrate.Engine", None)
    stored(calibrated(dense, method="awq_gptq"))
    stored(calibrated(dense, method="distilled"))
    assert {f: f.read_bytes() for f in cache.glob("*/*")} == before


def test_a_cache_that_layers_share_is_refused(dense: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerStream, "shared_state", lambda self: "model.layers.0.k_cache")
    with pytest.raises(CompileError, match="no gradient here"):
        Gradients(LayerStream(dense, [TOKENS], result=True))


def test_an_artifact_of_distilled_scales(tmp_path: Path) -> None:
    """Compiled and verified against the graph with the codes that the cache gives again."""
    found = spec(method="distilled")
    synthesize(found, tmp_path / "weights", seed=3)
    artifact = build.compile(found, checkpoint=tmp_path / "weights", out=tmp_path / "artifact")
    assert {entry.origin for entry in artifact.manifest.codes} == {"computed: distilled"}
    assert artifact.manifest.calibration is not None
    assert artifact.manifest.calibration["distilled"]["tokens"] > 0
    checked = verify_artifact(tmp_path / "artifact", tokens=64)
    assert checked.passed, checked.text()
