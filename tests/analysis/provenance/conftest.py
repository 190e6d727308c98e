"""A small artifact, compiled once for all tests of bills and signatures."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.cli import main as cli

SPEC = Path(__file__).parents[3] / "specs" / "models" / "mobilemoe-tiny.yaml"


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("provenance")
    spec = folder / "spec.yaml"
    spec.write_text(SPEC.read_text("utf-8").replace("layers: 4", "layers: 1"), "utf-8")
    made, out = folder / "checkpoint", folder / "artifact"
    assert cli.run(["checkpoint", "synthesize", str(spec), "--out", str(made), "--qat", "--quiet"]) == 0
    assert cli.run(["compile", str(spec), "--checkpoint", str(made), "--out", str(out), "--quiet"]) == 0
    return out
