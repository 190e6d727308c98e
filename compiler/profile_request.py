"""One run of `moec profile`: what a target's runner is asked to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """One process: a pass over `ids`, measured at the context lengths `points` (ascending).

    decode: tokens decoded at each point. follow: decoding feeds the next ids, not the model's own choice.
    warm: further passes with every page in memory, for rates only. cold: first drop the file from the page cache.
    threads None: one per fast core.
    """

    ids: tuple[int, ...]
    points: tuple[int, ...]
    decode: int = 16
    warm: int = 1
    follow: bool = False
    cold: bool = True
    threads: int | None = None


# Runs a request and returns the runner's JSON (runtime/runner/profile_json.cpp writes it).
Run = Callable[[Request], dict[str, Any]]
