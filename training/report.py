"""`moec report RUN`: one self-contained page about a training run, from its headline figures to tables and plots.

It reads run.json and metrics.jsonl, which every run has, and measured.json, which `make train-report` adds (a control
without balancing, QAT against PTQ, utilisation beside shuffled labels, task accuracies). The page says what is missing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import MissingExtra, UserError
from moec.compiler.files import read_bytes
from moec.training import report_figures as figures
from moec.training.metrics import DISTINCT
from moec.training.metrics import FILE as METRICS
from moec.training.stages import RUN
from moec.training.utilisation import divergence, entropy, frequencies, from_loads

MEASURED = "measured.json"
_MAX_RECORD, _MAX_METRICS = 64 << 20, 1 << 30  # bytes: a line of metrics for each step


class ReportError(UserError):
    """A folder holds no run, or its records are damaged."""


@dataclass(frozen=True)
class Run:
    """What a run folder says. steps, evaluations: lines of metrics.jsonl. bounds: the tokens before each stage."""

    record: Mapping[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    bounds: dict[str, int]
    measured: Mapping[str, Any]


def read_run(folder: Path) -> Run:
    """ReportError, with file and line, for what cannot be read. A last line cut short by a kill is left out."""
    record = _json(folder / RUN)
    file = folder / METRICS
    if not file.exists():
        raise ReportError("no metrics here", place=str(file), remedy="name the folder of a training run")
    raw = read_bytes(file, limit=_MAX_METRICS, fault=ReportError).splitlines(keepends=True)
    lines = []
    for number, line in enumerate(raw, 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            if number == len(raw) and not line.endswith(b"\n"):
                break
            raise ReportError("damaged", place=f"{file}:{number}", remedy="restore it, or train again") from None
    try:
        bounds = _bounds(record, lines)
        steps = [line for line in lines if "lm_loss" in line]
        evaluations = [line for line in lines if "heldout" in line]
    except (KeyError, TypeError) as error:
        raise ReportError(f"damaged: {error}", place=str(folder), remedy="restore it, or train again") from None
    if not steps:
        raise ReportError("no step was logged yet", place=str(file), remedy="let it train a little")
    extra = folder / MEASURED
    return Run(record, steps, evaluations, bounds, _json(extra) if extra.is_file() else {})


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise ReportError(f"no {file.name} here", place=str(file.parent), remedy="name a training run")
    try:
        found = json.loads(read_bytes(file, limit=_MAX_RECORD, fault=ReportError))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"damaged: {str(error).splitlines()[0]}", place=str(file)) from None
    if not isinstance(found, dict):
        raise ReportError("damaged: not an object", place=str(file))
    return found


def _bounds(record: Mapping[str, Any], lines: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens before each stage that has lines, in the order of the spec."""
    found, before = {}, 0
    for stage in record["spec"]["training"]["stages"]:
        own = [line["tokens"] for line in lines if line["stage"] == stage["name"]]
        if own:
            found[stage["name"]] = before
            before += max(own)
    return found


def write_report(run_dir: str | Path, out_html: str | Path) -> None:
    """Write the page of a run. ReportError for a folder that is none; MissingExtra without matplotlib and jinja2."""
    run = read_run(Path(run_dir))
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("reports need jinja2, which is not installed", remedy="pip install 'moec[report]'") from None
    text = (files("moec") / "training" / "report.html").read_text("utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
    out = Path(out_html)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name}.part")
        part.write_text(page.render(**_content(run)), "utf-8")
        part.replace(out)
    except OSError as error:
        raise ReportError(
            f"cannot be written: {error.strerror}", place=str(out), remedy="choose another file"
        ) from None


def _content(run: Run) -> dict[str, Any]:
    moe = bool(run.steps[0]["load_max_over_mean"])
    measured = run.measured
    found = utilisations(run) if moe else {}
    last = next(reversed(found)) if found else None
    even = {s: np.asarray(u["frequency"]).mean(axis=0) for s, u in found.items()}
    return {
        "name": run.record["name"],
        "record": run.record,
        "tiles": _tiles(run),
        "losses": figures.losses(run.steps, run.evaluations, run.bounds),
        "heldout": heldout_table(run),
        "balance": figures.balance(run.steps, run.bounds, measured.get("control") or []) if moe else None,
        "balance_table": balance_table(run) if moe else [],
        "has_control": bool(measured.get("control")),
        "locality": locality_table(run),
        "loads": figures.loads(even) if found else None,
        "utilisation": figures.utilisation(found[last]["domains"], np.asarray(found[last]["frequency"]), last)
        if last
        else None,
        "last": last,
        "divergences": figures.divergences(found) if found and "experts" in measured else None,
        "experts": found,
        "shuffled": "experts" in measured,
        "rounding": measured.get("rounding"),
        "rounding_figure": figures.rounding(measured["rounding"]["widths"]) if "rounding" in measured else None,
        "tasks": _task_rows(measured.get("tasks") or {}),
        "responses": measured.get("responses"),
        "throughput": figures.throughput(run.steps, run.bounds),
        "speeds": _speeds(run),
        "corpus": measured.get("corpus"),
    }


