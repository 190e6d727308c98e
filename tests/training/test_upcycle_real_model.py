"""The whole way on a real model: split, a few steps of healing, INT4, verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moec.compiler.artifact import Artifact
from tests.conftest import Moec

SPEC = Path(__file__).parents[2] / "specs" / "upcycling" / "smollm2-demo.yaml"
STEPS, BATCH = 8, 1024


def spec_of(folder: Path) -> Path:
    """The demo's spec with fewer steps, on the one domain that needs no network, and codes that need no text."""
    raw = yaml.safe_load(SPEC.read_text())
    stage = raw["training"]["stages"][0]
    stage |= {"tokens": STEPS * BATCH, "mixture": {"code": 1}, "log_every": 1, "eval_tokens": 4096}
    stage["learning_rate"] |= {"warmup": BATCH}
    raw["quantization"] = {k: v for k, v in raw["quantization"].items() if k not in ("method", "calibration")}
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


@pytest.mark.slow
@pytest.mark.real_model
def test_split_heal_compile_verify(smollm2: Path, tmp_path: Path, moec: Moec) -> None:
    def done(*arguments: object) -> str:
        status, out, err = moec(*arguments)
        assert status == 0, err
        return out

    spec, tokenizer = spec_of(tmp_path), smollm2 / "tokenizer.json"
    corpus, mixture, run, artifact = (tmp_path / name for name in ("corpus", "mixture", "run", "artifact"))
    done("data", "build", "--out", corpus, "--tokenizer", tokenizer, "--domains", "code", "--limit-mb", 1)
    done("upcycle", spec, "--from", smollm2, "--data", corpus, "--tokens", 4096, "--out", mixture, "-q")
    report = json.loads((mixture / "upcycle.json").read_text())
    assert report["neurons_active"] == pytest.approx(10 / 12)
    assert max(layer["error"] for layer in report["layers"]) < 0.3  # of the square of the layer's output
    done("train", spec, "--data", corpus, "--init", mixture, "--teacher", smollm2, "--out", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = (line["heldout"]["code"] for line in lines if "heldout" in line)
    assert after < before - 0.02  # nats; 4,096 tokens it was not trained on
    losses = [line["kld"] for line in lines if "kld" in line]
    assert len(losses) == STEPS
    done("compile", spec, "--checkpoint", run / "midtrain", "--out", artifact, "-q")
    assert len(Artifact.open(artifact).manifest.model.moe_layers) == 30
    assert "passed" in done("verify", artifact, "--tokens", 64, "--quality-tokens", 0, "-q")
