"""What a profile asks of a target's runner, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """One process: a pass over `ids`, measured at the lengths of context `points` (ascending).

    decode: tokens decoded at each point. follow: they are the ids that come next, not the model's own choice.
    warm: further passes for rates alone, with every page in memory. cold: forget the file's cached pages first.
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
