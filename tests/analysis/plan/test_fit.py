"""`moec fit`: the law found again from runs that follow it, intervals that hold it, and runs that cannot be fitted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moec.analysis.plan.fit import check_fittable, fit, read_runs
from moec.analysis.plan.scaling_law import COEFFICIENTS, PUBLISHED, load_law
from moec.compiler.errors import MissingExtra, UserError
from tests.conftest import Moec

pytest.importorskip("scipy", reason="needs the plan extra: pip install 'moec[plan]'")

HEADER = "active_parameters,tokens,experts,loss"


def runs(noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """The paper's grid, with losses of its law."""
    rng = np.random.default_rng(seed)
    grid = [(n, d, e) for n in (0.3, 0.5, 0.9) for d in (100, 200, 300, 400, 500) for e in (1, 2, 4, 8, 16, 32)]
    return np.array([(n, d, e, PUBLISHED.loss(n, d, e) + rng.normal(0, noise)) for n, d, e in grid])


def text_of(rows: Sequence[Sequence[object]], header: str = HEADER) -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def rows_of(table: np.ndarray) -> list[list[object]]:
    return [[n * 1e9, d * 1e9, int(e), loss] for n, d, e, loss in table]


def test_runs_of_the_law_give_the_law() -> None:
    """Without noise the least squares are zero: the coefficients come back to what double precision leaves of them."""
    found = fit(runs())
    assert found.law.rmse < 1e-6
    for name in COEFFICIENTS:
        assert getattr(found.law, name) == pytest.approx(getattr(PUBLISHED, name), rel=1e-2), name
    assert found.best_experts == 4
    assert found.best_experts == min((1, 2, 4, 8, 16, 32), key=lambda e: PUBLISHED.loss(*found.at, e))


def test_noise_comes_back_as_error_and_intervals() -> None:
    """With noise of 0.003 the RMSE is that noise (81 degrees of freedom: within 20%), and intervals hold the truth.

    95% intervals of nine coefficients that hang together: at least seven of nine must hold, and the loss must.
    """
    found = fit(runs(0.003, seed=3), bootstrap=60, seed=1)
    assert found.law.rmse == pytest.approx(0.003, rel=0.2)
    held = [low <= getattr(PUBLISHED, name) <= high for name, (low, high) in found.intervals.items() if len(name) < 6]
    assert sum(held) >= 7
    low, high = found.intervals["loss at the middle"]
    assert low <= PUBLISHED.loss(*found.at, found.best_experts) <= high
    assert high - low < 0.01
    assert found.bootstrap == 60
    assert 0.5 < found.best_experts_share <= 1


def test_the_same_seed_gives_the_same_intervals() -> None:
    table = runs(0.003)
    assert fit(table, bootstrap=4, seed=5).intervals == fit(table, bootstrap=4, seed=5).intervals
    assert fit(table, bootstrap=4, seed=5).intervals != fit(table, bootstrap=4, seed=6).intervals


