"""`python -m tests.fuzz SECONDS [TARGET...]`: every reader on mutants, SECONDS each. Exit status 1 if any failed.

A target is a file of tests/fuzz/targets with an object TARGET (harness.py), a coverage-guided one a file of
tests/fuzz/native with LLVMFuzzerTestOneInput. Inputs that failed are left in build/fuzz/TARGET. Once the fault is
fixed, the smallest such input goes to tests/fuzz/corpus/TARGET/WHAT-IT-IS.found, which every run tries first.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
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
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "build" / "fuzz")
    options = parser.parse_args(arguments)
    seed = int(time.time()) if options.seed is None else options.seed
    failed = 0
    for name in options.targets or names():
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        if name in native.names():
            failed += native.run(name, folder, options.seconds, seed)
            continue
        target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
        for found, what in harness.replay(target, folder).items():
            print(f"{name}: {found}, an input that was found before: {what}", flush=True)
            failed += 1
        outcome = harness.run(target, folder, seconds=options.seconds, seed=seed)
        found = (
            ", ".join(f"{count} {what}" for what, count in Counter(outcome.failures.values()).items()) or "none failed"
        )
        print(f"{name}: {outcome.mutants} mutants in {outcome.seconds:.0f} s (seed {seed}): {found}", flush=True)
        failed += len(outcome.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
