"""`moec plan`: the plan of the shipped specs, its speed model, its advice, and what `moec compile` refuses by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.analysis.plan.devices import load_device, reference
from moec.analysis.plan.planner import check_fits, footprint_of, plan_spec
from moec.analysis.plan.roofline import decode, prefill
from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.errors import CompileError, UserError
from moec.compiler.spec import load_spec, parse_spec
from moec.compiler.spec.device import device_files
from tests.conftest import Moec

SPECS = Path(__file__).parents[3] / "specs"
TINY = (SPECS / "models" / "mobilemoe-tiny.yaml").read_text()
S, L, PRO = (SPECS / "models" / f"{name}.yaml" for name in ("mobilemoe-s", "mobilemoe-l", "mobilellm-pro"))


# ---------------------------------------------------------------------------------------------------- published figures


@pytest.mark.parametrize(("file", "gb"), [("mobilemoe-s", 0.68), ("mobilemoe-m", 1.48), ("mobilemoe-l", 2.75)])
def test_published_weight_memory(file: str, gb: float) -> None:
    """The paper's weight memory is in GiB-like units of its own (0.68 for 714 MB): ours within 5% of 2^30 bytes."""
    plan = plan_spec(load_spec(SPECS / "models" / f"{file}.yaml"))
    assert plan.weight_bytes / 2**30 == pytest.approx(gb, rel=0.05)


@pytest.mark.parametrize(("file", "mb"), [("mobilemoe-s", 84), ("mobilemoe-m", 109), ("mobilemoe-l", 134)])
def test_published_cache_of_8k(file: str, mb: int) -> None:
    """2 T layers kv_heads d bytes: 84, 109 and 134 MB; ours has a scale of 4 bytes for each 64 values on top."""
    plan = plan_spec(load_spec(SPECS / "models" / f"{file}.yaml"), context=8192)
    assert round(plan.peak.cache * 64 / 68 / 1e6) == mb


@pytest.mark.parametrize(
    ("file", "rates"),
    [(S, {256: 138.1, 1024: 112.0, 4096: 48.9, 8192: 25.8}), (PRO, {256: 61.3, 1024: 45.8, 4096: 18.6, 8192: 10.6})],
    ids=["S", "Pro"],
)
def test_no_published_rate_is_above_the_roofline(file: Path, rates: dict[int, float]) -> None:
    """Decode on the Galaxy S25 as the paper reports it: a roofline that a measurement beats would be wrong."""
    plan = plan_spec(load_spec(file), load_device("galaxy-s25"))
    ceiling = {m.context: s.roofline_tokens_per_s for m, s in zip(plan.by_context, plan.decode, strict=True)}
    assert set(ceiling) == set(rates)
    for context, rate in rates.items():
        assert rate < ceiling[context]


# ---------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("device", sorted(device_files()))
@pytest.mark.parametrize("file", [S, L, PRO], ids=lambda f: f.stem)
def test_every_model_on_every_device(file: Path, device: str) -> None:
    plan = plan_spec(load_spec(file), load_device(device), target=load_device(device).backend)
    assert plan.device is not None
    assert plan.longest is not None
    assert plan.fits == (plan.longest == plan.context)
    assert bool(plan.advice) == (not plan.fits)
    roof = [s.roofline_tokens_per_s for s in plan.decode]
    assert roof == sorted(roof, reverse=True)
    for step in (*plan.decode, plan.prefill):
        assert step is not None
        if plan.target == "metal":
            assert step.expected_s is None
        else:
            assert step.expected_s is not None
            assert step.expected_s >= step.roofline_s * 0.999
    assert all(s.bound in ("memory", "compute") for s in plan.decode)


def test_a_moe_decodes_faster_than_a_dense_model_of_its_size() -> None:
    """MobileLLM-Pro holds as many weight bytes as S, and reads them all for every token: about four times as many."""
    s, pro = (plan_spec(load_spec(f), load_device("galaxy-s25")) for f in (S, PRO))
    assert 0.8 < s.weight_bytes / pro.weight_bytes < 1.25
    assert 3 < s.decode[0].roofline_tokens_per_s / pro.decode[0].roofline_tokens_per_s < 5


