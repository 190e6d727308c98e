"""Times a `.pte` with the runner binary: a process without Python or torch, whose memory is the model's own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec.compiler.progress import Progress
from moec.compiler.timing import BenchPlan
from moec.runtime.native import runner_binary
from moec.targets.xnnpack.memory import overlapped
from moec.targets.xnnpack.refusals import runner_error


def bench(model: Path, plan: BenchPlan, progress: Progress, budget: Sequence[str] = ()) -> dict[str, Any]:
    """The report of `Target.bench`, one process for each context. RunError with the runner's reason when the model
    refuses. budget: `budget_arguments`."""
    wanted: Sequence[int | None] = plan.contexts or (None,)
    reports = []
    with progress.stage("bench", len(wanted)) as step:
        for context in wanted:
            reports.append(_run(model, plan, context, budget))
            step("" if context is None else f"from position {context}")
    first = reports[0]
    return {
        **{name: first[name] for name in ("model", "isa", "threads", "file_bytes", "load_s", "prefill_tokens")},
        "prefill_tokens_per_s": first["prefill_tokens_per_s"],
        "prefill_s": first["prefill_s"],
        "decode_tokens": first["decode_tokens"],
        "decode_tokens_per_s": first["decode_tokens_per_s"],
        "peak_rss_mb": max(r["peak_rss_mb"] for r in reports),
        "anonymous_mb": max(r["anonymous_mb"] for r in reports),
        "repeats": first["repeats"],
        **{key: _with_share(first[key]) for key in ("experts", "decode_experts") if key in first},
        "contexts": [
            {
                "context": r["decode_start"],
                "decode_tokens_per_s": r["decode_tokens_per_s"],
                "decode_s": r["decode_s"],
                "peak_rss_mb": r["peak_rss_mb"],
                **{key: _with_share(r[key]) for key in ("experts", "decode_experts") if key in r},
            }
            for r in reports
        ],
    }


def _with_share(experts: dict[str, Any]) -> dict[str, Any]:
    """The runner's counts, with the share of reading that computing hid."""
    return {**experts, "overlapped": overlapped(experts["active_s"], experts["exposed_s"])}


def _run(model: Path, plan: BenchPlan, context: int | None, budget: Sequence[str]) -> dict[str, Any]:
    command = [str(runner_binary()), str(model), "--json", "--decode", str(plan.decode), "--repeats", str(plan.repeats)]
    given = None
    if plan.tokens is not None:
        command += ["--tokens", "-"]
        given = " ".join(map(str, plan.tokens))
    else:
        command += ["--prompt-length", str(plan.prefill)]
    command += ["--context", str(context)] if context else []
    command += ["--threads", str(plan.threads)] if plan.threads else []
    command += budget
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, input=given)
    if done.returncode == 0:
        return dict(json.loads(done.stdout))
    raise runner_error(done.returncode, done.stderr)
