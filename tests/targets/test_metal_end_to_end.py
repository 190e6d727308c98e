"""Metal from end to end: from spec and checkpoint to an artifact that runs, agrees with the CPU, is verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs the metal extra: pip install 'moec[metal]'")

from executorch.exir._serialize._program import deserialize_pte_binary

from moec.analysis.verify.prompts import WordHashEncoder, prompt_ids
from moec.checkpoints import open_store
from moec.cli import main as cli
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import ArtifactError
from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.quantization import FLOAT_ACTIVATIONS
from moec.sources.decoder.layout import parameter_counts
from moec.sources.decoder.simulate import Reference
from moec.targets.metal.target import MetalTarget
from tests.tiny import TinyModels, tiny_text

TINY = Path(__file__).parents[2] / "specs" / "models" / "mobilemoe-tiny.yaml"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tiny: TinyModels) -> Make:
    """Compile a variant of the tiny spec: `edits` are other values of its keys."""

    def get(target: str = "metal", options: str = "", qat: bool = True, **edits: str) -> Path:
        return tiny(tiny_text(context=640, targets=f"{{{target}: {{{options}}}}}", **edits), qat=qat)

    return get


def spec_of(folder: Path) -> Spec:
    return load_spec(folder / "spec.yaml")


def real_text(vocab: int, count: int) -> dict[str, list[int]]:
    return prompt_ids(WordHashEncoder(vocab), tokens=count)


def test_float32_equals_the_eager_model(make: Make) -> None:
    """Codes of a released-layout checkpoint, float arithmetic and cache: 1e-5 absolute on logits below 1."""
    folder = make(options="dtype: float32", kv_cache="fp32")
    spec = spec_of(folder)
    assert spec.quantization is not None
    store = open_store(folder / "checkpoint", spec.model)
    reference = Reference(spec.model, store, spec.quantization.model_copy(update={"activations": FLOAT_ACTIVATIONS}))
    ids = real_text(spec.model.vocab_size, 160)["prose"][:140]
    session = build.load(folder / "artifact")
    got = np.concatenate([session.prefill(ids[:130], "all"), *(session.decode(i)[None] for i in ids[130:])])
    np.testing.assert_allclose(got, reference.forward(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_two_layers_of_s_equal_the_eager_model(tmp_path: Path) -> None:
    """The published shapes: 60 experts, 128,256 rows of vocabulary. Logits reach 29 there, where one unit in the last
    place is 2e-6, so 1e-5 is taken of the largest logit."""
    text = TINY.with_name("mobilemoe-s.yaml").read_text()
    edits = {"layers: 20": "layers: 2", "context: 8192": "context: 640", "kv_cache: int8": "kv_cache: fp32"}
    for old, new in {**edits, "targets: [xnnpack]": "targets: {metal: {dtype: float32}}"}.items():
        assert old in text
        text = text.replace(old, new)
    path, checkpoint, out = tmp_path / "spec.yaml", tmp_path / "checkpoint", tmp_path / "artifact"
    path.write_text(text)
    assert cli.run(["checkpoint", "synthesize", str(path), "--out", str(checkpoint), "--qat", "--quiet"]) == 0
    assert cli.run(["compile", str(path), "--checkpoint", str(checkpoint), "--out", str(out), "--quiet"]) == 0
    spec = load_spec(path)
    assert spec.quantization is not None
    quantization = spec.quantization.model_copy(update={"activations": FLOAT_ACTIVATIONS})
    reference = Reference(spec.model, open_store(checkpoint, spec.model), quantization)
    ids = real_text(spec.model.vocab_size, 160)["prose"][:40]
    session = build.load(out)
    got = np.concatenate([session.prefill(ids[:36], "all"), *(session.decode(i)[None] for i in ids[36:])])
    want = reference.forward(ids).logits
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert (got.argmax(-1) == want.argmax(-1)).all()


def test_without_quantization_equals_the_eager_model(make: Make) -> None:
    folder = make(options="dtype: float32", qat=False, weights="fp32", embedding="fp32", kv_cache="fp32")
    spec = spec_of(folder)
    store = open_store(folder / "checkpoint", spec.model)
    ids = real_text(spec.model.vocab_size, 64)["math"]
    got = build.load(folder / "artifact").prefill(ids, "all")
    np.testing.assert_allclose(got, Reference(spec.model, store, None).forward(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_both_targets_answer_alike(make: Make) -> None:
    """The same spec for GPU and CPU, 512 positions of real text: top-1 equal for more than 99%, and the first layer,
    which both enter with the same values up to rounding, selects the same experts for more than 99% of the tokens.

    The CPU target rounds activations to INT8 unless the spec says fp32: that it does is a choice of the spec, not a
    disagreement of the targets.
    """
    metal = make(options="dtype: float32", activations="fp32")
    xnnpack = make(target="xnnpack", activations="fp32")
    sessions = [build.load(folder / "artifact") for folder in (metal, xnnpack)]
    same_top, same_experts = [], []
    for ids in real_text(spec_of(metal).model.vocab_size, 512).values():
        logits, experts = [], []
        for session in sessions:
            session.reset()
            session.trace(True)
            logits.append(session.prefill(ids, "all").argmax(-1))
            experts.append(np.sort(session.take_traces()[0].indices_TK))
        same_top.append(logits[0] == logits[1])
        same_experts.append((experts[0] == experts[1]).all(-1))
    tops, sets = np.concatenate(same_top), np.concatenate(same_experts)
    assert len(tops) == 512
    assert tops.mean() > 0.99
    assert sets.mean() > 0.99


def test_the_file_is_four_and_a_half_bits_a_weight(make: Make) -> None:
    folder = make()
    artifact = Artifact.open(folder / "artifact")
    config = spec_of(folder).model
    moe = config.moe
    assert moe is not None
    router = config.layers * moe.experts * config.d_model
    norms = (2 * config.layers + 1) * config.d_model
    quantized = parameter_counts(config)["total"] - router - norms
    roles = artifact.manifest.sizes_by_role
    weights = sum(roles[r] for r in ("embedding", "attention", "expert", "shared"))
    assert weights == quantized * 4.5 / 8
    # router fp32, its selection bias fp32, norms 16 bits; rotary tables and the program are what is left over
    assert roles["router"] == 4 * (router + config.layers * moe.experts)
    assert roles["norm"] == 2 * norms
    fixed = roles["constant"] + roles["program"]
    expected = weights + roles["router"] + roles["norm"] + fixed
    assert (
        artifact.path("model.pte").stat().st_size <= 1.02 * expected + 65536
    )  # headers, and 16 KiB pages of large ones


def test_verify_passes_and_reports_the_sixteen_bits(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make()
    report = tmp_path / "report.json"
    status = cli.run(["verify", str(folder / "artifact"), "--tokens", "64", "--json", str(report), "--quiet"])
    assert status == 0, capfd.readouterr()
    figures = json.loads(report.read_text())["figures"]
    assert any("float16" in name and "float32" in name for name in figures)


def test_inspect_shows_delegates_and_advice(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make()
    assert cli.run(["inspect", str(folder / "artifact")]) == 0
    out = capfd.readouterr().out
    for part in ("GatherQmm", "forward_all", "at least 32 tokens", "not checked without Apple hardware", "expert"):
        assert part in out


def test_run_generates(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make()
    arguments = ["run", str(folder / "artifact"), "--prompt", "The quick brown fox", "--max-new-tokens", "4"]
    assert cli.run(arguments) == 0
    first = capfd.readouterr().out
    assert cli.run(arguments) == 0
    assert capfd.readouterr().out == first


def test_an_artifact_of_another_target_is_refused(make: Make) -> None:
    folder = make(target="xnnpack", activations="fp32")
    with pytest.raises(ArtifactError, match="is an artifact for xnnpack"):
        MetalTarget().load(Artifact.open(folder / "artifact"))


def test_the_program_states_what_its_forward_takes(make: Make) -> None:
    program = deserialize_pte_binary((make() / "artifact" / "model.pte").read_bytes()).program
    plans = {plan.name: plan for plan in program.execution_plan}
    stated = plans["get_max_seq_len"].values[plans["get_max_seq_len"].outputs[0]].val
    tokens = plans["forward"].values[plans["forward"].inputs[0]].val
    assert stated.int_val == tokens.sizes[1] == 128
    assert "enable_dynamic_shape" in plans