def test_steps_cost_what_their_parts_cost() -> None:
    device = reference()
    assert device is not None
    plan = plan_spec(load_spec(S), device)
    step = plan.decode[0]
    assert step.expected_s == pytest.approx(max(sum(step.parts.values()), step.roofline_s), rel=1e-9)
    assert {"expert", "shared", "attention", "embedding", "router", "instructions"} <= set(step.parts)
    longer = decode(plan.model, device, plan.rates, 8191)
    assert longer.parts["attention over the cache"] > step.parts["attention over the cache"]
    assert longer.parts["expert"] == step.parts["expert"]
    # a prompt twice as long takes twice the products and more than twice the attention
    one, two = (prefill(plan.model, device, plan.rates, n) for n in (512, 1024))
    assert two.parts["expert"] == pytest.approx(2 * one.parts["expert"], rel=1e-9)
    assert two.parts["attention over the cache"] > 2 * one.parts["attention over the cache"]


def test_rates_scale_with_the_device() -> None:
    """A device without measurements gets the reference's shares of its own peaks, and the report says so."""
    base = reference()
    assert base is not None
    footprint, device = footprint_of("xnnpack"), load_device("galaxy-s25")
    own, lent = footprint.rates(base, base), footprint.rates(device, base)
    assert own is not None
    assert lent is not None
    assert lent.weights["dense"] / own.weights["dense"] == pytest.approx(
        device.dram_gb_per_s.number / base.dram_gb_per_s.number
    )
    assert "not measured" in lent.basis
    assert "not measured" not in own.basis
    assert footprint.rates(device, None) is None
    assert footprint_of("metal").rates(device, base) is None


def test_a_peak_is_that_of_what_the_target_runs_on() -> None:
    phone = load_device("iphone-17")
    cpu, gpu = footprint_of("xnnpack"), footprint_of("metal")
    assert cpu.peak(phone, integer=True) == phone.int8_gop_per_s.number * 1e9 * phone.cores.threads
    assert cpu.peak(phone, integer=False) == cpu.peak(phone, integer=True) / 4
    assert phone.gpu_fp16_gflop_per_s is not None
    assert gpu.peak(phone, integer=True) == gpu.peak(phone, integer=False) == phone.gpu_fp16_gflop_per_s.number * 1e9


def test_advice_is_what_planning_the_change_gives() -> None:
    text = TINY.replace("kv_cache: int8", "kv_cache: fp32").replace("weights: int4", "weights: int8")
    spec = parse_spec(text)
    small = load_device("wearable").model_copy(
        update={"memory_budget_mb": load_device("wearable").memory_budget_mb.model_copy(update={"number": 9.0})}
    )
    plan = plan_spec(spec, small)
    assert plan.fits is False
    advice = {a.change: a for a in plan.advice}
    for change, new in {
        "kv_cache: int8": text.replace("kv_cache: fp32", "kv_cache: int8"),
        "weights: int4": text.replace("weights: int8", "weights: int4"),
        "8 experts instead of 16": text.replace("experts: 16", "experts: 8"),
        "2 layers instead of 4": text.replace("layers: 4", "layers: 2"),
    }.items():
        after = plan_spec(parse_spec(new), small).peak.peak
        assert (advice[change].peak, advice[change].saves) == (after, plan.peak.peak - after), change
        assert advice[change].fits == (after <= small.budget)
    saved = [a.saves for a in plan.advice if not a.retrain]
    assert saved == sorted(saved, reverse=True)
    assert all(a.saves > 0 for a in plan.advice)
    assert advice["weights: int4"].requantize
    assert not advice["kv_cache: int8"].requantize  # a checkpoint's codes stay as they are
    assert not advice["2 layers instead of 4"].requantize


