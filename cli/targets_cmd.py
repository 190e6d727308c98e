"""`moec targets`: the targets that specs can name, and whether they work here."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    app.command("targets")(targets)


def targets(
    as_json: Annotated[bool, typer.Option("--json", help="Print the targets as JSON.")] = False,
) -> None:
    """List the targets, those of other distributions included: which can be used here, and what the others lack.

    Example: [bold]moec targets[/bold]
    """
    from moec.cli.output import emit_json, table
    from moec.compiler.spec.targets import target_packages

    found = [_facts(name, package) for name, package in target_packages().items()]
    if as_json:
        return emit_json(found)
    rows = [(f["name"], f["compiles"] or "yes", f["runs"] or "yes", f["about"]) for f in found]
    table("Targets", ["target", "compile", "run here", "what it is"], rows)
    for f in found:
        for option in f["options"]:
            print(f"{f['name']}, {option}")


def _facts(name: str, package: str) -> dict[str, Any]:
    """`compiles` and `runs`: None, or why not."""
    from moec.compiler import extras
    from moec.compiler.errors import UserError
    from moec.compiler.target import find_target

    try:
        target = find_target(name)
    except UserError as error:
        why = str(error)
        return {"name": name, "package": package, "about": "", "compiles": why, "runs": why, "options": []}
    options = [
        f"{need.when}: " + ("ready" if extras.installed(need.module) else extras.install_command(need.extra))
        for need in target.needs
        if need.when
    ]
    return {
        "name": name,
        "package": package,
        "about": target.about,
        "compiles": extras.missing(target.needs, "compile"),
        "runs": extras.missing(target.needs, "run") or target.obstacle(),
        "options": list(dict.fromkeys(options)),
    }