def test_fit_command(moec: Moec, tmp_path: Path) -> None:
    file, out = tmp_path / "runs.csv", tmp_path / "law.json"
    # another order of columns, one more, a byte order mark, as spreadsheets write them
    rows = [[f"run {i}", loss, e, d, n] for i, (n, d, e, loss) in enumerate(rows_of(runs(0.002)))]
    file.write_text("\ufeff" + text_of(rows, "name,loss,experts,tokens,active_parameters"))
    status, printed, _ = moec("fit", file, "--bootstrap", 5, "--out", out)
    assert status == 0
    assert "90 runs" in printed
    law = load_law(out)
    assert (law.parameters.low, law.tokens.high, law.experts.high) == (0.3, 500, 32)
    status, printed, _ = moec("fit", file, "--bootstrap", 0, "--json")
    facts = json.loads(printed)
    assert facts["runs"] == 90
    assert facts["law"]["rmse"] == pytest.approx(0.002, rel=0.3)
    status, printed, err = moec("search", "--device", "galaxy-s25", "--law", out, "--max-active", "0.32e9")
    assert status == 0
    assert "left out" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:11], r"11 runs, the law has 9 coefficients and needs at least 12"),
        (lambda r: [], r"0 runs"),
        (lambda r: [x for x in r if x[2] == 8], r"only 1 value of experts: 8; the law needs runs at 2 or more"),
        (lambda r: [x for x in r if x[0] < 0.6e9], r"only 2 values of active_parameters: 0\.3, 0\.5 \(billions\)"),
        (lambda r: [x for x in r if x[1] == 100e9], r"only 1 value of tokens: 100 \(billions\)"),
        (lambda r: [[*x[:3], 2.5] for x in r], "every run has the same loss"),
        (lambda r: [*r[:20], [*r[20][:3], "nan"], *r[21:]], r":22: loss is nan, expected a finite number above 0"),
        (lambda r: [*r[:20], [*r[20][:3], "inf"], *r[21:]], r":22: loss is inf"),
        (lambda r: [[-0.3e9, *r[0][1:]], *r[1:]], r":2: active_parameters is -3e\+08"),
        (lambda r: [[*r[0][:2], 0.5, 2.3], *r[1:]], r":2: experts is 0\.5, expected a finite number from 1 up"),
        (lambda r: [[*r[0][:2], "eight", 2.3], *r[1:]], r":2: experts is 'eight', expected a number"),
        (lambda r: [r[0][:2], *r[1:]], r":2: experts is nothing, expected a number"),
        (lambda r: [[0.3, *r[0][1:]], *r[1:]], r":2: active_parameters is 0\.3: it is counted in ones.*0\.3e9"),
        (lambda r: [[r[0][0], 500, *r[0][2:]], *r[1:]], r":2: tokens is 500: it is counted in ones"),
    ],
)
def test_runs_that_cannot_be_fitted(tmp_path: Path, change: Callable[[list], list], message: str) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(text_of(change(rows_of(runs()))))
    with pytest.raises(UserError, match=message) as caught:
        read_runs(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_losses_that_follow_no_law_give_none(moec: Moec, tmp_path: Path) -> None:
    """Losses by lot: nine coefficients cannot explain half of the variance of ninety of them."""
    table = runs()
    table[:, 3] = np.random.default_rng(0).uniform(1.0, 5.0, len(table))
    file, out = tmp_path / "runs.csv", tmp_path / "law.json"
    file.write_text(text_of(rows_of(table)))
    status, printed, err = moec("fit", file, "--out", out)
    assert (status, printed, err.count("\n")) == (2, "", 1)
    assert "do not follow the law" in err
    assert not out.exists()


def test_no_loss_below_zero() -> None:
    """Few noisy runs leave c open; every resample's law must be one that losses can have."""
    table = runs(0.0076, seed=1)
    found = fit(table, bootstrap=30)
    assert 0.9 < found.explained < 1
    low, high = found.intervals["c"]
    assert 0 <= low <= PUBLISHED.c <= high < table[:, 3].min()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("active_parameters,tokens,experts,los", "has no column loss; did you mean 'los'?"),
        ("n,d,e,l", "has no column active_parameters"),
        ("", "has no column active_parameters"),
        ("active_parameters,tokens,experts,loss,loss", "has two columns loss"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, header: str, message: str) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(text_of(rows_of(runs()), header) if header else "")
    with pytest.raises(UserError) as caught:
        read_runs(file)
    assert message in str(caught.value)


def test_files_that_are_no_runs(moec: Moec, tmp_path: Path) -> None:
    binary = tmp_path / "x.csv"
    binary.write_bytes(b"\xff\xfe\x00loss" * 50)
    for file, message in (
        (tmp_path / "nowhere.csv", "cannot be read"),
        (tmp_path, "is a folder"),
        (binary, "is no CSV"),
    ):
        status, out, err = moec("fit", file)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_random_bytes_never_crash(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = tmp_path / "runs.csv"
    good = text_of(rows_of(runs())).encode()
    faults: list[str] = []
    for _ in range(60):
        damaged = bytearray(good)
        for at in rng.integers(0, len(good), 8):
            damaged[at] = int(rng.integers(0, 256))
        file.write_bytes(bytes(damaged))
        try:
            check_fittable(read_runs(file), "x")
        except UserError as error:
            faults.append(str(error))
    assert faults
    assert not any("\n" in fault for fault in faults)


def test_scipy_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtra, match=r"pip install 'moec\[plan\]'"):
        fit(runs())
