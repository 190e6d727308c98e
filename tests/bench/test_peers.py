"""Models that peers are given: random weights that compute as a trained model would."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.sources.transformers_config import build_model, read_config

BENCH = Path(__file__).parents[2] / "bench"


def test_random_weights_have_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean makes all tokens alike after a layer or two, which then select the same experts."""
    monkeypatch.syspath_prepend(str(BENCH))
    models = importlib.import_module("peers.gguf_models")
    rows, k = 256, 1280
    data = models._random_q4_0(np.random.default_rng(0), (rows, k)).reshape(rows, k // 32, 18)
    scales = np.ascontiguousarray(data[..., :2]).view(np.float16).astype(np.float32)
    nibbles = np.concatenate([data[..., 2:] & 15, data[..., 2:] >> 4], -1)
    weights = (nibbles.astype(np.float32) - 8) * scales
    np.testing.assert_allclose(weights.var() * k, 1, rtol=0.02)  # 327,680 samples: its error is below 0.3%
    # a row of ones, which is the direction that would grow: each sum has variance 1, so their mean is near 0
    sums = weights.reshape(rows, k).sum(-1)
    assert abs(sums.mean()) < 5 / np.sqrt(rows)
    assert sums.std() < 1.2


@pytest.mark.parametrize("shape", ["lfm2-8b-a1b", "gpt-oss-20b", "qwen3.5-35b-a3b"])
def test_a_shape_has_as_many_weights_on_both_sides(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written: the tensors that llama.cpp is given are counted against those of transformers' model."""
    pytest.importorskip("gguf", reason="needs the bench extra: pip install 'moec[bench]'")
    monkeypatch.syspath_prepend(str(BENCH))
    models = importlib.import_module("peers.gguf_models")
    config = read_config(BENCH / "shapes" / shape)
    with torch.device("meta"):
        module = build_model(config, BENCH / "shapes" / shape)
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    wanted = sum(value.numel() for name, value in module.state_dict().items() if name not in tied)
    peer = models.of_transformers(config, np.random.default_rng(0))
    names = [name for name, *_ in (*peer.coded, *peer.plain)]
    assert len(names) == len(set(names))
    assert sum(math.prod(size) for _, size, _ in peer.coded) + sum(value.size for _, value in peer.plain) == wanted


@pytest.mark.parametrize(("shape", "published"), [("lfm2-8b-a1b", 24), ("gpt-oss-20b", 24), ("qwen3.5-35b-a3b", 40)])
def test_a_shape_has_the_mix_of_layers_of_its_release(shape: str, published: int) -> None:
    """Which cuts layers, and must keep the share that attends to the whole context."""
    config = read_config(BENCH / "shapes" / shape)
    full = {"lfm2-8b-a1b": 6, "gpt-oss-20b": 12, "qwen3.5-35b-a3b": 10}[shape]
    assert len(config.layer_types) == config.num_hidden_layers < published
    assert config.layer_types.count("full_attention") * published == full * config.num_hidden_layers


def test_mxfp4_codes_have_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    models = importlib.import_module("peers.gguf_models")
    data = models._random_mxfp4(np.random.default_rng(0), (256, 2880)).reshape(256, 90, 17)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = np.concatenate([data[..., 1:] & 15, data[..., 1:] >> 4], -1)
    weights = np.where(nibbles & 8, -1, 1) * values[nibbles & 7] * 2.0 ** (data[..., :1].astype(int) - 127)
    assert abs(weights.mean()) < 5 * weights.std() / np.sqrt(weights.size)
    assert 0.8 < weights.std() * np.sqrt(2880) < 1.3  # a row's product has a variance near one
