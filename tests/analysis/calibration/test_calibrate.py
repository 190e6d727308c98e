"""Calibration of a whole model: every expert seen, scaling that is exact, codes that are found again, faults."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moec.analysis.calibration import results
from moec.analysis.calibration.balance import links_of
from moec.analysis.calibration.calibrate import CANDIDATES, _Calibrated, calibrate_weights
from moec.analysis.verify.artifact import verify_artifact
from moec.analysis.verify.interpret import GraphRunner
from moec.analysis.verify.rounding import with_weights_of
from moec.checkpoints.synthesize import synthesize
from moec.compiler import build
from moec.compiler.errors import CompileError, SpecError, UserError
from moec.compiler.pipeline import run_passes
from moec.compiler.program import LazyWeight, Program, Role
from moec.compiler.progress import Progress
from moec.compiler.quantizer import find_quantizer
from moec.compiler.spec import Spec, parse_spec
from moec.compiler.spec.quantization import Calibration, WeightScheme
from moec.compiler.weights import CodeFormat, StoredCodes
from moec.passes.quantize_weights import quantize_weights, reads
from tests.analysis.calibration.models import float_program, spec_of

QUIET = Progress(quiet=True)
IDS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(9)).tolist()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEC_CALIBRATION_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def program() -> Program:
    return float_program()


def spec(**quantization: Any) -> Spec:
    given = quantization.pop("calibration", {})
    return spec_of(calibration={"tokens": 160, "tokens_per_expert": 8, **given}, **quantization)


def calibrated(program: Program, **quantization: Any) -> Program:
    found = spec(**quantization).quantization
    assert found is not None

    def encode(_: Program) -> Any:
        return lambda text: [b % 97 for b in text.encode()]

    return run_passes(program, [calibrate_weights(found, encode, QUIET)])


def logits(program: Program) -> Tensor:
    runner = GraphRunner(program)
    longest = program.info.max_tokens
    return torch.cat([runner(IDS[s : s + longest], s) for s in range(0, len(IDS), longest)])


MODELS = {
    "mixture": {},
    "dense": {"moe": None, "ffn_width": 96},
    "no-shared": {"moe": {**spec_of().model.model_dump()["moe"], "shared_width": 0}},  # type: ignore[union-attr]
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("axis", ["in", "out"])
def test_scaled_channels_change_nothing(model: dict[str, Any], axis: str) -> None:
    """The float weights of a calibrated program give the float model: factors are fp32, sums of the same terms.

    atol 1e-4, rtol 1e-4 on logits of order one: each weight is multiplied and divided once, 2^-23 each.
    """
    plain = float_program({k: v for k, v in model.items() if v is not None} | _dense(model))
    done = calibrated(plain, method="awq_gptq", expert_group_axis=axis)
    scaled = dict(done.calibration())["scaled"] if done.calibration else {}  # type: ignore[arg-type]
    assert scaled["norm"]["scaled"] > 0
    assert scaled["v"]["pairs"] == 2
    changed = [n for n in plain.weights if not torch.equal(plain.weights[n].load(), done.weights[n].load())]
    assert any("layernorm" in n for n in changed)
    torch.testing.assert_close(logits(done), logits(plain), atol=1e-4, rtol=1e-4)


def _dense(model: dict[str, Any]) -> dict[str, Any]:
    return {"moe": None, "architecture": "mobilellm"} if "ffn_width" in model else {}


def test_channels_of_experts_that_stay_in_float(program: Program) -> None:
    # w13 [E, K, N] is square here: factors on the wrong axis would be a wrong model and no error
    quantization = spec(method="awq", experts="fp32").quantization
    assert quantization is not None
    name = next(
        n for n, role in program.roles.items() if role == Role.EXPERT and program.weights[n].shape[1:] == (64, 64)
    )
    assert not any(read.name == name for read in reads(program, quantization))
    work = _Calibrated(program, quantization, lambda _: lambda _: [], QUIET)
    columns_K = torch.rand(64) + 0.5
    work.__dict__["_results"] = SimpleNamespace(factors=lambda _: (None, columns_K))
    assert torch.equal(work.scaled(name).load(), program.weights[name].load() * columns_K[:, None])


def test_every_kind_of_pair_is_found() -> None:
    dense = float_program({**MODELS["dense"], **_dense(MODELS["dense"])})
    kinds = [link.kind for link in links_of(dense)]
    assert (kinds.count("norm"), kinds.count("v"), kinds.count("up")) == (4, 2, 2)
    # the final norm feeds the head, whose table is the embedding too: it must not be scaled
    assert "model.norm.weight" not in {n for link in links_of(dense) for n in link.outs}


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("method", ["weighted", "gptq", "awq_gptq"])
def test_codes_are_nearer_than_by_rounding(program: Program, axis: str, method: str) -> None:
    """The quantized program with calibrated codes beside the float one, without rounding of activations and cache."""
    plain = {"expert_group_axis": axis, "activations": "fp32", "kv_cache": "fp32"}
    reference = logits(program)
    errors = []
    for name in ("rtn", method):
        found = spec(method=name, **plain).quantization
        assert found is not None
        given = program if name == "rtn" else calibrated(program, method=name, **plain)
        done = run_passes(given, [quantize_weights(found)])
        errors.append(float((logits(done) - reference).square().mean()))
        assert {str(h.provenance) for h in done.quantized.values()} == {f"computed: {name}"}
    assert errors[1] < errors[0]


def test_experts_have_inputs_of_their_own(program: Program) -> None:
    """The codes of one expert are those of its own tokens, routed by the model itself."""
    done = calibrated(program, method="gptq")
    assert done.calibration is not None
    report = dict(done.calibration())
    layer = report["moe"][0]
    assert [e["tokens"] for e in layer["experts"]] != [layer["experts"][0]["tokens"]] * 6
    assert sum(e["tokens"] for e in layer["experts"]) == 2 * report["tokens"], "k = 2 experts for each token"
    assert all(e["tokens"] + e["forced"] >= 8 for e in layer["experts"])
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    stored = done.weights[name].stored
    assert stored is not None
    tensor = stored.load()
    alone = find_quantizer("search").quantize(program.weights[name].load()[0], WeightScheme(4, 32, "out"), None)
    assert tensor.shape == (6, 64, 64)
    assert torch.equal(tensor.scales[0], alone.scales), "scales along the outputs are those of a plain search"
    assert not torch.equal(tensor.codes[0], alone.codes), "and codes have error feedback"


def test_an_expert_that_nobody_chooses_is_shown_tokens(program: Program) -> None:
    """Routing is overridden for its statistics, counted, and nowhere else."""
    name = "model.layers.0.feed_forward.expert_bias"

    def load() -> Tensor:
        bias = program.weights[name].load().clone()
        bias[3] = -100.0
        return bias

    lonely = replace(program, weights={**program.weights, name: LazyWeight((6,), torch.float32, load)})
    done = calibrated(lonely, method="gptq")
    assert done.calibration is not None
    experts = dict(done.calibration())["moe"][0]["experts"]
    assert experts[3] == {"tokens": 0, "forced": 8}
    assert sum(e["tokens"] for e in experts) == 2 * 160


def test_an_uncalibrated_expert_is_an_error_unless_named(program: Program) -> None:
    few = {"tokens": 10, "tokens_per_expert": 16}
    with pytest.raises(CompileError, match=r"layers\.0\.feed_forward: expert 0 saw 10 tokens .* 16 are needed"):
        calibrated(program, method="gptq", calibration=few).calibration()  # type: ignore[misc]
    every = [f"model.layers.{i}.feed_forward" for i in range(2)]
    done = calibrated(program, method="gptq", calibration={**few, "uncalibrated": every})
    assert done.calibration is not None
    assert dict(done.calibration())["tokens"] == 10
    with pytest.raises(CompileError, match="16 are needed"):  # results of a run that allowed it are not found here
        calibrated(program, method="gptq", calibration=few).calibration()  # type: ignore[misc]


def test_auto_takes_the_method_of_least_divergence(program: Program) -> None:
    done = calibrated(program, method="auto")
    assert done.calibration is not None
    report = dict(done.calibration())
    assert set(report["measured"]) == set(CANDIDATES)
    assert report["method"] == min(report["measured"], key=report["measured"].__getitem__)
    assert min(report["measured"].values()) < report["measured"]["rtn"]


def test_auto_takes_no_method_that_gives_no_number(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict.fromkeys(CANDIDATES, math.nan)
    monkeypatch.setattr(_Calibrated, "_measured", lambda *_: dict(found))
    with pytest.raises(CompileError, match="no method's divergence from the float model is finite"):
        calibrated(program, method="auto").calibration()  # type: ignore[misc]
    found |= {"gptq": math.inf, "weighted": 0.5, "awq": 0.25}  # the first is NaN, which is not less and not more
    assert dict(calibrated(program, method="auto").calibration())["method"] == "awq"  # type: ignore[misc]


def test_results_are_found_again_and_only_for_the_same_weights(program: Program, cache: Path) -> None:
    first = calibrated(program, method="weighted").weights["model.layers.0.self_attn.q_proj.weight"].stored
    assert first is not None
    codes = first.load().codes
    made = {f: f.stat().st_mtime_ns for f in cache.glob("*/calibration.json")}
    again = calibrated(program, method="weighted").weights["model.layers.0.self_attn.q_proj.weight"].stored
    assert again is not None
    assert torch.equal(again.load().codes, codes)
    assert {f: f.stat().st_mtime_ns for f in cache.glob("*/calibration.json")} == made
    other = calibrated(float_program(seed=1), method="weighted")
    assert other.calibration is not None
    other.calibration()
    assert len(list(cache.glob("*/calibration.json"))) == 2


def test_damaged_results_are_computed_anew(program: Program, cache: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = calibrated(program, method="weighted").weights[name].stored
    assert stored is not None
    stored.load()
    (index,) = cache.glob("*/calibration.json")
    index.write_text("{")
    assert results.find(index.parent.name) is None


def test_stored_codes_are_never_touched(program: Program) -> None:
    """A weight with codes of its own keeps them, and nothing that it is multiplied with is scaled."""
    name = "model.layers.0.self_attn.q_proj.weight"
    w = program.weights[name]
    tensor = find_quantizer("rtn").quantize(w.load(), WeightScheme(4, 32), None)
    held = replace(w, stored=StoredCodes(CodeFormat(4, 32), lambda: tensor))
    done = calibrated(replace(program, weights={**program.weights, name: held}), method="awq_gptq")
    stored = done.weights[name].stored
    assert stored is held.stored
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(done.weights[norm].load(), program.weights[norm].load())
    other = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(done.weights[other].load(), program.weights[other].load())


def test_nothing_is_read_before_a_weight_is(program: Program) -> None:
    def never() -> Tensor:
        raise AssertionError("a pass read a weight")

    unread = {n: replace(w, load=never) for n, w in program.weights.items()}
    done = calibrated(replace(program, weights=unread), method="auto")
    found = spec(method="auto").quantization
    assert found is not None
    run_passes(done, [quantize_weights(found)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{domains: [poems]}", "no shipped text of domain 'poems'; known: code"),
        ("{text: /nowhere/a.txt}", "cannot be read"),
        ("{jsonl: a.txt}", "not a file of JSON lines"),
    ],
)
def test_text_that_is_not_there(program: Program, given: str, message: str) -> None:
    done = calibrated(program, method="weighted", calibration=yaml.safe_load(given))
    with pytest.raises(UserError, match=message):
        done.calibration()  # type: ignore[misc]


def test_text_of_a_spec_lies_beside_it(tmp_path: Path) -> None:
    raw = spec().model_dump(mode="json", exclude_none=True)
    raw["quantization"] |= {"method": "gptq", "calibration": {"jsonl": "a.jsonl"}}
    found = parse_spec(yaml.safe_dump(raw), folder=tmp_path)
    assert found.quantization is not None
    assert found.quantization.calibration == Calibration(jsonl=tmp_path / "a.jsonl")
    raw["quantization"]["calibration"] = {"jsonl": "a.jsonl", "text": "b.txt"}
    with pytest.raises(SpecError, match="only one of text, jsonl and domains"):
        parse_spec(yaml.safe_dump(raw))


def test_an_artifact_of_calibrated_codes(tmp_path: Path) -> None:
    """Compiled, verified against the graph with the codes that the cache gives again, and reported by expert."""
    found = spec(method="awq_gptq")
    synthesize(found, tmp_path / "weights", seed=3)
    artifact = build.compile(found, checkpoint=tmp_path / "weights", out=tmp_path / "artifact")
    report = artifact.manifest.calibration
    assert report is not None
    assert report["method"] == "awq_gptq"
    assert [len(layer["experts"]) for layer in report["moe"]] == [6, 6]
    assert {entry.origin for entry in artifact.manifest.codes} == {"computed: awq_gptq"}
    checked = verify_artifact(tmp_path / "artifact", tokens=64)
    assert checked.passed, checked.text()


def test_codes_of_scaled_channels_in_the_model_as_exported(program: Program) -> None:
    """With the scaling undone the exported model with these codes is the quantized one; each side in its own scale.

    atol 1e-4, rtol 1e-4: factors are multiplied and divided in fp32.
    """
    plain = {"expert_group_axis": "in", "activations": "fp32", "kv_cache": "fp32"}
    found = spec(method="awq_gptq", **plain).quantization
    assert found is not None
    scaled = calibrated(program, method="awq_gptq", **plain)
    done = run_passes(scaled, [quantize_weights(found)])
    for before in (program, scaled):
        torch.testing.assert_close(logits(with_weights_of(before, done)), logits(done), atol=1e-4, rtol=1e-4)
