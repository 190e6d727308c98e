"""`moec sweep`: a grid of small models at equal active parameters and tokens, and what each factor does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moec.compiler.progress import Progress
    from moec.training.sweep.sweep import Planned, Swept


def register(app: typer.Typer) -> None:
    app.command("sweep")(sweep)


def sweep(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec; its first training stage is trained.")],
    data: Annotated[Path, typer.Option(help="Corpus folder that `moec data build` wrote.")],
    vary: Annotated[
        str, typer.Option(help="Factors that differ: experts, granularity, shared, d_model, tokens; comma-separated.")
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            help="Tokens of each run (500k, 2M, 1B), time of all runs together (90s, 55min, 2h), or both: 2M,55min."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; needed without --dry-run.")] = None,
    experts: Annotated[str | None, typer.Option(help="E, experts of the dense block's width; 1 is dense.")] = None,
    granularity: Annotated[str | None, typer.Option(help="g: an expert has a g-th of the active width.")] = None,
    shared: Annotated[str | None, typer.Option(help="Shared expert of half of the active width: on, off.")] = None,
    d_model: Annotated[str | None, typer.Option(help="Sizes; each is compared within itself.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens of a run, instead of those of --budget.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each point, from the spec's seed on.")] = 3,
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="How far active parameters outside of the tables may differ.")
    ] = 0.02,
    width_multiple: Annotated[
        int, typer.Option(min=1, max=1024, help="What widths of experts are multiples of; 8 keeps grouped GEMM.")
    ] = 8,
    threads: Annotated[int | None, typer.Option(min=1, max=256, help="Default: one per core.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in --out; --seeds may be more.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan or the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Train a grid of small models under equal active parameters and equal tokens, with several seeds, and say of each
    factor whether it moves the held-out loss.

    Widths are chosen so that each shape has the active parameters of the spec's model; what cannot be had within
    --tolerance is left out with the reason. All points see the same text in the same order under the same seeds.
    OUT/runs.csv feeds `moec fit`, OUT/report.json has everything, OUT/plot.svg is the plot.

    Example: [bold]moec sweep SPEC --data corpus --vary experts,granularity,shared --budget 55min
    --dry-run[/bold]

    Then: [bold]moec sweep SPEC --data corpus --vary experts,shared --experts 1,4,16 --budget 2M --out sweep[/bold]

    For a scaling law: [bold]moec sweep SPEC --data corpus --vary experts,d_model,tokens --d-model 64,128,192 --tokens
    1M,2M,4M --out law[/bold], then [bold]moec fit law/runs.csv[/bold]

    Exit status 1 if a run diverged or failed.
    """
    from moec.compiler.errors import UserError
    from moec.compiler.extras import require
    from moec.compiler.progress import Progress
    from moec.compiler.spec import load_spec
    from moec.training.sweep.asking import budget_of, grid_of

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device!r} is not known", remedy="use cpu or cuda")
    if out is None and not dry_run:
        raise UserError("no folder to write to", place="moec sweep", remedy="give --out FOLDER, or --dry-run")
    if resume and dry_run:
        raise UserError("--resume and --dry-run are given", place="moec sweep", remedy="choose one")
    loaded = load_spec(spec)
    values = {
        "experts": experts, "granularity": granularity, "shared": shared, "d_model": d_model, "tokens": tokens
    }  # fmt: skip
    each, time = budget_of(budget)
    grid = grid_of(loaded, vary, values, each)
    for module in ("scipy", "matplotlib"):
        require(module, "plan", "a sweep's report")
    import torch  # seconds, which a fault in the options need not wait for

    from moec.training.data.shards import Corpus
    from moec.training.sweep.sweep import Asked, Sweep, plan, request_of

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA that torch can use", remedy="use --device cpu")
    known = request_of(out) if out is not None and resume else None
    if not grid.tokens and time is None and known is None:
        raise UserError(
            "says neither tokens nor time", place="--budget", remedy="give tokens of a run, time of all, or both"
        )
    progress = Progress(quiet=quiet)
    asked = Asked(loaded, Corpus.open(data), grid, seeds, time, tolerance, width_multiple, threads, device)
    planned = plan(asked, known, progress)
    if dry_run:
        _print_plan(planned, as_json=as_json)
        return
    assert out is not None
    _announce(planned, progress)
    _run(Sweep(planned, out, resume=resume, progress=progress).run(), out, as_json=as_json)


def _run(stages: Any, out: Path, *, as_json: bool) -> None:
    from moec.cli.output import emit_json
    from moec.cli.status import CHECK_FAILED
    from moec.training.state import write_whole
    from moec.training.sweep.page import plot, report, runs_csv

    found: dict[str, Any] = {}
    swept = None
    for swept in stages:  # each run that ends: what is known so far can be read meanwhile
        found = report(swept)
        _write_report(out, found)
        write_whole(out / "runs.csv", runs_csv(swept))
    assert swept is not None
    write_whole(out / "plot.svg", plot(found, found["name"]))
    if as_json:
        emit_json({"out": out, **found})
    else:
        _show(out, swept, found)
    if swept.lost:
        raise typer.Exit(CHECK_FAILED)


def _write_report(out: Path, found: dict[str, Any]) -> None:
    from moec.cli.output import json_text
    from moec.training.state import write_whole

    write_whole(out / "report.json", json_text(found) + "\n")


