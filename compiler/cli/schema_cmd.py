"""`moec schema`: the JSON Schema of specs, for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("schema")(schema)


def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead of stdout.")] = None,
) -> None:
    """Print the JSON Schema of specs, installed third-party targets included.

    A spec's first line tells an editor where it is: [bold]# yaml-language-server: $schema=PATH[/bold]

    Example: [bold]moec schema --out specs/schema.json[/bold]
    """
    from moec.compiler.cli.output import json_text, write_text
    from moec.compiler.spec.schema import spec_schema

    text = json_text(spec_schema())
    if out is None:
        print(text)
    else:
        write_text(out, text + "\n")
