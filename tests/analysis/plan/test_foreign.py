"""Models of transformers as the planner counts them, against the artifacts that they become."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.analysis.plan.memory import file_bytes, weight_bytes
from moec.analysis.plan.planner import model_of
from moec.compiler import build
from moec.compiler.architecture import Cache
from moec.compiler.artifact import read_manifest
from moec.compiler.spec import Spec, load_spec
from moec.sources.transformers_source import TransformersModel
from tests.variants import quick

pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")

FAMILIES = Path(__file__).parents[3] / "specs" / "families"
LENGTH = 256


def spec_of(family: str, folder: Path, **changes: object) -> Spec:
    from moec.sources.random_checkpoint import save_random

    spec = load_spec(FAMILIES / f"{family}.yaml")
    assert isinstance(spec.model, TransformersModel)
    save_random(spec.model.transformers, folder, seed=7, changes={"max_position_embeddings": LENGTH, **changes})
    return spec.model_copy(update={"model": TransformersModel(transformers=folder)})


STATES = ["lfm2-moe", "qwen3-next", "qwen3-5-moe", "granite-4-h", "nemotron-h"]


@pytest.mark.parametrize("family", quick(["qwen3-moe", "deepseek-v3", "gpt-oss", *STATES], ("gpt-oss", "nemotron-h")))
def test_memory_is_the_artifacts(family: str, tmp_path: Path) -> None:
    """Caches exactly: INT8 rows, keys and values of different widths with latent attention, states of fixed size."""
    spec = spec_of(family, tmp_path / "model")
    build.compile(spec, "xnnpack", tmp_path / "model", tmp_path / "artifact")
    manifest = read_manifest(tmp_path / "artifact")
    options = spec.targets["xnnpack"]
    model = model_of(spec, "xnnpack", options)
    a, method = model.architecture, manifest.details["methods"]["forward"]
    assert a.context == LENGTH
    assert model.cache_bytes(LENGTH) == method["arena_bytes"][1]
    stored = sum(size for role, size in manifest.sizes_by_role.items() if role != "constant")
    assert weight_bytes(model) == pytest.approx(stored, rel=0.01)
    assert model.footprint.instructions(a) == pytest.approx(method["instructions"], rel=0.15)
    assert file_bytes(model) == pytest.approx((tmp_path / "artifact" / "model.pte").stat().st_size, rel=0.1)


def test_windows_are_those_of_the_config(tmp_path: Path) -> None:
    """A window by layer, one for all layers, and one that the config switches off."""

    def windows(family: str, name: str, **changes: object) -> list[int]:
        spec = spec_of(family, tmp_path / name, **changes)
        return [c.window for c in model_of(spec, "xnnpack", spec.targets["xnnpack"]).architecture.caches]

    assert windows("mixtral", "all", sliding_window=32) == [32, 32]
    assert windows("mixtral", "none", sliding_window=None) == [0, 0]
    kinds = ["full_attention", "sliding_attention"]
    assert windows("qwen2-moe", "some", sliding_window=32, use_sliding_window=True, layer_types=kinds) == [0, 32]
    assert windows("qwen2-moe", "off", sliding_window=32, use_sliding_window=False) == [0, 0]


def test_attention_goes_over_what_is_seen() -> None:
    windowed = Cache(2, 64, 32, window=100)
    assert (windowed.seen(9), windowed.seen(500)) == (10, 100)
    assert windowed.macs(8, 9) == 8 * 96 * 10
