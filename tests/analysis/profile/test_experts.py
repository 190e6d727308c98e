"""Utilisation: entropy and divergence against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moec.analysis.profile import experts as x

COUNTS = hnp.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=st.integers(0, 10**6))
# sums of a few hundred float64 terms of order one: errors far below this
CLOSE = 1e-9


def test_rows_are_padded() -> None:
    assert x.counts_array([[1], [0, 0, 2]]).tolist() == [[1, 0, 0], [0, 0, 2]]
    assert x.counts_array([[1]], 3).tolist() == [[1, 0, 0]]


@given(COUNTS)
def test_entropy_and_divergence_stay_in_range(counts_LE: np.ndarray) -> None:
    assert np.all(x.entropy(counts_LE) >= -CLOSE)
    assert np.all(x.entropy(counts_LE) <= 1 + CLOSE)
    assert x.divergence(counts_LE, counts_LE) == pytest.approx(0, abs=CLOSE)
    shuffled = np.random.default_rng(0).permutation(counts_LE, axis=1)
    apart = x.divergence(counts_LE, shuffled)
    assert apart == pytest.approx(x.divergence(shuffled, counts_LE), abs=CLOSE)
    assert np.all((apart >= 0) & (apart <= 1 + CLOSE))


def test_known_values() -> None:
    assert x.entropy(np.array([[5, 5, 5, 5], [7, 0, 0, 0]])) == pytest.approx([1, 0])
    assert x.divergence(np.array([[3, 0]]), np.array([[0, 9]])) == pytest.approx([1])
    # p = (1, 0), q = (1/2, 1/2): H(3/4, 1/4) - 1/2
    assert x.divergence(np.array([[4, 0]]), np.array([[2, 2]])) == pytest.approx([0.8112781245 - 0.5])


def test_utilisation_counts_what_is_used() -> None:
    found = x.utilisation({"a": np.array([[1, 0], [3, 3]]), "b": np.array([[0, 1], [3, 3]])})
    assert (found["layers"], found["experts"]) == (2, 2)
    assert found["domains"]["a"]["experts_used"] == 3
    assert found["domains"]["a"]["experts_used_share"] == 0.75
    assert found["divergence_bits"] == {"a / b": pytest.approx(0.5)}
