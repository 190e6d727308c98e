"""Runs a target on mutants in a child process: mutants that crash it, hang it or fill the memory are kept and counted.

Mutant number i of a run depends only on the target's name, the run's seed and i, so that a failure can be reproduced.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

HANG_S = 5.0
MEMORY_BYTES = 2 << 30
CORPUS = Path(__file__).parent / "corpus"


class Target(Protocol):
    """A reader to be tried: the object `TARGET` of a file in tests/fuzz/targets, which has its name."""

    name: str

    def seeds(self, folder: Path) -> Sequence[bytes]:
        """Inputs that the reader accepts. Called once before a run; `folder` is for its files."""

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        """One mutant."""

    def run(self, data: bytes, folder: Path) -> None:
        """Give `data` to the reader. A refusal is not a failure; every other exception is."""


@dataclass
class Outcome:
    """What a run found. `failures`: number of the mutant -> what happened."""

    mutants: int = 0
    seconds: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)


def mutant(target: Target, seeds: Sequence[bytes], seed: int, index: int) -> bytes:
    """Mutant number `index` of a run."""
    return target.mutate(random.Random(f"{target.name}:{seed}:{index}"), seeds)


def run(target: Target, folder: Path, *, seconds: float, seed: int = 0, most: int = 1 << 40) -> Outcome:
    """Mutants for `seconds`, at most `most`. Failing ones are left in `folder` as failure-N."""
    seeds = target.seeds(folder)
    progress = mmap.mmap(-1, 16)
    outcome, start, index = Outcome(), time.monotonic(), 0
    while index < most and time.monotonic() - start < seconds:
        child = _fork(partial(_work, target, seeds, seed, index, most, start + seconds, progress, folder))
        what = _watch(child, progress)
        index = struct.unpack("Q", progress[:8])[0]
        if what is None:
            break
        outcome.failures[index] = what
        (folder / f"failure-{index}").write_bytes(mutant(target, seeds, seed, index))
        index += 1
    outcome.mutants, outcome.seconds = index, time.monotonic() - start
    return outcome


def replay(target: Target, folder: Path) -> dict[str, str]:
    """Every input that was found before, corpus/TARGET/*.found, once. Name -> what happened, of those that fail."""
    target.seeds(folder)
    progress, failures = mmap.mmap(-1, 16), {}
    for file in sorted((CORPUS / target.name).glob("*.found")):
        what = _watch(_fork(partial(target.run, file.read_bytes(), folder)), progress)
        if what is not None:
            failures[file.stem] = what
    return failures


def _fork(body: Callable[[], None]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        faulthandler.disable()  # the exit status says what ended a child: no pages of stack frames
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        body()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _work(
    target: Target,
    seeds: Sequence[bytes],
    seed: int,
    first: int,
    most: int,
    deadline: float,
    progress: mmap.mmap,
    folder: Path,
) -> None:
    for index in range(first, most):
        if time.monotonic() > deadline:
            break
        progress[:8] = struct.pack("Q", index)
        target.run(mutant(target, seeds, seed, index), folder)
    else:
        index = most
    progress[:8] = struct.pack("Q", index)


def _watch(child: int, progress: mmap.mmap) -> str | None:
    """What ended the child, if it was a failure."""
    at, since = bytes(progress[:8]), time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status):
                return f"died of {signal.Signals(os.WTERMSIG(status)).name}"
            return None if os.WEXITSTATUS(status) == 0 else f"exit status {os.WEXITSTATUS(status)}"
        if bytes(progress[:8]) != at:
            at, since = bytes(progress[:8]), time.monotonic()
        fault = "hangs" if _cpu_hang(since) else "memory" if _resident(child) > MEMORY_BYTES else None
        if fault:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return fault
        time.sleep(0.02)


def _cpu_hang(since: float) -> bool:
    # on a busy machine the child has the processor for a share of the time only
    share = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    return time.monotonic() - since > HANG_S * share


def _resident(child: int) -> int:
    try:
        return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):  # it has just ended, or there is no /proc
        return 0
