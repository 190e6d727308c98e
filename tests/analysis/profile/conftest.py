"""A small compiled artifact with structured routing, made once for all tests of profiles and reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.cli import main as cli

SPECS = Path(__file__).parents[3] / "specs" / "models"
CONTEXT = 512


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with spec.yaml, checkpoint and artifact: two layers of 16 experts, context 512."""
    folder = tmp_path_factory.mktemp("profiled")
    text = (SPECS / "mobilemoe-tiny.yaml").read_text()
    text = text.replace("layers: 4", "layers: 2").replace("context: 1024", f"context: {CONTEXT}")
    (folder / "spec.yaml").write_text(text)
    spec, checkpoint = str(folder / "spec.yaml"), str(folder / "checkpoint")
    synthesize = ["checkpoint", "synthesize", spec, "--out", checkpoint, "--seed", "1", "--qat", "--quiet"]
    assert cli.run([*synthesize, "--router", "structured"]) == 0
    compile_ = ["compile", spec, "--checkpoint", checkpoint, "--out", str(folder / "artifact"), "--quiet"]
    assert cli.run(compile_) == 0
    return folder
