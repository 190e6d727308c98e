"""The on-device scaling law of MobileMoE (arXiv 2605.27358, Eq. 1-2): loss from active parameters, tokens and experts.

    L(N, D, E) = A Eh^delta N^(alpha + gamma ln Eh) + B Eh^omega D^(beta + zeta ln Eh) + c
    1 / Eh = 1 / (E - 1 + (1/E_start - 1/E_max)^-1) + 1 / E_max,   E_start = 1, E_max = 32

N active parameters and D training tokens, both in billions; E experts, each as wide as the dense block (granularity
divides them further and leaves N and E as they are). The coefficients are those of the paper's sweep over E; its
coefficients for each granularity are not public, and of the sweep over a shared expert only two numbers are:
A is .1224 with and .1670 without, of which we use that the first is smaller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes

_MAX_LAW = 1 << 20  # bytes
COEFFICIENTS = ("A", "delta", "alpha", "gamma", "B", "omega", "beta", "zeta", "c")
E_START, E_MAX = 1.0, 32.0


@dataclass(frozen=True)
class Range:
    """Inclusive ends of what was swept."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        # counts are compared after rounding to a tenth of a percent: 0.2719 is the 0.272 of the sweep
        return self.low * 0.999 <= value <= self.high * 1.001

    def nearest(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Law:
    """A fitted law, its error on its runs, and the range of those runs (billions, billions, experts)."""

    A: float
    delta: float
    alpha: float
    gamma: float
    B: float
    omega: float
    beta: float
    zeta: float
    c: float
    rmse: float
    parameters: Range
    tokens: Range
    experts: Range
    source: str

    def loss(self, n: float, d: float, experts: float) -> float:
        """Loss (nats a token) of `n` billion active parameters, `d` billion tokens, `experts` experts."""
        e = effective_experts(experts)
        log_e = math.log(e)
        capacity = self.A * e**self.delta * n ** (self.alpha + self.gamma * log_e)
        data = self.B * e**self.omega * d ** (self.beta + self.zeta * log_e)
        return capacity + data + self.c

    def outside(self, n: float, d: float, experts: float) -> list[str]:
        """What lies outside the fitted range, in words; empty when the law may be asked."""
        asked = (
            ("active parameters", "B", n, self.parameters),
            ("training tokens", "B", d, self.tokens),
            ("experts", "", experts, self.experts),
        )
        return [
            f"{value:g}{unit and ' ' + unit} {what}: the law was fitted from {r.low:g} to {r.high:g}"
            for what, unit, value, r in asked
            if not r.holds(value)
        ]


def effective_experts(experts: float) -> float:
    """Eh of Eq. 2: 1 for one expert, and it saturates towards E_max. ValueError below one expert."""
    if experts < 1:
        raise ValueError(f"{experts} experts")
    return 1.0 / (1.0 / (experts - 1.0 + 1.0 / (1.0 / E_START - 1.0 / E_MAX)) + 1.0 / E_MAX)


#: The paper's fit over E. N: the active counts of its three sizes, nominally .3, .5 and .9 billion.
PUBLISHED = Law(
    A=0.2388,
    delta=0.0906,
    alpha=-0.2833,
    gamma=0.0387,
    B=0.6019,
    omega=1.0593,
    beta=-0.3210,
    zeta=-0.3684,
    c=1.9730,
    rmse=0.0076,
    parameters=Range(0.2715, 0.922),
    tokens=Range(100.0, 500.0),
    experts=Range(1.0, 32.0),
    source="arXiv 2605.27358, fit over E",
)


def training_flops(parameters: float, tokens: float) -> float:
    """6 N D (Eq. 3): parameters and tokens as they are, not in billions."""
    return 6.0 * parameters * tokens


def law_text(law: Law) -> str:
    """A law as the JSON file that `moec search --law` reads."""
    return json.dumps(asdict(law), indent=2) + "\n"


def load_law(file: Path) -> Law:
    """A law that `moec fit --out` wrote. UserError when it is missing, no JSON, or incomplete."""
    remedy = "name a file that `moec fit RUNS.csv --out FILE` wrote"
    try:
        raw = json.loads(read_bytes(file, limit=_MAX_LAW, remedy=remedy))
    except (ValueError, RecursionError):
        raise UserError("is no JSON", place=str(file), remedy=remedy) from None
    try:
        numbers = {name: _number(raw, name) for name in (*COEFFICIENTS, "rmse")}
        ranges = {name: _range(raw[name]) for name in ("parameters", "tokens", "experts")}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"is no scaling law: {error}", place=str(file), remedy=remedy) from None
    fields: dict[str, Any] = {**numbers, **ranges, "source": str(raw.get("source", file))}
    return Law(**fields)


def _number(raw: Mapping[str, Any], key: str) -> float:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}")
    return float(value)


def _range(raw: Mapping[str, Any]) -> Range:
    found = Range(_number(raw, "low"), _number(raw, "high"))
    if not 0 < found.low <= found.high:
        raise ValueError(f"a range from {found.low} to {found.high}")
    return found
