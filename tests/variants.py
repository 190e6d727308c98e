"""Variants of a test that `make test` leaves to the slow tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def quick(values: Iterable[Any], fast: Collection[str]) -> list[Any]:
    """Parameters, in order, of which all but `fast` are slow: what they show, those show of the same code.

    A name in `fast` is a `pytest.param`'s id, a tuple's first part, or the value. AssertionError if no value has it.
    """
    found = {_name(value): value for value in values}
    assert set(fast) <= set(found), set(fast) - set(found)
    return [value if name in fast else _slow(value) for name, value in found.items()]


def few(values: Iterable[Any], count: int) -> list[Any]:
    """Parameters, in order, of which all but the first `count` are slow: seeds of random cases, say."""
    return [value if i < count else _slow(value) for i, value in enumerate(values)]


def crossed(first: Iterable[Any], second: Sequence[Any]) -> list[Any]:
    """Every pair as two parameters. Fast are as many as `first` has: each with one of `second`, which take turns."""
    return [
        pytest.param(a, b, id=f"{a}-{b}", marks=() if i % len(second) == j else pytest.mark.slow)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def _name(value: Any) -> str:
    if hasattr(value, "values") and hasattr(value, "marks"):
        return str(value.id)
    return str(value[0] if isinstance(value, tuple) else value)


def _slow(value: Any) -> Any:
    if hasattr(value, "values") and hasattr(value, "marks"):
        return pytest.param(*value.values, id=value.id, marks=[*value.marks, pytest.mark.slow])
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
