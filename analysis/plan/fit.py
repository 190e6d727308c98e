"""`moec fit`: the scaling law of scaling_law.py fitted to a user's own runs, with bootstrap intervals.

Least squares over the nine coefficients (scipy's trust region, from several starts). A, B and c are kept positive: no
loss is below zero however large a model is. Runs are resampled with replacement for the intervals; a resample that no
longer determines the coefficients is drawn again.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.analysis.plan.scaling_law import COEFFICIENTS, E_MAX, E_START, PUBLISHED, Law, Range
from moec.compiler.errors import MissingExtra, UserError
from moec.compiler.files import read_bytes
from moec.compiler.spec.strict import suggestion

COLUMNS = ("active_parameters", "tokens", "experts", "loss")
LEAST_RUNS = 12  # nine coefficients, and something left to judge the fit by
LEAST_SIZES, LEAST_TOKENS, LEAST_EXPERTS = 3, 3, 2  # a power law with a constant needs three points of each axis
LEAST_EXPLAINED = 0.5  # of the losses' variance: below it the law says less of a run than it leaves open
_MOST_BYTES = 64 << 20  # of a file of that many rows
_MOST_ROWS = 100_000
_LEAST_COUNT = 1e4  # fewer parameters or tokens are no training run: they are written in millions or billions
_LOGARITHMS = tuple(COEFFICIENTS.index(name) for name in ("A", "B", "c"))
Runs = np.ndarray  # float64 [runs, 4] in the order of COLUMNS, the first two in billions


@dataclass(frozen=True)
class Fit:
    """The law, and for each coefficient (and the loss and best E at the middle of the runs) its 95% interval.

    explained: the share of the losses' variance that the law gives back.
    """

    law: Law
    runs: int
    explained: float
    bootstrap: int
    intervals: dict[str, tuple[float, float]]
    at: tuple[float, float]  # the middle: billions of parameters, billions of tokens
    best_experts: int
    best_experts_share: float  # share of resamples that agree on best_experts


def read_runs(file: Path) -> Runs:
    """Runs of a CSV with a header; other columns are ignored. UserError with the line of what cannot be used."""
    rows: list[list[float]] = []
    try:
        text = read_bytes(file, limit=_MOST_BYTES, remedy="give a CSV of runs").decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        _check_columns(reader.fieldnames, file)
        for row in reader:
            if len(rows) == _MOST_ROWS:
                raise UserError(f"more than {_MOST_ROWS} runs", place=str(file), remedy="give the final losses only")
            rows.append([_number(row.get(column), column, f"{file}:{reader.line_num}") for column in COLUMNS])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"is no CSV text: {error}", place=str(file), remedy="give a CSV of runs") from None
    runs = np.array(rows, np.float64).reshape(-1, len(COLUMNS))
    runs[:, :2] /= 1e9
    check_fittable(runs, str(file))
    return runs


def _check_columns(found: Sequence[str] | None, file: Path) -> None:
    names = [name.strip() for name in found or [] if name]
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        hint = suggestion(missing[0], [n for n in names if n not in COLUMNS]) if names else ""
        raise UserError(
            f"has no column {missing[0]}{hint}", place=f"{file}:1", remedy=f"the header must name {', '.join(COLUMNS)}"
        )
    twice = [column for column in COLUMNS if names.count(column) > 1]
    if twice:
        raise UserError(f"has two columns {twice[0]}", place=f"{file}:1", remedy="keep one of them")


def _number(text: Any, column: str, place: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        shown = "nothing" if text in (None, "") else repr(text)[:40]
        raise UserError(
            f"{column} is {shown}, expected a number", place=place, remedy="correct or remove the run"
        ) from None
    least = 1.0 if column == "experts" else 0.0
    if not math.isfinite(value) or value < least or (value == 0.0 and least == 0.0):
        diverged = column == "loss" and not math.isfinite(value)
        raise UserError(
            f"{column} is {value:g}, expected a finite number {'from 1 up' if least else 'above 0'}",
            place=place,
            remedy="a run that diverged does not follow the law: remove it"
            if diverged
            else "correct or remove the run",
        )
    if column in ("active_parameters", "tokens") and value < _LEAST_COUNT:
        raise UserError(
            f"{column} is {value:g}: it is counted in ones, not in millions or billions",
            place=place,
            remedy="write 0.3 billion as 0.3e9",
        )
    return value


def check_fittable(runs: Runs, place: str) -> None:
    """UserError when the runs cannot determine the coefficients, with what is missing."""
    if len(runs) < LEAST_RUNS:
        raise UserError(
            f"{len(runs)} runs, the law has {len(COEFFICIENTS)} coefficients and needs at least {LEAST_RUNS}",
            place=place,
        )
    for column, least, what in (
        (0, LEAST_SIZES, "active_parameters"),
        (1, LEAST_TOKENS, "tokens"),
        (2, LEAST_EXPERTS, "experts"),
    ):
        values = np.unique(runs[:, column])
        if len(values) < least:
            listed = ", ".join(f"{v:g}" for v in values)
            unit = " (billions)" if column < 2 else ""
            raise UserError(
                f"only {len(values)} value{'s' if len(values) > 1 else ''} of {what}: {listed}{unit}",
                place=place,
                remedy=f"the law needs runs at {least} or more",
            )
    if np.ptp(runs[:, 3]) == 0:
        raise UserError("every run has the same loss", place=place, remedy="there is nothing to fit")


def fit(runs: Runs, *, bootstrap: int = 0, seed: int = 0, source: str = "moec fit") -> Fit:
    """Fit the law to checked runs. MissingExtra without scipy; UserError when no start converges to finite numbers,
    and when the law that comes closest leaves more of the losses open than it explains.
    """
    best = _solve(runs, _starts(runs, seed))
    if best is None:
        raise UserError("no fit converged", place=source, remedy="check the runs: losses must follow some trend")
    law = _law(best, runs, source)
    explained = 1.0 - law.rmse**2 / float(np.var(runs[:, 3]))
    if explained < LEAST_EXPLAINED:
        raise UserError(
            f"these runs do not follow the law: it explains {max(explained, 0.0):.0%} of the variance of their losses "
            f"(an error of {law.rmse:.3g} in a spread of {float(np.std(runs[:, 3])):.3g})",
            place=source,
            remedy="give final losses of runs that differ in parameters, tokens and experts alone",
        )
    middle = float(np.median(runs[:, 0])), float(np.median(runs[:, 1]))
    choices = sorted({int(e) for e in np.unique(runs[:, 2])})
    samples = list(_resamples(runs, bootstrap, seed, best))
    laws = [_law(theta, runs, source) for theta in samples]
    chosen = _best_experts(law, middle, choices)
    agreed = sum(_best_experts(other, middle, choices) == chosen for other in laws)
    intervals: dict[str, tuple[float, float]] = {}
    if laws:
        for name in COEFFICIENTS:
            intervals[name] = _interval([getattr(other, name) for other in laws])
        intervals["loss at the middle"] = _interval([other.loss(*middle, chosen) for other in laws])
    return Fit(law, len(runs), explained, len(laws), intervals, middle, chosen, agreed / len(laws) if laws else 1.0)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(np.array(values), (0.025, 0.975))
    return float(low), float(high)


def _best_experts(law: Law, at: tuple[float, float], choices: Sequence[int]) -> int:
    return min(choices, key=lambda e: law.loss(*at, e))


def _law(theta: np.ndarray, runs: Runs, source: str) -> Law:
    ranges = [Range(float(runs[:, i].min()), float(runs[:, i].max())) for i in range(3)]
    error = float(np.sqrt(np.mean(_residuals(theta, runs) ** 2)))
    numbers = dict(zip(COEFFICIENTS, _natural(theta), strict=True))
    return Law(**numbers, rmse=error, parameters=ranges[0], tokens=ranges[1], experts=ranges[2], source=source)


def _natural(theta: np.ndarray) -> list[float]:
    return [math.exp(t) if i in _LOGARITHMS else float(t) for i, t in enumerate(theta)]


def _residuals(theta: np.ndarray, runs: Runs) -> np.ndarray:
    log_a, delta, alpha, gamma, log_b, omega, beta, zeta, log_c = theta
    n, d, experts, loss = runs.T
    effective = 1.0 / (1.0 / (experts - 1.0 + 1.0 / (1.0 / E_START - 1.0 / E_MAX)) + 1.0 / E_MAX)
    log_e, log_n, log_d = np.log(effective), np.log(n), np.log(d)
    capacity = np.exp(np.clip(log_a + delta * log_e + (alpha + gamma * log_e) * log_n, -60, 60))
    data = np.exp(np.clip(log_b + omega * log_e + (beta + zeta * log_e) * log_d, -60, 60))
    return capacity + data + np.exp(np.clip(log_c, -60, 60)) - loss


def _starts(runs: Runs, seed: int) -> list[np.ndarray]:
    """The published law shifted to the runs' level, and others around it."""
    published = np.array([getattr(PUBLISHED, name) for name in COEFFICIENTS])
    for index in _LOGARITHMS:
        published[index] = math.log(published[index])
    rng = np.random.default_rng(seed)
    starts = [published]
    for _ in range(7):
        other = published * rng.uniform(0.3, 1.7, published.size)
        other[8] = math.log(runs[:, 3].min() * rng.uniform(0.5, 0.98))
        starts.append(other)
    return starts


def _solve(runs: Runs, starts: Sequence[np.ndarray]) -> np.ndarray | None:
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MissingExtra("fitting needs scipy", remedy="pip install 'moec[plan]'") from None
    best, cost = None, math.inf
    for start in starts:
        found = least_squares(_residuals, start, args=(runs,), x_scale="jac", max_nfev=4000, xtol=1e-12, ftol=1e-12)
        if np.all(np.isfinite(found.x)) and found.cost < cost:
            best, cost = found.x, found.cost
    return best


def _resamples(runs: Runs, count: int, seed: int, start: np.ndarray) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for _ in range(20 * count):
        if len(found) == count:
            break
        drawn = runs[rng.integers(0, len(runs), len(runs))]
        enough = (LEAST_SIZES, LEAST_TOKENS, LEAST_EXPERTS)
        if any(len(np.unique(drawn[:, i])) < least for i, least in enumerate(enough)):
            continue
        solved = _solve(drawn, [start])
        if solved is not None:
            found.append(solved)
    return found
