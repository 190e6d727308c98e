"""`moec verify` of layers with a state: the exported program that it compares with holds scans, which have graphs of
their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.analysis.verify.interpret import GraphRunner
from moec.compiler import build
from moec.compiler.spec import load_spec
from moec.sources.random_checkpoint import save_random
from moec.sources.transformers_source import TransformersModel
from tests.conftest import Moec
from tests.passes.state_zoo import Selective, zoo

pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")
FAMILIES = Path(__file__).parents[3] / "specs" / "families"


def test_a_graph_with_a_scan_runs() -> None:
    program = zoo(Selective)
    assert any(node.op == "get_attr" for node in program.graph.nodes)
    tokens = [3, 1, 4, 1, 5, 9, 2]
    whole = GraphRunner(program)(tokens, 0)
    steps = GraphRunner(program)
    torch.testing.assert_close(torch.cat([steps([t], i) for i, t in enumerate(tokens)]), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nemotron-h", "granite-4-h", "lfm2-moe", "qwen3-next"])
def test_verify_passes(family: str, tmp_path: Path, moec: Moec) -> None:
    spec = load_spec(FAMILIES / f"{family}.yaml")
    assert isinstance(spec.model, TransformersModel)
    save_random(spec.model.transformers, tmp_path / "checkpoint", seed=1)
    build.compile(spec, "xnnpack", tmp_path / "checkpoint", tmp_path / "artifact")
    options = ["--checkpoint", tmp_path / "checkpoint", "--tokens", "24", "--quality-tokens", "24", "--quiet"]
    status, out, err = moec("verify", tmp_path / "artifact", *options)
    assert status == 0, out + err
    assert "passed; KL divergence" in out
