"""Profiles a `.pte` with the runner binary: one process for each run, its weights mapped lazily.

Memory is measured correctly only if a run starts cold. The runner asks the system to drop the file's pages
(posix_fadvise DONTNEED) before it maps the file, and reports how many stayed, as they do when another process has
mapped it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec.compiler.errors import RunError
from moec.compiler.profile_request import Request
from moec.runtime.native import runner_binary
from moec.targets.xnnpack.refusals import runner_error


def arguments(request: Request, model: str, tokens: str) -> list[str]:
    """The runner's arguments for a request: the model's path and that of the file of token ids (- for stdin)."""
    command = [model, "--profile", "--tokens", tokens, "--points", ",".join(map(str, request.points))]
    command += ["--decode", str(request.decode), "--warm", str(request.warm)]
    command += ["--follow"] if request.follow else []
    command += ["--drop-cache"] if request.cold else []
    command += ["--threads", str(request.threads)] if request.threads else []
    return command


def run(model: Path, request: Request, budget: Sequence[str] = ()) -> dict[str, Any]:
    """Run one request in a process of its own; the runner's JSON. RunError with its reason when it refuses.

    budget: `budget_arguments`.
    """
    ids = " ".join(map(str, request.ids))
    command = [str(runner_binary()), *arguments(request, str(model), "-"), *budget]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, input=ids)
    return parsed(done.returncode, done.stdout, done.stderr)


def parsed(status: int, out: str, err: str) -> dict[str, Any]:
    """The runner's JSON from what it printed; RunError with its reason otherwise."""
    if status == 0:
        try:
            return dict(json.loads(out))
        except ValueError:
            raise RunError(
                "the runner's output is not the JSON it writes", remedy="is it the runner of this version?"
            ) from None
    raise runner_error(status, err)
