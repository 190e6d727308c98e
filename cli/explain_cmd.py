"""`moec explain`: what the passes recognised in a model, and why not more."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.status import CHECK_FAILED, DONE
from moec.cli.trust import Trust


def register(app: typer.Typer) -> None:
    app.command("explain")(explain)


def explain(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec.")],
    target: Annotated[str | None, typer.Option(help="One of the spec's targets; needed when it names several.")] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Also print the graph that the passes left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    trust: Trust = False,
) -> None:
    """Say what each pass changed and, for every candidate it left alone, the node and the reason.

    No weights are read. For a block that must be fused and is not, it says which part was understood, the node that
    prevented a match, the reason and the remedy; the exit status is 1.

    Example: [bold]moec explain specs/models/mobilemoe-tiny.yaml[/bold]
    """
    from moec.cli.output import emit_json, say, table
    from moec.compiler.spec import load_spec

    loaded = load_spec(spec)
    from moec.compiler import build  # torch: seconds, which a fault in the spec need not wait for

    found = build.explain(loaded, target)
    if as_json:
        records = [asdict(record) for record in found.records]
        matched = [dict(zip(("pass", "block", "operator", "attributes"), row, strict=True)) for row in found.matched]
        extra = {"graph": found.text} if graph else {}
        emit_json({"name": found.name, "passes": records, "matched": matched, "error": found.error, **extra})
        raise typer.Exit(CHECK_FAILED if found.error else DONE)
    rows = [(r.name, r.changed, len(r.refusals), f"{r.seconds:.2f}", r.digest) for r in found.records]
    table(found.name, ["pass", "changed", "refused", "seconds", "graph"], rows, right=[1, 2, 3])
    blocks = [row for row in found.matched if row[0] == "fuse_moe"]
    if blocks:
        table("\nMoE blocks", ["block", "operator", "attributes"], [row[1:] for row in blocks])
    left = [(r.name, x) for r in found.records for x in r.refusals]
    if left:
        misses = [(name, x.where or "-", x.node, x.reason) for name, x in left]
        table("\nLeft alone", ["pass", "block", "node", "reason"], misses)
        print("\nNearest misses")
        for name, x in left:
            understood = "".join(f"\n      {step}" for step in x.read) or "\n      nothing"
            say(f"  {name} at {x.where or x.node}\n    understood:{understood}\n    then: {x.node}: {x.reason}")
            if x.remedy:
                say(f"    remedy: {x.remedy}")
    if graph:
        say("\n" + found.text.rstrip("\n"))
    if found.error:
        say(f"\nThis model does not compile: {found.error}")
        raise typer.Exit(CHECK_FAILED)
