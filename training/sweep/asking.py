"""What the options of a sweep say: the values of its factors, and its budget."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from moec.compiler.errors import UserError
from moec.compiler.spec import Spec
from moec.compiler.spec.strict import suggestion
from moec.sources.decoder.config import decoder_of
from moec.training.sweep.grid import EXPERTS, GRANULARITIES, SHARED, Grid, of_spec

FACTORS = ("experts", "granularity", "shared", "d_model", "tokens")
_MOST_VALUES = 64  # of a factor
_UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}
_TIMES = {"s": 1.0, "min": 60.0, "h": 3600.0}


def grid_of(spec: Spec, vary: str, values: Mapping[str, str | None], tokens: int | None) -> Grid:
    """The grid of --vary and of the option of each factor; a factor that does not vary has one value, by default the
    spec's. tokens: of the budget. UserError with the option at fault.
    """
    model = decoder_of(spec, "swept")
    varied = [name.strip().replace("-", "_") for name in vary.split(",")]
    unknown = [name for name in varied if name not in FACTORS]
    if unknown:
        what = f"{unknown[0]!r} is no factor" + suggestion(unknown[0], FACTORS)
        raise UserError(what, place="--vary", remedy=f"the factors are {', '.join(FACTORS)}")
    own = dict(zip(("experts", "granularity", "shared"), of_spec(model), strict=True))
    standard: dict[str, tuple[Any, ...]] = {"experts": EXPERTS, "granularity": GRANULARITIES, "shared": SHARED}
    found: dict[str, tuple[Any, ...]] = {}
    for factor in ("experts", "granularity", "shared", "d_model"):
        given = _values(factor, values.get(factor))
        if factor == "d_model":
            found[factor] = given or (model.d_model,)
        elif factor in varied:
            found[factor] = given or standard[factor]
        else:
            found[factor] = given or (_whole(factor, own[factor]),)
        _check_count(factor, varied, given, found[factor])
    given = _values("tokens", values.get("tokens"))
    if given and tokens is not None:
        raise UserError("--tokens and tokens in --budget are given", place="moec sweep", remedy="choose one")
    found["tokens"] = given or (() if tokens is None else (tokens,))
    _check_count("tokens", varied, given, found["tokens"])
    return Grid(**found)


def _check_count(factor: str, varied: list[str], given: tuple[Any, ...], found: tuple[Any, ...]) -> None:
    option = f"--{factor.replace('_', '-')}"
    if factor in varied and len(found) < 2:
        raise UserError(f"{factor} varies and has {len(found)} values", place=option, remedy="name two or more")
    if factor not in varied and len(given) > 1:
        raise UserError(f"{len(given)} values, and --vary does not name {factor}", place=option, remedy="add it there")


def _whole(factor: str, value: float) -> Any:
    if isinstance(value, bool) or value == int(value):
        return value if isinstance(value, bool) else int(value)
    remedy = f"give --{factor} NUMBER, or vary it"
    raise UserError(
        f"the spec's own model has {factor} {value:g}, which is no whole number", place="moec sweep", remedy=remedy
    )


def _values(factor: str, text: str | None) -> tuple[Any, ...]:
    if text is None:
        return ()
    option = f"--{factor.replace('_', '-')}"
    read: dict[str, Callable[[str, str], Any]] = {"shared": _switch, "tokens": _tokens}
    found = tuple(read.get(factor, _count)(part.strip(), option) for part in text.split(","))
    if len(found) > _MOST_VALUES:
        raise UserError(f"{len(found)} values, at most {_MOST_VALUES}", place=option, remedy="name fewer")
    if len(set(found)) < len(found):
        raise UserError("names a value twice", place=option, remedy="name each once")
    return found


def _switch(text: str, option: str) -> bool:
    if text not in ("on", "off"):
        raise UserError(f"{text!r} is neither on nor off", place=option, remedy="use on, off, or both: off,on")
    return text == "on"


def _count(text: str, option: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", text) or int(text) < 1:
        raise UserError(f"{text!r} is no number from 1 up", place=option, remedy="give numbers such as 1,4,16")
    return int(text)


def _tokens(text: str, option: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([kKMB]?)", text)
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 1 <= value <= 1e15:
        raise UserError(f"{text!r} is no number of tokens", place=option, remedy="write 500k, 2M, 1B or 2e6")
    return round(value)


def budget_of(text: str | None) -> tuple[int | None, float | None]:
    """(tokens of each run, seconds of all runs) of --budget; None for what it does not say."""
    tokens: int | None = None
    time: float | None = None
    for part in (text or "").split(",") if text is not None else ():
        clock = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|min|h)", part.strip())
        twice = (time if clock else tokens) is not None
        if twice:
            raise UserError(f"{part.strip()!r} says again what came before", place="--budget", remedy="name each once")
        if clock:
            time = float(clock[1]) * _TIMES[clock[2]]
            if not 0 < time < math.inf:
                raise UserError(f"{part.strip()!r} is no time", place="--budget", remedy="write 90s, 55min or 2h")
        else:
            tokens = _tokens_or_time(part.strip())
    return tokens, time


def _tokens_or_time(text: str) -> int:
    try:
        return _tokens(text, "--budget")
    except UserError:
        remedy = "write tokens as 500k, 2M or 1B, and time as 90s, 55min or 2h"
        raise UserError(f"{text!r} is neither tokens nor time", place="--budget", remedy=remedy) from None
