"""`moec fit`: the scaling law fitted to one's own training runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moec.analysis.plan.fit import Fit


def register(app: typer.Typer) -> None:
    app.command("fit")(fit)


def fit(
    runs: Annotated[Path, typer.Argument(metavar="RUNS.csv", help="Columns active_parameters, tokens, experts, loss.")],
    bootstrap: Annotated[int, typer.Option(min=0, max=10_000, help="Resamples for the intervals; 0: none.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of starting points and resamples.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the law for `moec search --law`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the fit as JSON.")] = False,
) -> None:
    """Fit the on-device scaling law to training runs, with 95% bootstrap intervals.

    RUNS.csv has one line for each run: active parameters and tokens as they are (0.3e9), experts of the dense block's
    width (1: dense), and the final loss. At least 12 runs, with 3 sizes, 3 token counts and 2 numbers of experts among
    them.

    Example: [bold]moec fit runs.csv --bootstrap 500 --out law.json[/bold]
    """
    from moec.analysis.plan.fit import fit as run
    from moec.analysis.plan.fit import read_runs
    from moec.analysis.plan.scaling_law import law_text
    from moec.cli.output import check_writable, emit_json, write_text

    check_writable(out)
    table = read_runs(runs)
    found = run(table, bootstrap=bootstrap, seed=seed, source=f"fit to {runs.name}, {len(table)} runs")
    if out is not None:
        write_text(out, law_text(found.law))
    if as_json:
        emit_json(_facts(found))
        return
    _show(found)


def _facts(f: Fit) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(f)


def _show(f: Fit) -> None:
    from moec.analysis.plan.scaling_law import COEFFICIENTS, PUBLISHED
    from moec.cli.output import table

    law = f.law
    rows = []
    for name in COEFFICIENTS:
        low, high = f.intervals.get(name, (None, None))
        interval = "" if low is None else f"{low:.4f} to {high:.4f}"
        rows.append((name, f"{getattr(law, name):.4f}", interval, f"{getattr(PUBLISHED, name):.4f}"))
    title = f"{f.runs} runs, RMSE {law.rmse:.5f}, {f.explained:.1%} of the variance, {f.bootstrap} resamples"
    table(title, ["coefficient", "fit", "95%", "published"], rows, right=[1, 2, 3])
    n, d = f.at
    loss = law.loss(n, d, f.best_experts)
    low, high = f.intervals.get("loss at the middle", (None, None))
    interval = "" if low is None else f" ({low:.4f} to {high:.4f})"
    agreed = f", in {f.best_experts_share:.0%} of the resamples" if f.bootstrap else ""
    print(f"\nat {n:g} B active, {d:g} B tokens: least loss {loss:.4f}{interval} with E = {f.best_experts}{agreed}")
    print(
        f"fitted from {law.parameters.low:g} to {law.parameters.high:g} B active parameters, {law.tokens.low:g} to "
        f"{law.tokens.high:g} B tokens, {law.experts.low:g} to {law.experts.high:g} experts"
    )
