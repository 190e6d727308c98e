"""Properties of the metrics: each is checked against its definition, and each can fail."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.analysis.verify import metrics

seeds = st.integers(0, 2**32 - 1)
small = st.integers(1, 150)


def _pair(seed: int, rows: int, columns: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    r = rng.standard_normal((rows, columns)).astype(np.float32)
    return r, (r + noise * rng.standard_normal((rows, columns))).astype(np.float32)


@given(seeds, small, small, st.floats(1e-3, 1.0))
@settings(max_examples=40, deadline=None)
def test_sqnr_is_its_definition(seed, rows, columns, noise):
    r, a = _pair(seed, rows, columns, noise)
    r64, a64 = r.astype(np.float64), a.astype(np.float64)
    expected = 10 * np.log10((r64**2).sum() / ((r64 - a64) ** 2).sum())
    assert metrics.sqnr_db(r, a) == pytest.approx(expected, abs=1e-9)


@given(seeds, small, small, st.floats(0.1, 10.0))
@settings(max_examples=30, deadline=None)
def test_sqnr_does_not_depend_on_a_common_scale(seed, rows, columns, scale):
    r, a = _pair(seed, rows, columns, 0.1)
    r64, a64 = r.astype(np.float64), a.astype(np.float64)
    assert metrics.sqnr_db(r64 * scale, a64 * scale) == pytest.approx(metrics.sqnr_db(r64, a64), abs=1e-6)


def test_sqnr_edges():
    zero, one = np.zeros((2, 3)), np.ones((2, 3))
    assert metrics.sqnr_db(zero, zero) == np.inf
    assert metrics.sqnr_db(one, one) == np.inf
    assert metrics.sqnr_db(zero, one) == -np.inf
    assert metrics.sqnr_db(one, zero) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.sqnr_db(one, one[:1])


@given(seeds, small, st.integers(2, 150), st.floats(0.01, 100.0))
@settings(max_examples=40, deadline=None)
def test_cosine_ignores_the_length_of_a_row_but_not_its_direction(seed, rows, columns, scale):
    r, a = _pair(seed, rows, columns, 0.3)
    cosines = metrics.row_cosines(r, a)
    assert metrics.row_cosines(r, a.astype(np.float64) * scale) == pytest.approx(cosines, abs=1e-12)
    assert metrics.row_cosines(r, -a) == pytest.approx(-cosines, abs=1e-12)
    assert metrics.row_cosines(r, r) == pytest.approx(1.0, abs=1e-12)
    assert (np.abs(cosines) <= 1.0).all()


def test_cosine_edges():
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert metrics.row_error(zero, zero) == 0.0
    assert metrics.row_error(zero, one) == np.inf
    assert metrics.row_error(one[:0], one[:0]) == 0.0
    assert metrics.row_cosines(zero, zero) == [1.0]
    assert metrics.row_cosines(zero, one) == [0.0]
    assert metrics.row_cosines(one, zero) == [0.0]
    assert np.isnan(metrics.Cosine.of(np.zeros((0, 3)), np.zeros((0, 3))).median)
    summary = metrics.Cosine.of(np.array([[1.0, 0], [1, 0], [1, 0]]), np.array([[1.0, 0], [1, 0], [0, 1]]))
    assert (summary.median, summary.minimum) == (1.0, 0.0)


@given(seeds, small, st.integers(2, 150))
@settings(max_examples=40, deadline=None)
def test_top1_counts_exactly_the_rows_that_were_changed(seed, rows, columns):
    rng = np.random.default_rng(seed)
    r = np.stack([rng.permutation(columns) for _ in range(rows)]).astype(np.float32)
    changed = rng.random(rows) < 0.3
    a = r + 0.4 * rng.random((rows, columns)).astype(np.float32)  # below half a step: the order stays
    a[changed] = -a[changed]
    assert (metrics.top1_matches(r, a) == ~changed).all()


@given(seeds, small, small, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_errors_find_the_one_wrong_element(seed, rows, columns, where):
    r, _ = _pair(seed, rows, columns, 0)
    a = r.copy()
    a.flat[where % a.size] += 0.5
    error = abs(float(a.flat[where % a.size]) - float(r.flat[where % a.size]))
    assert metrics.max_abs_error(r, a) == pytest.approx(error)
    expected = error / (1e-5 + 1e-4 * abs(float(r.flat[where % a.size])))
    assert metrics.tolerance_ratio(r, a, atol=1e-5, rtol=1e-4) == pytest.approx(expected)
    assert metrics.tolerance_ratio(r, r, atol=1e-5, rtol=1e-4) == 0.0
    size = float(np.abs(r[where % a.size // columns]).max())
    assert metrics.row_error(r, a) == pytest.approx(error / size)
    assert metrics.row_error(r, r) == 0.0
    assert metrics.row_errors(r, a).nonzero()[0].tolist() == [where % a.size // columns]


@given(seeds, small, small)
@settings(max_examples=30, deadline=None)
def test_ratio_is_at_most_one_exactly_when_allclose(seed, rows, columns):
    rng = np.random.default_rng(seed)
    r, a = _pair(seed, rows, columns, 10.0 ** rng.uniform(-7, -3))
    close = np.allclose(a.astype(np.float64), r.astype(np.float64), atol=1e-5, rtol=1e-4)
    assert (metrics.tolerance_ratio(r, a, atol=1e-5, rtol=1e-4) <= 1.0) == close


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_passes_nothing(poison):
    r, a = _pair(0, 9, 70, 0.0)
    a[4, 3] = poison
    assert metrics.sqnr_db(r, a) == -np.inf
    assert metrics.Cosine.of(r, a).minimum == -1.0
    assert not metrics.top1_matches(r, a)[4]
    assert metrics.max_abs_error(r, a) == np.inf
    assert metrics.row_error(r, a) == np.inf
    assert metrics.tolerance_ratio(r, a, atol=1e-5, rtol=1e-4) == np.inf


@given(seeds, small, st.integers(2, 64))
@settings(max_examples=40, deadline=None)
def test_router_agreement_compares_sets(seed, tokens, experts):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, experts))
    scores = np.stack([rng.permutation(experts) for _ in range(tokens)]) / experts  # all gaps are 1 / experts
    chosen = np.argsort(-scores, -1)[:, :k]
    shuffled = rng.permuted(chosen, axis=-1)
    agreement = metrics.router_agreement(chosen, shuffled, scores, tie_gap=1e-5)
    assert agreement == metrics.RouterAgreement(tokens, 0, tokens)
    wrong = rng.random(tokens) < 0.4
    shuffled[wrong, 0] = np.argsort(-scores, -1)[wrong, k]  # rank k + 1 instead of one of the chosen
    agreement = metrics.router_agreement(chosen, shuffled, scores, tie_gap=1e-5)
    assert agreement.equal == tokens - wrong.sum()
    assert agreement.fraction == pytest.approx(1 - wrong.mean())


def test_ties_are_left_out_and_counted():
    scores = np.array([[0.9, 0.5, 0.5 - 1e-7, 0.1], [0.9, 0.5, 0.4, 0.1], [0.9, 0.5, 0.4, 0.1]])
    reference = np.array([[0, 1], [0, 1], [0, 1]])
    actual = np.array([[0, 2], [1, 0], [0, 2]])  # a tie, an order, a mistake
    agreement = metrics.router_agreement(reference, actual, scores, tie_gap=1e-5)
    assert agreement == metrics.RouterAgreement(tokens=3, ties=1, equal=1)
    assert agreement.fraction == 0.5
    strict = metrics.router_agreement(reference, actual, scores, tie_gap=0.0)
    assert strict == metrics.RouterAgreement(tokens=3, ties=0, equal=1)
    total = agreement + strict
    assert (total.tokens, total.ties, total.compared, total.equal) == (6, 1, 5, 2)


def test_nothing_compared_is_not_agreement():
    agreement = metrics.router_agreement(np.array([[0]]), np.array([[0]]), np.zeros((1, 3)), tie_gap=1e-5)
    assert agreement.ties == 1
    assert np.isnan(agreement.fraction)


def test_an_expert_named_twice_is_no_selection():
    scores = np.array([[3.0, 2.0, 1.0]])
    assert metrics.router_agreement(np.array([[0, 1]]), np.array([[0, 0]]), scores, tie_gap=0.1).equal == 0


def test_all_experts_selected_is_never_a_tie():
    scores = np.ones((4, 3))
    assert (metrics.selection_gaps(scores, 3) == np.inf).all()
    with pytest.raises(ValueError, match="top_k"):
        metrics.selection_gaps(scores, 4)
