"""`moec compile`: a spec becomes an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.cli.trust import Trust


def register(app: typer.Typer) -> None:
    app.command("compile")(compile_spec)


def compile_spec(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec, or a checkpoint folder.")],
    target: Annotated[str | None, typer.Option(help="The spec's only one, or one of `moec targets`.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder with the weights; wins over the spec's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Artifact folder to write. Default: NAME-TARGET here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Compile even what does not fit the spec's device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was built as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    trust: Trust = False,
) -> None:
    """Compile a spec into an artifact folder that `moec run` and ExecuTorch apps load.

    A checkpoint folder stands for the spec that its config.json implies, INT4 in groups of 32, which is printed.

    An artifact that stands at --out is replaced only when the new one is complete.

    Example: [bold]moec compile specs/models/mobilemoe-s.yaml --checkpoint MobileMoE-S-QAT --out build/s[/bold]

    Example: [bold]moec compile SmolLM2-135M-Instruct --out build/smollm2[/bold]
    """
    from moec.cli.given import spec_given
    from moec.cli.output import emit_json, size
    from moec.compiler.progress import Progress

    loaded = spec_given(spec, quiet=quiet)
    from moec.compiler import build  # torch: seconds, which a fault in the spec need not wait for

    progress = Progress(quiet=quiet)
    artifact = build.compile(loaded, target=target, checkpoint=checkpoint, out=out, progress=progress, force=force)
    manifest = artifact.manifest
    if as_json:
        emit_json({"artifact": artifact.folder, "bytes": artifact.bytes, "manifest": manifest})
        return
    print(f"{artifact.folder}: {manifest.name} for {manifest.target}, {size(artifact.bytes)}")
    for note in manifest.notes:
        print(f"note: {note}")
