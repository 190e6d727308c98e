"""`moec explain`: what the passes recognised in a model, and why not more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("explain")(explain)


def explain(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what each pass changed and, for every candidate it left alone, the node and the reason.

    No weights are read. Exit status 1 if an MoE layer is left unfused.

    Example: [bold]moec explain specs/models/mobilemoe-tiny.yaml[/bold]
    """
    from moec.compiler.cli.output import emit_json, table
    from moec.compiler.spec import load_spec

    loaded = load_spec(spec)
    from moec.compiler import build  # torch: seconds, which a fault in the spec need not wait for

    found = build.explain(loaded)
    if as_json:
        emit_json(found)
    else:
        table(found.name, ["pass", "changed", "refused"], [(r.name, r.changed, len(r.refusals)) for r in found.records])
