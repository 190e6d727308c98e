"""A profile from runs: repeated cold processes for each stream, their spread, and real prompts beside dummy ones.

All bytes are bytes, all times seconds. What the numbers mean is in docs/profiling.md.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.analysis.profile.expert_cache import cache_facts
from moec.analysis.profile.experts import counts_array, utilisation
from moec.analysis.profile.prompts import DUMMY, REAL, Stream
from moec.compiler.artifact import Manifest
from moec.compiler.profile_request import Request, Run
from moec.compiler.progress import Progress

FORMAT_VERSION = 1
# Linux maps the cached pages around a fault with it (fault-around, 64 kB unless set otherwise).
_MAPPED_TOGETHER = 65536


@dataclass(frozen=True)
class Measured:
    """One stream at its points: the runner's answers, one for each repeat."""

    stream: Stream
    request: Request
    answers: tuple[dict[str, Any], ...]


def measure(streams: Sequence[tuple[Stream, Request]], run: Run, *, repeats: int, progress: Progress) -> list[Measured]:
    """Run every stream `repeats` times, in turns, so that a machine that slows down slows all of them."""
    answers: list[list[dict[str, Any]]] = [[] for _ in streams]
    with progress.stage("profile", repeats * len(streams)) as step:
        for repeat in range(repeats):
            for (stream, request), taken in zip(streams, answers, strict=True):
                taken.append(run(request))
                step(f"{stream.name}, run {repeat + 1} of {repeats}")
    return [Measured(stream, request, tuple(taken)) for (stream, request), taken in zip(streams, answers, strict=True)]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest, and the values themselves in the order they were measured."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def split(before: Mapping[str, int], loaded: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Resident bytes by what holds them; the parts sum to `resident`.

    weights: pages of the model's file that the process touched. kv_cache: touched pages of the caches. activations: of
    the activations' arena, and what the kernels took for themselves since loading. program: heap that loading took (the
    method's plan; weights that a delegate repacked). runtime: the rest, which is the binary, its libraries, and what it
    had before the model was opened.
    """
    scratch = max(_heap(now) - _heap(loaded), 0)
    parts = {
        "weights": now["weights"],
        "kv_cache": now["caches"],
        "activations": now["activations"] + scratch,
        "program": max(_heap(loaded) - before["anonymous"], 0),
    }
    parts["runtime"] = now["resident"] - sum(parts.values())
    return {"resident": now["resident"], **parts}


def _heap(memory: Mapping[str, int]) -> int:
    """Anonymous memory outside the arenas."""
    return memory["anonymous"] - memory["caches"] - memory["activations"]


def report(
    manifest: Manifest, measured: Sequence[Measured], *, artifact: str, machine: str | None, repeats: int
) -> dict[str, Any]:
    """Everything a profile has to say, as plain values for JSON."""
    first = measured[0].answers[0]
    runs = [_run_facts(m, manifest.model.moe_layers) for m in measured]
    experts = _experts(manifest, measured)
    size = _expert_bytes(manifest, experts)
    return {
        "format_version": FORMAT_VERSION,
        "artifact": artifact,
        "name": manifest.name,
        "target": manifest.target,
        "digests": manifest.digests.model_dump(),
        "contents": manifest.contents,
        "machine": machine or f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_cpu_name()}",
        "isa": first["isa"],
        "threads": first["threads"],
        "file_bytes": first["file_bytes"],
        "repeats": repeats,
        "decode_tokens": first["decode_tokens"],
        "runs": runs,
        "ratios": _ratios(runs),
        "experts": experts,
        "expert_bytes": size,
        "notes": _notes(manifest, runs, size),
    }


def _run_facts(measured: Measured, layers: Sequence[str]) -> dict[str, Any]:
    answers = measured.answers
    streamed = cache_facts(answers, layers)
    points = [_point(answers, index) for index in range(len(measured.request.points))]
    return {
        "stream": measured.stream.name,
        "kind": measured.stream.kind,
        "tokens": measured.request.points[-1],
        "unique_tokens": len(set(measured.request.ids[: measured.request.points[-1]])),
        "decodes": "the ids that follow in the text" if measured.request.follow else "the model's own choice",
        "load_s": spread([a["load_s"] for a in answers]),
        # the system's high-water mark lags behind its page counts by some hundred kB
        "peak_bytes": spread([max(a["peak"], *(p["decoded"]["resident"] for p in a["points"])) for a in answers]),
        "cached_before": max(a["cached_before"] for a in answers),
        "points": points,
        **({} if streamed is None else {"expert_cache": streamed}),
    }


def _point(answers: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    at = [a["points"][index] for a in answers]
    tokens, decoded = at[0]["tokens"], answers[0]["decode_tokens"]
    # the last pass of a process: warm, unless the cold one was the only one
    prefill, decode = [p["prefill_s"][-1] for p in at], [p["decode_s"][-1] for p in at]
    parts = [split(a["before"], a["loaded"], p["decoded"]) for a, p in zip(answers, at, strict=True)]
    middle = sorted(range(len(parts)), key=lambda i: parts[i]["resident"])[(len(parts) - 1) // 2]
    return {
        "context": tokens,
        "first_token_cold_s": spread([a["load_s"] + p["prefill_s"][0] for a, p in zip(answers, at, strict=True)]),
        "first_token_s": spread(prefill),
        "prefill_tokens_per_s": spread([tokens / max(s, 1e-9) for s in prefill]),
        "decode_tokens_per_s": spread([decoded / max(s, 1e-9) for s in decode]) if decoded else None,
        "memory": parts[middle],
        "resident_bytes": spread([p["resident"] for p in parts]),
        "weights_bytes": spread([p["weights"] for p in parts]),
        "read_ahead_bytes": max(p["decoded"]["file_cached"] - p["decoded"]["weights"] for p in at),
        "experts_touched": at[0]["experts_touched"],
    }


def _ratios(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Real over dummy at every context that both have: resident memory, and weights alone."""
    dummy = {p["context"]: p for run in runs if run["kind"] == DUMMY for p in run["points"]}
    rows = []
    for context in sorted({p["context"] for run in runs if run["kind"] == REAL for p in run["points"]} & set(dummy)):
        real = {
            run["stream"]: p for run in runs if run["kind"] == REAL for p in run["points"] if p["context"] == context
        }
        below = dummy[context]
        by_stream = {n: p["resident_bytes"]["median"] / below["resident_bytes"]["median"] for n, p in real.items()}
        weights = [p["weights_bytes"]["median"] / max(below["weights_bytes"]["median"], 1) for p in real.values()]
        rows.append(
            {
                "context": context,
                "resident": statistics.median(by_stream.values()),
                "weights": statistics.median(weights),
                "by_stream": by_stream,
            }
        )
    return rows