def test_advice_names_only_what_the_spec_can_be() -> None:
    text = TINY.replace("expert_width: 64", "expert_width: 48")
    tight = load_device("wearable")
    tight = tight.model_copy(update={"memory_budget_mb": tight.memory_budget_mb.model_copy(update={"number": 8.5})})
    plan = plan_spec(parse_spec(text), tight)
    assert not plan.fits
    assert not [a.change for a in plan.advice if "128" in a.change and "group" in a.change]


def test_unquantized_models_are_told_to_quantize() -> None:
    text = TINY[: TINY.index("quantization:")] + "quantization: none\ntargets: [xnnpack]\n"
    tight = load_device("wearable")
    tight = tight.model_copy(update={"memory_budget_mb": tight.memory_budget_mb.model_copy(update={"number": 15.0})})
    plan = plan_spec(parse_spec(text), tight)
    assert plan.peak.copies > 0  # XNNPACK keeps a packed copy of float linears
    assert next(a for a in plan.advice if a.change == "quantization: {weights: int4}").fits


@pytest.mark.parametrize("context", [0, -1, 1025])
def test_contexts_that_are_none(context: int) -> None:
    with pytest.raises(UserError, match=rf"--context {context} is outside the model's 1 to 1024"):
        plan_spec(parse_spec(TINY), context=context)


def test_models_whose_shapes_nobody_knows() -> None:
    spec = parse_spec("name: x\nmodel: {python: 'a:b'}\nquantization: none\n")
    with pytest.raises(UserError, match="`python:` has no config"):
        plan_spec(spec)


@pytest.mark.parametrize("family", sorted(f.stem for f in (SPECS / "families").glob("*.yaml")))
def test_models_of_transformers(family: str) -> None:
    """Every parameter of the module once, experts and router recognised, and the peak a sum of parts."""
    transformers = pytest.importorskip(
        "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
    )
    import torch

    from moec.sources.transformers_config import read_config
    from moec.sources.transformers_source import TransformersModel

    spec = load_spec(SPECS / "families" / f"{family}.yaml")
    assert isinstance(spec.model, TransformersModel)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(read_config(spec.model.transformers))
    plan = plan_spec(spec, load_device("galaxy-s25"))
    a = plan.model.architecture
    assert a.total_parameters == sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())
    assert a.active_parameters < a.total_parameters
    assert a.experts is not None
    assert {"expert", "router", "attention", "embedding"} <= {r.role for r in plan.roles}


# ------------------------------------------------------------------------------------------------------------- commands


def test_plan_command(moec: Moec) -> None:
    status, out, err = moec("plan", S, "--device", "wearable")
    assert (status, err) == (0, "")
    for text in ("1,263,373,056 parameters, 272,468,736 active", "does not fit", "10 layers instead of 20", "roofline"):
        assert text in out
    status, out, _ = moec("plan", S, "--device", "galaxy-s25", "--context", 4096)
    assert "fits: 781" in out.replace(",", "")
    status, out, _ = moec("plan", S)
    assert status == 0
    assert "Name a --device" in out


def test_plan_as_json(moec: Moec) -> None:
    status, out, _ = moec("plan", S, "--device", "iphone-17", "--target", "metal", "--json")
    assert status == 0
    facts = json.loads(out)
    assert facts["parameters"] == {"total": 1_263_373_056, "active": 272_468_736}
    assert facts["target"] == "metal"
    assert facts["decode"][0]["expected_tokens_per_s"] is None
    assert "never measured on Apple hardware" in facts["sizes_checked_with"]
    assert sum(r["bytes"] for r in facts["roles"]) == facts["weight_bytes"]
    parts = ("weights", "copies", "tables", "cache", "activations", "runtime")
    assert sum(facts["memory"][p] for p in parts) == facts["memory"]["peak"]


