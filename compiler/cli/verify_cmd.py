"""`moec verify`: does the artifact compute what the model computes?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that `moec compile` wrote.")],
    checkpoint: Annotated[Path | None, typer.Option(help="The weights, if they have moved since.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here; - is stdout.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to compare; more take longer.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Replay an artifact against the eager model with the same integer weights. Exit status 1 if a tolerance is missed.

    Example: [bold]moec verify build/s --json report.json[/bold]
    """
    from moec.compiler.cli.output import json_text, write_text
    from moec.compiler.progress import Progress
    from moec.compiler.verify.artifact import verify_artifact

    report = verify_artifact(artifact, checkpoint=checkpoint, tokens=tokens, progress=Progress(quiet=quiet))
    text = json_text(report.to_json())
    if json_file is not None and str(json_file) != "-":
        write_text(json_file, text + "\n")
    print(text if str(json_file) == "-" else report.text())
    if not report.passed:
        raise typer.Exit(1)
