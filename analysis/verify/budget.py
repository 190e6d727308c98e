"""`moec verify --memory-mb`: the artifact within a budget of memory, against the same with all its experts in memory.

A budget counts a process, and the reference is in this one: the artifact runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moec.analysis.verify.compare import DECODE_STEPS, Comparison
from moec.analysis.verify.metrics import max_abs_error
from moec.analysis.verify.report import Check
from moec.analysis.verify.tolerances import SAME_IN_MEMORY
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.progress import Progress
from moec.compiler.session_process import ProcessSession
from moec.compiler.target import Session


def memory_mb_of(artifact: Artifact) -> int | None:
    """The budget that an artifact is opened with, 10^6 bytes; None: all of it is in memory."""
    found = getattr(artifact.options(), "memory_mb", None)
    return found if isinstance(found, int) else None


def sessions_of(artifact: Artifact, rounds: bool) -> tuple[Session, Session | None]:
    """The artifact, and for one that `rounds` activations the same without rounding, if its target can run that.

    With a budget each is a process of its own; RunError, with the least that works, for one that is too small.
    """
    if memory_mb_of(artifact) is None:
        return build.load_exact(artifact), build.load_unrounded(artifact) if rounds else None
    session = ProcessSession(artifact)
    if not rounds:
        return session, None
    try:
        unrounded = ProcessSession(artifact, unrounded=True)
    except BaseException:
        session.close()
        raise
    return session, unrounded if unrounded.exists else None


def compare_with_memory(
    found: Comparison,
    artifact: Artifact,
    session: ProcessSession,
    prompts: Mapping[str, Sequence[int]],
    progress: Progress,
) -> None:
    """Adds a check: every logit of every prompt, the last tokens of each run alone, is the same within the budget and
    in memory, in calls of the same lengths. And figures: the budget, the process's peak, what was read."""
    whole = build.load_exact(artifact.in_memory())
    errors: dict[str, float] = {}
    try:
        with progress.stage("compare with all in memory", len(prompts)) as step:
            for name, ids in prompts.items():
                pairs = [_logits(s, ids, session.max_tokens) for s in (session, whole)]
                # not a number in one of them alone is a difference, too
                same = np.array_equal(pairs[0].view(np.uint32), pairs[1].view(np.uint32))
                errors[name] = 0.0 if same else max(max_abs_error(*pairs), float(np.finfo(np.float32).tiny))
                step(name)
    finally:
        whole.close()
    worst = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
    budget = memory_mb_of(artifact)
    what = f"within {budget} MB: logits equal those in memory"
    found.checks.append(Check(what, errors[worst], SAME_IN_MEMORY, worst))
    about = session.about_process()
    found.figures["budget MB"] = budget
    found.figures["peak RSS MB of the artifact's process"] = round(about["peak_rss_mb"])
    if about["experts"] is not None:
        e = about["experts"]
        found.figures["experts read"] = (
            f"{e['misses']} of {e['hits'] + e['misses']} that layers asked for, {e['bytes_read'] / 1e6:.1f} MB; "
            f"{e['slots']} of {e['experts']} in memory"
        )


def _logits(session: Session, ids: Sequence[int], most: int) -> np.ndarray:
    """float32 [T, V]: calls of at most `most` tokens, and the last DECODE_STEPS tokens alone."""
    session.reset()
    head = max(len(ids) - DECODE_STEPS, 0)
    rows = [session.prefill(ids[at : min(at + most, head)], "all") for at in range(0, head, most)]
    return np.concatenate([*rows, *(session.prefill([token], "all") for token in ids[head:])])
