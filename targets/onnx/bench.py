"""Times an ONNX artifact with ONNX Runtime, in a process of its own, whose peak memory includes Python's."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from moec.compiler.artifact import Artifact
from moec.compiler.errors import RunError, UserError
from moec.compiler.progress import Progress
from moec.compiler.target import own_facts
from moec.compiler.timing import BenchPlan
from moec.targets.onnx.facts import OnnxFacts

PROGRAM = "model.onnx"


def bench(artifact: Artifact, plan: BenchPlan, progress: Progress) -> dict[str, Any]:
    """Run the plan, one process for each context. Rates are medians over `repeats`; RunError when the model refuses."""
    wanted: Sequence[int | None] = plan.contexts or (None,)
    reports = []
    with progress.stage("bench", len(wanted)) as step:
        for context in wanted:
            # a process that was forked would count the memory of this one
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(_run, (str(artifact.folder), plan, context))
            if isinstance(found, str):
                raise RunError(found)
            reports.append(found)
            step("" if context is None else f"from position {context}")
    first = reports[0]
    return {
        **{name: value for name, value in first.items() if name not in ("context", "decode_s")},
        "peak_rss_mb": max(r["peak_rss_mb"] for r in reports),
        "repeats": plan.repeats,
        "contexts": [
            {name: r[name] for name in ("context", "decode_tokens_per_s", "decode_s", "peak_rss_mb")} for r in reports
        ],
    }


def _run(folder: str, plan: BenchPlan, context: int | None) -> dict[str, Any] | str:
    """One measurement, or the reason why there is none."""
    try:
        return _measured(folder, plan, context)
    except UserError as error:
        return error.line()


def _measured(folder: str, plan: BenchPlan, context: int | None) -> dict[str, Any]:
    import onnxruntime

    from moec.targets.onnx.session import OnnxSession

    artifact = Artifact.open(folder)
    manifest = artifact.manifest
    vocab = manifest.model.vocab_size
    ids = list(plan.tokens) if plan.tokens is not None else _spread(plan.prefill, vocab)
    started = time.perf_counter()
    session = OnnxSession(
        artifact.path(PROGRAM),
        vocab_size=vocab,
        context=manifest.model.context,
        max_tokens=manifest.model.max_tokens,
        facts=own_facts(artifact, OnnxFacts),
        threads=plan.threads,
    )
    load_s = time.perf_counter() - started
    prefill_s, decode_s = [], []
    for _ in range(plan.repeats):
        session.reset()
        started = time.perf_counter()
        session.prefill(ids)
        prefill_s.append(time.perf_counter() - started)
        if context is not None:
            session.reset()
            session.prefill(_spread(context, vocab))
        started = time.perf_counter()
        for token in _spread(plan.decode, vocab):
            session.decode(token)
        decode_s.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model": str(artifact.path(PROGRAM)),
        "isa": f"ONNX Runtime {onnxruntime.__version__}",
        "threads": session.threads,
        "file_bytes": artifact.bytes,
        "load_s": load_s,
        "prefill_tokens": len(ids),
        "prefill_s": statistics.median(prefill_s),
        "prefill_tokens_per_s": len(ids) / statistics.median(prefill_s),
        "decode_tokens": plan.decode,
        "decode_s": statistics.median(decode_s),
        "decode_tokens_per_s": plan.decode / statistics.median(decode_s),
        "context": context if context is not None else len(ids),
        "peak_rss_mb": peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6,
    }


def _spread(count: int, vocab: int) -> list[int]:
    return np.random.default_rng(0).integers(0, vocab, count).tolist()
