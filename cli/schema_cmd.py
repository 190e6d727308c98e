"""`moec schema`: the JSON Schema of specs and of device files, for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("schema")(schema)


def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead of stdout.")] = None,
    device: Annotated[bool, typer.Option("--device", help="The schema of device files instead.")] = False,
) -> None:
    """Print the JSON Schema of specs, installed third-party targets included.

    A spec's first line tells an editor where it is: [bold]# yaml-language-server: $schema=PATH[/bold]

    Example: [bold]moec schema --out specs/schema.json[/bold]
    """
    from moec.cli.output import json_text, write_text
    from moec.compiler.spec.schema import device_schema, spec_schema

    text = json_text(device_schema() if device else spec_schema())
    if out is None:
        print(text)
    else:
        write_text(out, text + "\n")
