"""`moec prefixes`: beginnings of prompts that a folder keeps."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.assistant.prefixes import Kept


def register(app: typer.Typer) -> None:
    app.command("prefixes")(prefixes)


def prefixes(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What --prefix-cache names.")],
    artifact: Annotated[
        Path | None,
        typer.Option(metavar="ARTIFACT", help="Only this artifact's, without those of applications; default: all."),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Forget what was kept under a name; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list as JSON.")] = False,
) -> None:
    """List the beginnings of prompts in a folder, with names, tokens and sizes, or remove some.

    Example: [bold]moec prefixes ~/.cache/prompts --remove assistant[/bold]
    """
    from moec.assistant.prefixes import checked_name, kept_in
    from moec.cli.output import emit_json, table
    from moec.compiler.artifact import Artifact
    from moec.compiler.units import size

    if remove and as_json:
        raise UserError("--json is of the list", remedy="leave --json or --remove out")
    for name in remove or ():
        checked_name(name, "--remove")
    contents = None if artifact is None else Artifact.open(artifact).manifest.contents
    try:
        found = kept_in(folder)
    except OSError as error:
        remedy = "name the folder that --prefix-cache names"
        raise UserError(f"cannot be read: {error.strerror}", place=str(folder), remedy=remedy) from None
    if contents is not None:  # applications have another digest of an artifact
        found = [one for one in found if one.artifact == contents[:16]]
    if remove:
        _remove(found, remove, folder)
        return
    rows = [(one, _bytes(one)) for one in found]
    if as_json:
        emit_json([{**_told(one), "bytes": count} for one, count in rows])
        return
    shown = [[one.name or "-", one.tokens, size(count), _day(one.used), one.artifact] for one, count in rows]
    table(str(folder), ["name", "tokens", "size", "used", "artifact"], shown, right=[1, 2])


def _remove(found: list[Kept], names: list[str], folder: Path) -> None:
    known = sorted({one.name for one in found if one.name})
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        what = f"no prefix is named {unknown}"
        raise UserError(what, place=str(folder), remedy=f"known: {', '.join(known) or 'none'}")
    for one in found:
        if one.name not in names:
            continue
        try:
            one.file.unlink(missing_ok=True)
        except OSError as error:
            what = f"cannot be removed: {error.strerror}"
            raise UserError(what, place=str(one.file), remedy="let this user write the folder") from None
        print(f"{one.file}: removed", file=sys.stderr)


def _day(used: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(used))


def _bytes(one: Kept) -> int:
    try:
        return one.file.stat().st_size
    except OSError:  # it was removed meanwhile
        return 0


def _told(one: Kept) -> dict[str, object]:
    return {"name": one.name, "tokens": one.tokens, "artifact": one.artifact, "file": str(one.file), "used": one.used}
