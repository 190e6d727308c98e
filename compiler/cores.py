"""How many cores this process may use, and how its threads wait for each other on them."""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def usable_cores(most: int | None = None) -> int:
    """Number of cores this process may run on, at most `most`: its affinity, which containers and `taskset`
    restrict."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if most is None else min(cores, most)


def cores_are_shared() -> bool:
    """Whether other processes use these cores: the load of the last minute leaves less than half of them free."""
    try:
        return os.getloadavg()[0] > 0.5 * usable_cores()
    except OSError:  # a system that does not say
        return False


def wait_without_spinning(environment: MutableMapping[str, str], *, shared: bool) -> None:
    """Tell OpenMP how its threads wait, before torch is imported; what the user set is left as it is.

    By default a waiting thread spins for milliseconds; on a busy machine it then takes the core from the thread that it
    waits for. Steps of 60 small matrix products each, on two cores with a load of 13: 3.6 per second with spinning, 374
    with sleeping (docs/training.md). Where cores are shared, threads sleep; elsewhere they spin for microseconds only,
    since other work may start later.
    """
    if any(name in environment for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        return
    if shared:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # GNU's and LLVM's runtime read it
    else:
        environment["GOMP_SPINCOUNT"] = "1000"