def _announce(planned: Planned, progress: Progress) -> None:
    from moec.training.metrics import clock

    for left in planned.left_out:
        progress.write(f"left out: {left.label}: {left.reason}")
    for warning in planned.warnings:
        progress.write(f"note: {warning}")
    tokens = " or ".join(f"{n:,}" for n in sorted({p.tokens for p in planned.points}))
    time = planned.asked.time
    within = "" if time is None else f", of {clock(time)}"
    seeds = f"{len(planned.seeds)} seed{'s' * (len(planned.seeds) > 1)}"
    progress.write(
        f"{len(planned.points)} points, {seeds}, {tokens} tokens each: about {clock(planned.predicted)}{within}"
    )


def _print_plan(planned: Planned, *, as_json: bool) -> None:
    from moec.cli.output import emit_json, say, table
    from moec.training.metrics import clock
    from moec.training.sweep.page import plan_facts

    if as_json:
        emit_json(plan_facts(planned))
        return
    rows = [
        (
            p.block,
            p.d_model,
            _widths(p),
            f"{p.total:,}",
            f"{p.active:,}",
            f"{p.body:,}",
            f"{p.deviation:+.2%}",
            f"{p.router / p.body:.1%}",
            f"{p.tokens:,}",
            f"{planned.seconds[p.name]:.0f}",
        )
        for p in planned.points
    ]
    columns = (
        "block", "d_model", "widths", "parameters", "active", "outside tables", "off by", "router", "tokens",
        "seconds a run",
    )  # fmt: skip
    table(f"{planned.asked.spec.name}: stage {planned.stage.name}", columns, rows, right=(1, 3, 4, 5, 6, 7, 8, 9))
    for left in planned.left_out:
        say(f"left out: {left.label}: {left.reason}")
    for warning in planned.warnings:
        say(f"note: {warning}")
    runs, time = len(planned.runs), planned.asked.time
    say(
        f"\n{runs} runs: {len(planned.points)} points, seeds {', '.join(map(str, planned.seeds))}; about "
        f"{clock(planned.predicted)} on {planned.device}" + ("" if time is None else f", of a budget of {clock(time)}")
    )
    if time is not None and planned.predicted > time:
        say("that is longer than the budget: the last runs would wait for another call with --resume and more time")


def _widths(point: Any) -> str:
    moe = point.config.moe
    if moe is None:
        return str(point.config.ffn_width)
    shared = f" + {moe.shared_width}" if moe.shared_width else ""
    return f"{moe.top_k} of {moe.experts} x {moe.expert_width}{shared}"


def _show(out: Path, swept: Swept, found: dict[str, Any]) -> None:
    import statistics

    from moec.cli.output import say, table
    from moec.training.sweep.page import value_text

    best = min((p["loss"] for p in found["points"] if p["loss"] is not None), default=None)
    rows = []
    for shape, p in zip(swept.planned.points, found["points"], strict=True):
        losses = list(p["losses"].values())
        spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        mark = "" if p["loss"] is None else ("best" if p["loss"] == best else f"{p['loss'] - best:+.4f}")
        rows.append(
            (
                shape.block,
                shape.d_model,
                f"{shape.tokens:,}",
                f"{shape.total:,}",
                f"{shape.active:,}",
                f"{shape.deviation:+.2%}",
                len(losses),
                "" if p["loss"] is None else f"{p['loss']:.4f}",
                spread,
                mark,
            )
        )
    columns = (
        "block", "d_model", "tokens", "parameters", "active", "off by", "seeds", "held-out loss", "over seeds",
        "behind",
    )  # fmt: skip
    table(f"{found['name']}: {found['trained']} runs", columns, rows, right=(1, 2, 3, 4, 5, 6, 7, 8, 9))
    cells = []
    for e in found["effects"]:
        interval = "" if e["low"] is None else f"{e['low']:+.4f} to {e['high']:+.4f}"
        alone = "" if e["low_alone"] is None else f"{e['low_alone']:+.4f} to {e['high_alone']:+.4f}"
        agree = sum(d * e["difference"] > 0 for d in e["by_seed"].values())
        cells.append(
            (
                f"{value_text(e['factor'], e['before'])} to {value_text(e['factor'], e['after'])}",
                e["pairs"],
                f"{e['difference']:+.4f}",
                interval,
                alone,
                f"{agree} of {len(e['by_seed'])}",
                "no" if not e["separable"] else "yes" if e["separable_alone"] else "perhaps",
            )
        )
    title = f"\nEffects on the loss, nats; {found['confidence']:.0%} for each factor"
    table(
        title,
        ("from, to", "pairs", "difference", "interval", "by seeds alone", "seeds agree", "separable"),
        cells,
        right=(1, 2, 4),
    )
    for factor, verdict in found["verdicts"].items():
        say(f"{factor}: {verdict}")
    noise = found["noise"]
    if noise["deviation"] is not None:
        say(f"noise of a run: {noise['deviation']:.4f} nats, {noise['degrees_of_freedom']} degrees of freedom")
    for lost in found["lost"]:
        say(f"{lost['point']}, seed {lost['seed']}: {lost['status']}: {lost['message']}")
    if found["waiting"]:
        say(f"{len(found['waiting'])} runs were not begun: the time is spent; continue with --resume and more of it")
    say(f"\n{out}: report.json, plot.svg, runs.csv (`moec fit {out / 'runs.csv'}`)")
