"""Models that peers are given: random weights that compute as a trained model would."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_random_weights_have_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean makes all tokens alike after a layer or two, which then select the same experts."""
    monkeypatch.syspath_prepend(str(BENCH))
    llama_cpp = importlib.import_module("peers.llama_cpp")
    rows, k = 256, 1280
    data = llama_cpp._random_q4_0(np.random.default_rng(0), (rows, k)).reshape(rows, k // 32, 18)
    scales = np.ascontiguousarray(data[..., :2]).view(np.float16).astype(np.float32)
    nibbles = np.concatenate([data[..., 2:] & 15, data[..., 2:] >> 4], -1)
    weights = (nibbles.astype(np.float32) - 8) * scales
    np.testing.assert_allclose(weights.var() * k, 1, rtol=0.02)  # 327,680 samples: its error is below 0.3%
    # a row of ones, which is the direction that would grow: each sum has variance 1, so their mean is near 0
    sums = weights.reshape(rows, k).sum(-1)
    assert abs(sums.mean()) < 5 / np.sqrt(rows)
    assert sums.std() < 1.2
