"""Rules that other distributions bring: entry points of the group `moec.passes`.

    [project.entry-points."moec.passes"]
    fuse_x = "their_package.fuse_x:fuse_x"

Each names a function of no arguments that returns a `Pass` from CANONICAL to CANONICAL. They run in the order of their
names, before the rules of ours that fuse, and are checked like ours: by the dialect, `moec verify` and `moec bisect`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from moec.compiler.errors import CompileError
from moec.compiler.pipeline import Pass
from moec.compiler.program import Stage

GROUP = "moec.passes"


def installed_rules() -> list[Pass]:
    """CompileError, naming the distribution, for one that cannot be loaded or is no such rule."""
    return [_load(point) for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)]


def _load(point: EntryPoint) -> Pass:
    owner = point.dist.name if point.dist is not None else "an unknown distribution"
    remedy = f"repair or uninstall {owner}"
    place = f"entry point {GROUP}: {point.name}"
    try:
        rule = point.load()()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CompileError(f"{point.value} of {owner} failed: {lines[0][:200]}", place=place, remedy=remedy) from error
    if not isinstance(rule, Pass):
        what = f"{point.value} of {owner} returned {type(rule).__name__}, not a Pass"
        raise CompileError(what, place=place, remedy=remedy)
    if (rule.needs, rule.gives) != (Stage.CANONICAL, Stage.CANONICAL):
        what = f"{point.value} of {owner} leads from {rule.needs.name} to {rule.gives.name}"
        raise CompileError(what, place=place, remedy="a rule needs and gives CANONICAL")
    return rule
