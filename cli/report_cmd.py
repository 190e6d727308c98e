"""`moec report`: one HTML page about an artifact, or about a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.cli.trust import Trust
from moec.compiler.errors import UserError

RUN = "run.json"


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An artifact, or the folder of a training run.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: PATH.report.html, beside the folder.")] = None,
    device: Annotated[
        str | None, typer.Option(help="A device whose budget and speed to compare with. Default: the spec's.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="What `moec profile --json` wrote. Default: the file beside PATH.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(help="What `moec verify ARTIFACT --json` wrote. Default: the file beside PATH.")
    ] = None,
    passes: Annotated[
        Path | None, typer.Option(help="What `moec verify SPEC --json` wrote. Default: the file beside PATH.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    trust: Trust = False,
) -> None:
    """Write one self-contained HTML page: sizes, graphs, passes, verification, memory and speed, experts, versions.

    The page loads nothing from elsewhere. Verification and profile are taken from PATH.verify.json and
    PATH.profile.json if they are about this artifact.

    Example: [bold]moec profile build/s --json build/s.profile.json; moec report build/s --device galaxy-s25[/bold]
    """
    from moec.cli.output import check_writable
    from moec.compiler.progress import Progress

    page = out if out is not None else path.parent / f"{path.resolve().name}.report.html"
    if page.is_dir():
        raise UserError("is a folder", place=str(page), remedy="name an .html file with --out")
    check_writable(page)
    if (path / RUN).is_file():
        for option, value in (("--device", device), ("--profile", profile), ("--verify", verify), ("--passes", passes)):
            if value is not None:
                raise UserError(f"{option} is for artifacts", place=str(path), remedy="leave it out for a training run")
        _training_report(path, page)
    else:
        from moec.analysis.report.artifact import artifact_page
        from moec.cli.output import write_text
        from moec.compiler.artifact import Artifact

        artifact = Artifact.open(path)
        text = artifact_page(
            artifact, verify=verify, passes=passes, profile=profile, device=device, progress=Progress(quiet=quiet)
        )
        write_text(page, text)
    print(page)


def _training_report(run: Path, page: Path) -> None:
    try:
        from moec.training.report import write_report
    except ImportError as error:
        if error.name is None or not error.name.startswith("moec.training"):
            raise
        raise UserError(
            "holds a training run, whose reports this installation cannot write",
            place=str(run),
            remedy="install moec with its training part",
        ) from None
    write_report(run, page)
