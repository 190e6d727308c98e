"""The attention that gpt-oss's is compared with: the same but for the sinks, or the windows, too."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moec.compiler.ops import CachedAttention
from moec.compiler.pipeline import run_passes
from moec.passes.pipelines import pipeline
from moec.sources.transformers_config import build_model, read_config
from moec.sources.transformers_model import export_config

pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")
ROOT = Path(__file__).parents[2]
TINY = ROOT / "specs" / "families" / "gpt_oss"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("bench_sinks")


def test_an_ordinary_softmax_is_that_of_sinks_without_weight(bench: ModuleType) -> None:
    torch.manual_seed(0)
    model = build_model(read_config(TINY), TINY).eval()
    tokens = torch.randint(96, (1, 20))  # more than a window of 8
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
        some = model(tokens).logits
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
        none = model(tokens).logits
        with bench._without_sinks():
            ordinary = model(tokens).logits
        after = model(tokens).logits
    torch.testing.assert_close(ordinary, none, rtol=1e-5, atol=1e-5)  # another order of sums
    assert torch.equal(after, none)
    assert (some - none).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "sinks", "windows"), [("release", 2, 1), ("no sinks", 0, 1), ("ordinary", 0, 0)])
def test_each_kind_is_one_kernel_a_layer(bench: ModuleType, kind: str, sinks: int, windows: int) -> None:
    config = read_config(TINY)
    config.layer_types = bench.layer_types(kind, 2)
    with bench.attention_of(kind):
        program = run_passes(export_config(config, TINY, "tiny", eos_ids=()), pipeline(None))
    calls = [CachedAttention.of(n) for n in program.graph.nodes if "cached_attention" in str(n.target)]
    assert len(calls) == 2
    assert sum(call.sinks is not None for call in calls) == sinks
    assert sum(call.window == 8 for call in calls) == windows
