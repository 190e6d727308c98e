"""A check that cannot fail is worthless: artifacts that are wrong in one place each, and `moec verify` must say so.

Each mutant is compiled from a checkpoint that was altered, or with a piece of the compiler altered, and is verified
against the true checkpoint. The small model has few and narrow layers, so that one compile takes seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moec.analysis.verify.artifact import verify_artifact
from moec.analysis.verify.report import Report
from moec.checkpoints import synthesize
from moec.checkpoints.safetensors_file import read_header
from moec.compiler import build
from moec.compiler.spec import Spec

MODEL = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32,
    "vocab_size": 512, "context": 256, "qk_norm": True,
    "rope": {
        "theta": 10000.0, "interleaved": True,
        "scaling": {"factor": 16.0, "original_context": 64, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    },
    "moe": {"experts": 8, "top_k": 2, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip
INT4 = {"weights": "int4", "group_size": 32, "activations": "int8", "kv_cache": "int8", "embedding": "int4"}
BLOCK = "model.layers.{}.feed_forward"
EXPERTS = BLOCK + ".experts.{}"


def spec(model: dict | None = None, quantization: object = INT4) -> Spec:
    return Spec.model_validate({"name": "mutant", "model": model or MODEL, "quantization": quantization})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(spec(), tmp_path_factory.mktemp("true") / "checkpoint", seed=3, qat=True)


def altered(checkpoint: Path, folder: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    """A copy of the checkpoint in which `change` has edited tensor `name` in place."""
    shutil.copytree(checkpoint, folder)
    entry = read_header(folder / "model.safetensors")[name]
    dtype = {"U8": np.uint8, "F16": np.float16, "BF16": np.uint16, "F32": np.float32}[entry.dtype]
    values = np.memmap(entry.file, dtype=dtype, mode="r+", offset=entry.begin, shape=entry.shape)
    before = values.copy()
    change(values)
    values.flush()
    assert (before != values).any(), "a mutant that equals the original proves nothing"
    return folder


def verdict(wrong: Path, true: Path, tmp_path: Path, **options: object) -> Report:
    artifact = build.compile(spec(), checkpoint=wrong, out=tmp_path / "artifact")
    return verify_artifact(artifact.folder, checkpoint=true, tokens=200, **options)


def failed(report: Report) -> set[str]:
    return {c.name for c in report.failures}


def test_the_true_artifact_passes(checkpoint, tmp_path):
    report = verdict(checkpoint, checkpoint, tmp_path)
    assert report.exit_status == 0, [c.line() for c in report.failures]
    assert len(report.layers) == 2
    assert all(row.experts_used == 8 for row in report.layers), "the prompts must reach every expert"


def _swap_gate_and_up(codes: np.ndarray) -> None:
    half = codes.shape[-1] // 2
    codes[5] = np.concatenate((codes[5][:, half:], codes[5][:, :half]), -1)


def _swap_experts(values: np.ndarray) -> None:
    values[[1, 2]] = values[[2, 1]]


def _double_one_scale(scales: np.ndarray) -> None:
    scales[3, 7, 0] *= 2


def _zero(values: np.ndarray) -> None:
    values[...] = 0


def _to_bf16(weight: np.ndarray) -> None:
    weight.view(np.uint32)[...] &= 0xFFFF0000


def _nibbles_swapped(codes: np.ndarray) -> None:
    codes[6] = codes[6] >> 4 | codes[6] << 4


def _ones(weight: np.ndarray) -> None:
    weight[...] = 0x3F80  # bfloat16


def _double_first_rows(scales: np.ndarray) -> None:
    scales[:8] *= 2


slow = pytest.mark.slow
MUTANTS = [
    pytest.param(EXPERTS.format(1, "gate_up_qweight"), _swap_gate_and_up, "block outputs", id="gate-and-up"),
    pytest.param(EXPERTS.format(1, "gate_up_scale"), _double_one_scale, "block outputs", id="one-scale", marks=slow),
    pytest.param(f"{BLOCK.format(0)}.expert_bias", _zero, "router: expert sets equal, same input", id="no-bias"),
    pytest.param("model.layers.1.input_layernorm.weight", _ones, "block inputs", id="no-norm-weight"),
    pytest.param(EXPERTS.format(0, "down_qweight"), _swap_experts, "block outputs", id="two-experts", marks=slow),
    pytest.param(EXPERTS.format(0, "gate_up_qweight"), _nibbles_swapped, "block outputs", id="nibbles", marks=slow),
    pytest.param(
        f"{BLOCK.format(1)}.shared_expert.up_proj.weight_scale", _zero, "block outputs", id="shared", marks=slow
    ),
    pytest.param(f"{BLOCK.format(1)}.router.weight", _to_bf16, "router: combine weights", id="bf16-router", marks=slow),
    pytest.param(
        "model.layers.0.self_attn.k_proj.weight_scale", _double_first_rows, "block inputs", id="k-proj", marks=slow
    ),
]


@pytest.mark.parametrize(("name", "change", "check"), MUTANTS)
def test_altered_weights_fail(checkpoint, tmp_path, name, change, check):
    report = verdict(altered(checkpoint, tmp_path / "wrong", name, change), checkpoint, tmp_path)
    assert report.exit_status == 1
    assert any(c.startswith(check) for c in failed(report)), failed(report)
    layer = int(name.split(".")[2])
    assert any(c.where.startswith(f"layer {layer} ") for c in report.failures if c.name.startswith(check))
    if check != "block inputs":  # wrong attention also blurs the length of the stream that the next layer starts from
        assert [row.layer for row in report.layers if not row.passed] == [layer]


def _claim(artifact: Path, **changes: object) -> None:
    """Make the manifest claim another model than the one that was compiled."""
    file = artifact / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["spec"]["model"] = {**manifest["spec"]["model"], **changes}
    file.write_text(json.dumps(manifest))


ROPE, MOE = MODEL["rope"], MODEL["moe"]
assert isinstance(ROPE, dict)
assert isinstance(MOE, dict)
CLAIMS = [
    pytest.param({"rope": {**ROPE, "scaling": None}}, "block inputs", id="rope-scaling"),
    pytest.param({"rope": {**ROPE, "interleaved": False}}, "block inputs", id="rope-pairs", marks=slow),
    pytest.param({"qk_norm": False}, "block inputs", id="qk-norm", marks=slow),
    pytest.param({"norm_eps": 1e-2}, "block inputs", id="norm-eps", marks=slow),
    pytest.param({"moe": {**MOE, "scale": 1.0}}, "router: combine weights", id="scale", marks=slow),
    pytest.param({"moe": {**MOE, "normalize": False}}, "router: combine weights", id="normalize", marks=slow),
]


@pytest.mark.parametrize(("changes", "check"), CLAIMS)
def test_another_model_than_claimed_fails(checkpoint, tmp_path, changes, check):
    wrong = synthesize(spec({**MODEL, **changes}), tmp_path / "wrong", seed=3, qat=True)
    artifact = build.compile(spec({**MODEL, **changes}), checkpoint=wrong, out=tmp_path / "artifact").folder
    _claim(artifact, **{key: spec().model_dump(mode="json")["model"][key] for key in changes})
    report = verify_artifact(artifact, checkpoint=checkpoint, tokens=200)
    assert report.exit_status == 1
    assert any(c.startswith(check) for c in failed(report)), failed(report)
