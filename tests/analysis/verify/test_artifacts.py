"""`moec verify` over what a spec can ask for: float, INT8, groups along either axis, dense models, models of others."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moec.analysis.verify.artifact import verify_artifact
from moec.checkpoints import synthesize
from moec.cli.main import run
from moec.compiler import build
from moec.compiler.errors import CheckpointError
from moec.compiler.spec import Spec

MOE = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32,
    "vocab_size": 512, "context": 256, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 8, "top_k": 2, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip
DENSE = {
    **{k: v for k, v in MOE.items() if k != "moe"},
    "architecture": "mobilellm", "layers": 3, "ffn_width": 96, "attention_window": {"size": 24, "every_nth_global": 3},
}  # fmt: skip
INT4 = {"weights": "int4", "group_size": 32, "activations": "int8", "kv_cache": "int8"}
slow = pytest.mark.slow
FORMS = [
    pytest.param(MOE, "none", id="float"),
    pytest.param(DENSE, INT4, id="dense"),
    pytest.param(MOE, {**INT4, "expert_group_axis": "in"}, id="groups-in", marks=slow),
    pytest.param(MOE, {**INT4, "activations": "fp32", "kv_cache": "fp32"}, id="float-activations", marks=slow),
    pytest.param(MOE, {**INT4, "weights": "int8", "embedding": "int8"}, id="int8", marks=slow),
    pytest.param(MOE, {**INT4, "attention": "fp32", "kv_cache": "fp32"}, id="mixed", marks=slow),
    pytest.param(DENSE, "none", id="dense-float", marks=slow),
]


@pytest.mark.parametrize(("model", "quantization"), FORMS)
def test_passes(model, quantization, tmp_path):
    spec = Spec.model_validate({"name": "form", "model": model, "quantization": quantization})
    checkpoint = synthesize(spec, tmp_path / "checkpoint", seed=2)
    artifact = build.compile(spec, checkpoint=checkpoint, out=tmp_path / "artifact")
    report = verify_artifact(artifact.folder, tokens=200, quality_tokens=0)  # quality: test_fidelity.py
    assert report.exit_status == 0, [c.line() for c in report.failures]
    assert len(report.layers) == (2 if "moe" in model else 0)
    assert any(c.name.startswith("free run") for c in report.checks)
    rounds = quantization != "none" and quantization["activations"] == "int8"
    assert any(c.name.startswith("free run, float activations") for c in report.checks) == rounds


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cli")
    spec = Spec.model_validate({"name": "cli", "model": MOE, "quantization": INT4})
    checkpoint = synthesize(spec, folder / "checkpoint", seed=4)
    return build.compile(spec, checkpoint=checkpoint, out=folder / "artifact").folder, checkpoint


def test_the_command_writes_json_and_junit(compiled, tmp_path, capsys):
    artifact, _ = compiled
    status = run(
        [
            "verify",
            str(artifact),
            "--tokens",
            "40",
            "-q",
            "--json",
            str(tmp_path / "r.json"),
            "--junit",
            str(tmp_path / "r.xml"),
        ]
    )
    assert status == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("passed; KL divergence ")
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["passed"] is True
    assert {"checks", "layers", "figures", "about"} <= set(document)
    suite = ElementTree.parse(tmp_path / "r.xml").getroot().find("testsuite")
    assert suite is not None
    assert suite.get("failures") == "0"


def test_an_artifact_equals_itself(compiled, capsys):
    artifact, _ = compiled
    assert run(["diff", str(artifact), str(artifact), "--tokens", "8"]) == 0
    assert "no difference" in capsys.readouterr().out


def test_faults_of_the_user_are_one_line(compiled, tmp_path, capsys):
    artifact, checkpoint = compiled
    cases = [
        ["verify", str(tmp_path / "nowhere")],
        ["verify", str(artifact), "--checkpoint", str(tmp_path / "nowhere")],
        ["verify", str(artifact), "--after", "each"],
        ["verify", str(artifact), "--text", "/dev/null"],
        ["diff", str(artifact), str(checkpoint / "config.json")],
    ]
    for arguments in cases:
        assert run([*arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert "Traceback" not in error
        last = [line for line in error.splitlines() if "executorch:" not in line][-1]
        assert ";" in last, f"a remedy is missing: {last}"


def test_another_checkpoint_is_an_error_not_a_failed_check(compiled, tmp_path):
    artifact, _ = compiled
    spec = Spec.model_validate({"name": "cli", "model": MOE, "quantization": INT4})
    other = synthesize(spec, tmp_path / "qat", seed=4, qat=True)
    with pytest.raises(CheckpointError, match="is not the checkpoint that"):
        verify_artifact(artifact, checkpoint=other)


@slow
@pytest.mark.parametrize("quantization", ["none", {**INT4, "expert_group_axis": "in"}], ids=["float", "int4"])
def test_a_transformers_model_passes_and_a_wrong_one_fails(quantization, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
    )
    import torch

    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=8, num_experts_per_tok=2, vocab_size=512, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path / "true")
    spec = Spec.model_validate(
        {"name": "olmoe", "model": {"transformers": str(tmp_path / "true")}, "quantization": quantization}
    )
    artifact = build.compile(spec, out=tmp_path / "artifact").folder
    report = verify_artifact(artifact, tokens=160)
    assert report.exit_status == 0, [c.line() for c in report.failures]
    assert len(report.layers) == 2
    strict = any(c.name == "free run, float activations: median cosine" for c in report.checks)
    assert strict == (quantization != "none")
    experts = next(p for n, p in model.named_parameters() if "experts" in n and p.dim() == 3)
    experts.data[3] = experts.data[3].flip(0)
    model.save_pretrained(tmp_path / "wrong")
    report = verify_artifact(artifact, checkpoint=tmp_path / "wrong", tokens=160)
    assert report.exit_status == 1
    assert any(c.name.startswith("block outputs") for c in report.failures)
