"""The option `--trust` of every command that may load code."""

from __future__ import annotations

from typing import Annotated

import typer


def _say_so(given: bool) -> bool:
    if given:
        from moec.compiler.trust import trust

        trust()
    return given


Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        callback=_say_so,
        help="Run code that the input brings: a Python model, a .pt2, an MLIR program, a task's functions.",
    ),
]
