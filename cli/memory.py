"""The options `--memory-mb` and `--cache-aware` of the commands that run an artifact."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact

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
CacheAware = Annotated[
    float | None,
    typer.Option(
        "--cache-aware",
        min=0.0,
        max=1.0,
        metavar="X",
        help="With a memory budget: while decoding, prefer experts in memory to others whose selection values are at "
        "most X (0 to 1) times their range larger. Outputs then depend on what was decoded before. Default: off.",
    ),
]


def warn_of_preference(artifact: Artifact) -> None:
    """Say on stderr that outputs depend on the cache, where the artifact is to run so."""
    if artifact.cache_aware:
        print(
            f"cache-aware selection by {artifact.cache_aware:g}: outputs depend on which experts are in memory, and so "
            "on what this process decoded before; without --cache-aware experts are selected as the router says",
            file=sys.stderr,
        )