def _experts(manifest: Manifest, measured: Sequence[Measured]) -> dict[str, Any] | None:
    """Utilisation by stream, prefill and decode together; None for a model without experts."""
    width = manifest.section("model", "moe").get("experts")
    if not isinstance(width, int):
        width = max((len(row) for m in measured for row in m.answers[0]["prefill_counts"]), default=0)
    counts = {
        m.stream.name: counts_array(m.answers[0]["prefill_counts"], width)
        + counts_array(m.answers[0]["decode_counts"] or [[]] * len(m.answers[0]["prefill_counts"]), width)
        for m in measured
    }
    if not width or not all(len(c) for c in counts.values()):
        return None
    real = {n: c for n, c in counts.items() if n != DUMMY} or counts
    found = utilisation(real)
    if DUMMY in counts and DUMMY not in found["domains"]:
        found["domains"][DUMMY] = utilisation({DUMMY: counts[DUMMY]})["domains"][DUMMY]
    found["names"] = list(manifest.model.moe_layers)
    return found


def _expert_bytes(manifest: Manifest, experts: dict[str, Any] | None) -> float | None:
    """What one routed expert of one layer weighs in the file."""
    total = manifest.sizes_by_role.get("expert")
    if experts is None or not total:
        return None
    return total / (experts["layers"] * experts["experts"])


def _notes(manifest: Manifest, runs: Sequence[dict[str, Any]], expert_bytes: float | None) -> list[str]:
    notes = []
    stuck = max(run["cached_before"] for run in runs)
    if stuck < 0:
        notes.append("this system does not tell which pages are cached: whether the runs began cold is unknown")
    elif stuck > 0.01 * runs[0]["points"][0]["memory"]["weights"]:
        notes.append(
            f"{stuck / 1e6:.0f} MB of the file stayed in the page cache before a run (another process has it mapped): "
            "first-token times are not cold, and a few neighbouring pages more may count as touched"
        )
    streamed = next((run["expert_cache"] for run in runs if "expert_cache" in run), None)
    if streamed is not None:
        most = streamed["slots"] * streamed["slot_bytes"]
        notes.append(
            f"activations hold the cache of routed experts, up to {most / 1e6:.0f} MB: experts are read into it past "
            "the page cache, and are not pages of the file"
        )
        return notes
    dummy = next((run for run in runs if run["kind"] == DUMMY), None)
    real = [run for run in runs if run["kind"] == REAL]
    if dummy is None or not real:
        return notes
    if expert_bytes is None:
        notes.append(
            "no experts: every weight is used for every token, so real and dummy prompts touch the same pages and the "
            "ratio is about 1"
        )
        return notes
    if expert_bytes < _MAPPED_TOGETHER:
        notes.append(
            f"an expert's {expert_bytes / 1e3:.0f} kB are less than the 64 kB that one page fault maps: its neighbours "
            "count as touched, and the ratio says little for a model this small"
        )
    last = dummy["points"][-1]
    widest = max(
        (run for run in real if run["points"][-1]["context"] == last["context"]),
        key=lambda run: run["points"][-1]["experts_touched"],
        default=None,
    )
    if widest is None:
        return notes
    top = widest["points"][-1]
    all_experts = round(manifest.sizes_by_role["expert"] / expert_bytes)
    gap = top["weights_bytes"]["median"] - last["weights_bytes"]["median"]
    expected = (top["experts_touched"] - last["experts_touched"]) * expert_bytes
    notes.append(
        "a repeated token is routed to the same experts at every position: the dummy prompt of "
        f"{last['context']} tokens touched {last['experts_touched']} of {all_experts} experts, {widest['stream']} "
        f"{top['experts_touched']}; at {expert_bytes / 1e6:.2f} MB each that is {expected / 1e6:.0f} MB more, and "
        f"{gap / 1e6:.0f} MB more were resident"
    )
    return notes


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
