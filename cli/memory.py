"""The option `--memory-mb` of the commands that run an artifact."""

from __future__ import annotations

from typing import Annotated

import typer

MemoryMb = Annotated[
    int | None,
    typer.Option(
        "--memory-mb",
        min=1,
        metavar="N",
        help="Stay within N million bytes: routed experts are read from the file when tokens select them. "
        "Default: what the spec says, else no limit.",
    ),
]
