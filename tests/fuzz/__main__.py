"""`python -m tests.fuzz SECONDS [TARGET...]`: every reader on mutants, SECONDS each, as many at a time as there are
cores. Exit status 1 if any failed.

A target is a file of tests/fuzz/targets with an object TARGET (harness.py), a coverage-guided one a file of
tests/fuzz/native with LLVMFuzzerTestOneInput. Inputs that failed are left in build/fuzz/TARGET. Once the fault is
fixed, the smallest such input goes to tests/fuzz/corpus/TARGET/WHAT-IT-IS.found, which every run tries first.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz import harness, native

HERE = Path(__file__).parent


def names() -> list[str]:
    """Every target, in order."""
    return sorted(file.stem for file in (HERE / "targets").glob("*.py")) + native.names()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(names()))
    parser.add_argument("--seed", type=int, default=None, help="of the mutants (default: the time)")
    parser.add_argument("--jobs", type=int, default=cores(), help="targets at a time (default: the cores)")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "build" / "fuzz")
    options = parser.parse_args(arguments)
    seed = int(time.time()) if options.seed is None else options.seed
    targets = list(dict.fromkeys(options.targets)) or names()
    if len(targets) == 1:
        return 1 if fuzz(targets[0], options.seconds, seed, options.out) else 0

    def in_a_process(name: str) -> int:
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", str(options.seconds), name, "--seed", str(seed)]
        return subprocess.run([*command, "--out", str(options.out)], check=False).returncode

    with ThreadPoolExecutor(max(options.jobs, 1)) as pool:
        return 1 if any(list(pool.map(in_a_process, targets))) else 0


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fuzz(name: str, seconds: float, seed: int, out: Path) -> int:
    """One target. How many inputs failed."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    if name in native.names():
        return native.run(name, folder, seconds, seed)
    target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    before = harness.replay(target, folder)
    for found, what in before.items():
        print(f"{name}: {found}, an input that was found before: {what}", flush=True)
    outcome = harness.run(target, folder, seconds=seconds, seed=seed)
    said = ", ".join(f"{count} {what}" for what, count in Counter(outcome.failures.values()).items()) or "none failed"
    print(f"{name}: {outcome.mutants} mutants in {outcome.seconds:.0f} s (seed {seed}): {said}", flush=True)
    return len(before) + len(outcome.failures)


if __name__ == "__main__":
    sys.exit(main())
