"""Limits for the numbers of a config.json, checked before a library builds the model that they describe.

Every number is looked at, however deeply it is nested. A config is data from outside: a billion layers would be built
one by one for hours, and a NaN as the epsilon of a norm would become logits that are NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moec.compiler.errors import CheckpointError

# Bounds of the spec's own decoders, with room: the deepest published model has 1,000 layers, the widest 2^20 columns.
_MOST = (
    (re.compile(r"(^|_)(layers?|blocks|depth)$"), 1 << 12),
    (re.compile(r"(^|_)(heads?|groups?|experts)$"), 1 << 16),
    (re.compile(r"(^|_)(size|dim|width|rank|inner|embd|positions|embeddings|length)$"), (1 << 31) - 1),
)
_LARGEST = 3.5e38  # the end of float32, in which all is computed
_ENDLESS = re.compile(r"_limit$")  # the open end of a range: Mamba's `time_step_limit: [0.0, Infinity]`
_MAX_DEPTH = 32


def check_config(keys: Mapping[str, Any], place: str) -> None:
    """CheckpointError, with the key, for a number that is not finite or a size beyond every published model's."""
    for path, value in _numbers(keys, ()):
        fault = _fault(path, value)
        if fault is not None:
            raise CheckpointError(
                f"{'.'.join(path)}: {fault}", place=place, remedy="copy it again from where the checkpoint comes from"
            )


def _numbers(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int | float]]:
    """Every number with the keys that lead to it; elements of a list have the list's."""
    if len(path) > _MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, (*path, str(key)[:60]))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def _fault(path: tuple[str, ...], value: int | float) -> str | None:
    name = path[-1] if path else ""
    if isinstance(value, float) and not math.isfinite(value):
        endless = value == math.inf and _ENDLESS.search(name)
        return None if endless else f"{value} is no value of a model"
    for pattern, most in _MOST:
        if pattern.search(name) and value > most:
            return f"{value!r:.40} is more than any model has (at most {most})"
    if abs(value) > _LARGEST:
        return f"{value!r:.40} is no value of a model"
    return None