def test_the_spec_names_the_device(moec: Moec, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(TINY + "device: phone-4gb\n")
    assert json.loads(moec("plan", file, "--json")[1])["device"] == "phone-4gb"
    assert json.loads(moec("plan", file, "--device", "wearable", "--json")[1])["device"] == "wearable"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "galaxy"], "unknown device 'galaxy'"),
        (["--device", "nowhere.yaml"], "nowhere.yaml: no such device"),
        (["--target", "metal", "--device", "galaxy-s25"], "galaxy-s25 cannot run target metal: its file gives no gpu_"),
        (["--target", "onnx"], "target onnx has no sizes to plan with"),
        (["--target", "npu"], "unknown target 'npu'"),
        (["--context", "9000"], "--context 9000 is outside the model's 1 to 8192"),
        (["--context", "x"], "--context"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_faults_of_plan(moec: Moec, arguments: list[str], message: str) -> None:
    status, out, err = moec("plan", S, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- compile


def test_compile_refuses_what_cannot_fit(moec: Moec, tmp_path: Path) -> None:
    device = tmp_path / "toy.yaml"
    text = (SPECS / "devices" / "wearable.yaml").read_text()
    device.write_text(text.replace("number: 500\n", "number: 8\n"))
    file, out = tmp_path / "a.yaml", tmp_path / "artifact"
    file.write_text(TINY + "device: ./toy.yaml\n")
    synthesize(load_spec(file), tmp_path / "checkpoint", seed=1, qat=True)
    status, printed, err = moec("compile", file, "--checkpoint", tmp_path / "checkpoint", "--out", out, "-q")
    assert (status, printed) == (2, "")
    assert err.startswith("mobilemoe-tiny: needs 1")
    assert "wearable gives an app 8 MB" in err
    assert "--force" in err
    assert err.count("\n") == 1
    assert not out.exists()
    assert moec("compile", file, "--checkpoint", tmp_path / "checkpoint", "--out", out, "-q", "--force")[0] == 0
    assert (out / "model.pte").exists()


def test_compile_says_what_would_fit() -> None:
    spec = load_spec(S)
    phone = load_device("phone-4gb")
    check_fits(spec, phone, "xnnpack")
    tight = phone.model_copy(update={"memory_budget_mb": phone.memory_budget_mb.model_copy(update={"number": 780.0})})
    with pytest.raises(CompileError, match=r"needs 828 MB at its context of 8192.*`context: \d+` in the spec fits"):
        check_fits(spec, tight, "xnnpack")
    with pytest.raises(CompileError, match="memory_mb: 500 in the target's options fits"):
        check_fits(spec, load_device("wearable"), "xnnpack")
    with pytest.raises(CompileError, match="15 layers instead of 30 fits"):  # no experts that could be left out
        check_fits(load_spec(PRO), load_device("wearable"), "xnnpack")


def test_compile_asks_nothing_of_targets_without_sizes(monkeypatch: pytest.MonkeyPatch) -> None:

    from moec.targets.xnnpack.target import XnnpackTarget

    monkeypatch.setattr(XnnpackTarget, "footprint", lambda self: None)
    check_fits(load_spec(L), load_device("wearable"), "xnnpack")


def test_a_found_shape_compiles(tmp_path: Path) -> None:
    """What `moec search` writes goes through the pipeline: here with fewer and narrower layers, in the same form."""
    from moec.analysis.plan.search import Candidate, shape
    from moec.analysis.plan.searched import spec_text

    config = shape(256, 2, 2, 8, True, 64)
    found = Candidate(config, 2, 8, True, 1, 1, 1, 1, 1, 1.0, tokens=1e9, loss=2.0, outside=())
    text = spec_text(found, "small", "galaxy-s25", "xnnpack", "law")
    text = text.replace("vocab_size: 128256", "vocab_size: 512").replace("bos_id: 128000", "bos_id: 0")
    text = text.replace("eos_ids: [128001, 128008, 128009]", "eos_ids: [1]")
    spec = parse_spec(text)
    synthesize(spec, tmp_path / "checkpoint", seed=1)
    artifact = build.compile(spec, None, tmp_path / "checkpoint", tmp_path / "artifact")
    assert len(artifact.manifest.model.moe_layers) == 2
    assert found.label == "2 x 256, E=2, g=8, shared"
