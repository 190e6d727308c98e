"""`moec explain`: what the passes recognised in a model, and why not more."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("explain")(explain)


def explain(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec.")],
    target: Annotated[str | None, typer.Option(help="One of the spec's targets; needed when it names several.")] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Also print the graph that the passes left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what each pass changed and, for every candidate it left alone, the node and the reason.

    No weights are read. A block that must be fused and is not is an error that names it.

    Example: [bold]moec explain specs/models/mobilemoe-tiny.yaml[/bold]
    """
    from moec.compiler.cli.output import emit_json, table
    from moec.compiler.spec import load_spec

    loaded = load_spec(spec)
    from moec.compiler import build  # torch: seconds, which a fault in the spec need not wait for

    found = build.explain(loaded, target)
    if as_json:
        records = [asdict(record) for record in found.records]
        return emit_json({"name": found.name, "passes": records, **({"graph": found.text} if graph else {})})
    rows = [(r.name, r.changed, len(r.refusals), f"{r.seconds:.2f}", r.digest) for r in found.records]
    table(found.name, ["pass", "changed", "refused", "seconds", "graph"], rows, right=[1, 2, 3])
    left = [(r.name, x.where or "-", x.node, x.reason) for r in found.records for x in r.refusals]
    if left:
        table("\nLeft alone", ["pass", "block", "node", "reason"], left)
    if graph:
        print("\n" + found.text, end="")
