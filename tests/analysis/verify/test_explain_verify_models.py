"""`moec explain`, `moec verify --after` and dumps on models that are not ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moec.cli.main import run

FAMILIES = Path(__file__).parents[3] / "specs" / "families"
LOOSE = """
import torch
from tests.sources.own_models import Cached, V


class Loose(Cached):
    def body(self, tokens, start_pos):
        logits = super().body(tokens, start_pos)
        return logits + self.seen.float().sum()


def reads_the_indices():
    model = Loose()
    gate = model.moe.gate
    original = model.moe.forward

    def forward(x):
        model.seen = gate(x.reshape(-1, x.shape[-1])).topk(2, -1).indices
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = gate(flat).topk(2, -1)
        model.seen = chosen
        weights, y = weights.softmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(model.moe.experts):
            token, nth = torch.where(chosen == number)
            y = y.index_add(0, token, weights[token, nth, None] * expert(flat[token]))
        return y.view_as(x)

    model.moe.forward = forward
    return model
"""


def _spec(folder: Path, model: dict[str, str]) -> str:
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump({"name": "own", "model": model, "quantization": "none"}))
    return str(file)


def test_a_block_that_is_fused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEC_DUMP", str(tmp_path / "dump"))
    assert run(["explain", "--trust", _spec(tmp_path, {"python": "tests.sources.own_models:cached"})]) == 0
    out = capsys.readouterr().out
    assert "MoE blocks" in out
    assert "after_topk=true" in out
    written = sorted(f.name for f in (tmp_path / "dump").glob("*.txt"))
    assert written[:2] == ["000_exported.txt", "001_canonicalize.txt"]
    fused = next(f for f in written if f.endswith("_fuse_moe.txt"))
    assert "moec.fused_moe" in (tmp_path / "dump" / fused).read_text()
    pytest.importorskip("pygraphviz", reason="needs the pictures extra: pip install 'moec[pictures]'")
    for part in ("before", "after"):
        picture = (tmp_path / "dump" / fused.replace(".txt", f".{part}.svg")).read_text()
        assert "<svg" in picture
    assert "fused_moe" in picture


def test_a_block_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loose_model.py").write_text(LOOSE)
    monkeypatch.chdir(tmp_path)
    spec = _spec(tmp_path, {"python": "loose_model:reads_the_indices"})
    assert run(["explain", "--trust", spec]) == 1
    out = capsys.readouterr().out
    assert "Nearest misses" in out
    assert "remedy:" in out
    assert "This model does not compile" in out
    assert run(["explain", "--trust", spec, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    refusals = [r for p in found["passes"] for r in p["refusals"] if r["rule"] == "fuse_moe"]
    assert refusals
    assert all(r["reason"] and r["remedy"] and "(" in r["node"] for r in refusals)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_every_pass_of_a_shipped_family(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")
    report = tmp_path / "report.json"
    assert run(["verify", str(FAMILIES / f"{name}.yaml"), "--json", str(report), "--quiet"]) == 0
    assert json.loads(report.read_text())["checks"]
