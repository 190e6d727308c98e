"""Runs this target's native tools, always in a process of their own.

MLIR aborts its process when a module breaks an assumption of a pass; that must not be the user's Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moec.compiler.errors import CompileError

_DISTRIBUTIONS = ("torch-mlir", "iree-base-compiler", "iree-base-runtime")


def versions() -> dict[str, str]:
    """The installed tools by distribution."""
    found = {}
    for package in _DISTRIBUTIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """The worker imports what this process imports, from wherever it was found, and leaves the other cores alone."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def worker_command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "moec.targets.mlir.worker", *arguments]


def lower_text(kind: str, source: Path, out: Path, *, model: str) -> None:
    """Run `worker lower`. CompileError naming the operator that cannot be lowered, or how the tool ended."""
    done = subprocess.run(
        worker_command("lower", kind, str(source), str(out)), capture_output=True, text=True, env=environment()
    )
    if done.returncode == 0:
        return
    fault: dict[str, Any] = {}
    if done.returncode == 1 and done.stdout.startswith("{"):
        fault = json.loads(done.stdout.splitlines()[0])
    if fault.get("operator"):
        raise CompileError(f"torch-mlir has no lowering of {fault['operator']} to {kind}: {fault['what']}", place=model)
    what = fault.get("what") or f"{ended(done.returncode)}{last_line(done.stderr)}"
    raise CompileError(f"torch-mlir stopped while lowering to {kind}: {what}", place=model)


def ended(status: int) -> str:
    """How a process went, for people."""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # a native crash ends with a stack dump; what it complained of stands before
    told = [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines[-1:]
    return f" ({told[0][:200]})" if told else ""