def utilisations(run: Run) -> dict[str, dict[str, Any]]:
    """By stage: what `utilisation.summary` measured, or the same without the control from the run's own counts."""
    if "experts" in run.measured:
        return {stage: run.measured["experts"][stage] for stage in run.bounds if stage in run.measured["experts"]}
    found = {}
    for stage in run.bounds:
        own = [line for line in run.evaluations if line["stage"] == stage and line.get("expert_load")]
        if own:
            names, counts_DLE = from_loads(own[-1]["expert_load"])
            p_DLE = frequencies(counts_DLE)
            found[stage] = {
                "domains": names,
                "frequency": p_DLE.tolist(),
                "entropy": entropy(p_DLE).tolist(),
                "divergence": divergence(p_DLE).tolist(),
                "divergence_mean": float(divergence(p_DLE).mean()),
            }
    return found


def heldout_table(run: Run) -> list[dict[str, Any]]:
    """By stage: the held-out loss of each domain before its first step and after its last, at the stage's context."""
    rows = []
    for stage in run.bounds:
        own = [line["heldout"] for line in run.evaluations if line["stage"] == stage]
        if own:
            spec = next(s for s in run.record["spec"]["training"]["stages"] if s["name"] == stage)
            shares = {domain: share / sum(spec["mixture"].values()) for domain, share in spec["mixture"].items()}
            rising = [d for d in own[0] if any(b[d] >= a[d] for a, b in itertools.pairwise(own))]
            rows.append({"stage": stage, "shares": shares, "first": own[0], "last": own[-1], "rising": rising,
                         "evaluations": len(own)})  # fmt: skip
    return rows


def balance_table(run: Run) -> list[dict[str, Any]]:
    """Means over the last tenth of each stage's lines, and of the control's, at the same steps of pre-training.

    `heldout`: busiest expert over the mean on held-out text in the stage's mixture, at its end, of the worst layer. One
    batch is a few dozen rows of text, whose topics make its load uneven; the held-out text has many.
    """
    rows = [
        _balance(stage, [s for s in run.steps if s["stage"] == stage]) | {"heldout": _heldout_load(run, stage)}
        for stage in run.bounds
    ]
    control = run.measured.get("control") or []
    if control:
        reached = {line["step"] for line in control}
        same = [s for s in run.steps if s["stage"] == "pretrain" and s["step"] in reached]
        where = f"pretrain, to step {max(reached)}"
        rows += [_balance(where, same), _balance(f"{where}, no balancing", control)]
    return rows


def locality_table(run: Run) -> list[dict[str, Any]]:
    """By stage: the locality loss's weight, and distinct experts of 16 tokens of each domain, before and after."""
    rows = []
    for stage in run.bounds:
        own = [line[DISTINCT] for line in run.evaluations if line["stage"] == stage and line.get(DISTINCT)]
        if own:
            spec = next(s for s in run.record["spec"]["training"]["stages"] if s["name"] == stage)
            rows.append({"stage": stage, "weight": spec.get("locality", 0.0), "first": own[0], "last": own[-1]})
    return rows


def _balance(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    tail = lines[-max(3, len(lines) // 10) :]
    load_SL = np.asarray([line["load_max_over_mean"] for line in tail])
    return {
        "name": name,
        "steps": f"{tail[0]['step']} to {tail[-1]['step']}",
        "dropped": float(np.mean([line["dropped_fraction"] for line in tail])),
        "mean": float(load_SL.mean()),
        "worst": float(load_SL.mean(axis=0).max()),
        "heldout": None,
    }


def _heldout_load(run: Run, stage: str) -> float | None:
    own = [line["expert_load"] for line in run.evaluations if line["stage"] == stage and line.get("expert_load")]
    if not own:
        return None
    names, counts_DLE = from_loads(own[-1])
    mixture = next(s["mixture"] for s in run.record["spec"]["training"]["stages"] if s["name"] == stage)
    share_D = np.asarray([mixture.get(name, 0.0) for name in names])
    if not share_D.any():
        return None
    p_LE = np.tensordot(share_D / share_D.sum(), frequencies(counts_DLE), axes=1)
    return float((p_LE.max(axis=-1) / p_LE.mean(axis=-1)).max())


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    tokens = sum(max(s["tokens"] for s in run.steps if s["stage"] == stage) for stage in run.bounds)
    last = run.evaluations[-1]["heldout"] if run.evaluations else {}
    mean = f"{np.mean(list(last.values())):.3f}" if last else "none"
    return [
        ("stages", str(len(run.bounds)), ", ".join(run.bounds)),
        ("tokens", f"{tokens / 1e6:.2f} M", "in all stages"),
        ("held-out loss", mean, "mean of the domains, at the end"),
        ("speed", f"{np.median([s['tokens_per_s'] for s in run.steps]):,.0f}", "tokens/s, median"),
        ("threads", str(run.record.get("threads", "?")), f"{run.record.get('processes', 1)} process(es)"),
    ]


def _speeds(run: Run) -> list[tuple[str, float, int]]:
    rows = []
    for stage in run.bounds:
        own = [s for s in run.steps if s["stage"] == stage]
        rows.append((stage, float(np.median([s["tokens_per_s"] for s in own])), max(s["tokens"] for s in own)))
    return rows


def _task_rows(
    tasks: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> list[tuple[str, str, str, float, float | None]]:
    """(model, task, metric, value, standard error)."""
    rows = []
    for model, results in tasks.items():
        for task, values in results.items():
            for metric, value in values.items():
                if not metric.endswith("_stderr"):
                    rows.append((model, task, metric, value, values.get(f"{metric}_stderr")))
    return rows
