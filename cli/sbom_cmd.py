"""`moec sbom`: what an artifact is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("sbom")(sbom)


def sbom(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact folder.")],
    out: Annotated[Path, typer.Option(help="The file to write; - for stdout.")] = Path("-"),
    license: Annotated[
        str | None, typer.Option(metavar="SPDX", help="The model's licence, e.g. apache-2.0. Default: left out.")
    ] = None,
) -> None:
    """Write a software bill of materials: files with digests, kernels, libraries, licences. CycloneDX 1.6, JSON.

    The same artifact gives the same bytes. Every file is read and compared with its digest first.

    Example: [bold]moec sbom build/s --out build/s.cdx.json --license Apache-2.0[/bold]
    """
    from moec.analysis.provenance.bill import artifact_bill
    from moec.cli.output import check_writable, write_text
    from moec.compiler.artifact import Artifact

    check_writable(out)
    text = artifact_bill(Artifact.open(artifact), license=license)
    if str(out) == "-":
        print(text, end="")
    else:
        write_text(out, text)
