"""Weights in nl3, iq4_nl and fp4 on every target: the artifact computes its codes, as they are or as INT8 codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.cli import main as cli
from moec.compiler.artifact import Artifact
from tests.tiny import TinyModels, tiny_text

NEEDS = {"xnnpack": (), "onnx": ("onnx", "onnxruntime"), "metal": ("mlx.core",), "mlir": ("torch_mlir",)}
# each kind, and both ways: codes as they are, and INT8 codes of their values
FAST = {("nl3", "xnnpack"), ("iq4_nl", "xnnpack"), ("fp4", "onnx")}
CASES = [
    pytest.param(kind, target, marks=() if (kind, target) in FAST else pytest.mark.slow)
    for kind in ("nl3", "iq4_nl", "fp4")
    for target in NEEDS
]


@pytest.mark.parametrize(("kind", "target"), CASES)
def test_verify_passes(
    tiny: TinyModels, kind: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in NEEDS[target]:
        pytest.importorskip(module, reason=f"needs the {target} extra: pip install 'moec[{target}]'")
    text = tiny_text(layers=1, weights=kind, expert_group_axis="in", embedding=kind, targets=f"[{target}]")
    folder = tiny(text, qat=False)
    report = tmp_path / "report.json"
    words = ["verify", str(folder / "artifact"), "--tokens", "48", "--json", str(report), "--quiet"]
    status = cli.run([*words, *(["--trust"] if target == "mlir" else [])])
    assert status == 0, capsys.readouterr().out
    assert json.loads(report.read_text())["passed"]
    manifest = Artifact.open(folder / "artifact").manifest
    assert {entry.levels for entry in manifest.codes} == {kind}
    assert any("INT8 codes of the same values" in note for note in manifest.notes) == (target != "xnnpack")
