"""How many cores this process may use."""

from __future__ import annotations

import os


def usable_cores(most: int | None = None) -> int:
    """Cores this process may run on: its affinity where the system has one, which containers and `taskset` narrow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if most is None else min(cores, most)
