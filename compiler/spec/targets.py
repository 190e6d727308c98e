"""The `targets:` section. Each target folder brings its own options class; no list of targets is kept here.

A target package `P` holds `P/options.py` with a class `Options(TargetOptions)` that imports nothing heavy. Packages are
the folders of `moec.targets` and the values of entry points in the group `moec.targets` (`name = "package"`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from moec.compiler.errors import UserError
from moec.compiler.spec.strict import Fault, Section, collected, shown, suggestion

ENTRY_POINTS = "moec.targets"


class TargetOptions(Section):
    """Base of every target's options, and what a target says of itself before it is loaded.

    default: whether specs that name no target mean this one; one target of this distribution does. saves_sessions:
    whether its sessions fork, rewind, save and restore.
    device_needs: keys of a device file without which a device cannot run the target's artifacts. device_isas: what such
    a file may list under `isa:` for the target, beside the instruction sets of CPUs.
    """

    default: ClassVar[bool] = False
    saves_sessions: ClassVar[bool] = False
    device_needs: ClassVar[tuple[str, ...]] = ()
    device_isas: ClassVar[tuple[str, ...]] = ()


@cache
def target_packages() -> dict[str, str]:
    """Target name -> importable package, ours first, then those of installed distributions."""
    home = importlib.import_module("moec.targets")
    found: dict[str, str] = {}
    for folder in home.__path__:
        for file in sorted(Path(folder).glob("*/options.py")):
            found[file.parent.name] = f"moec.targets.{file.parent.name}"
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        found.setdefault(entry.name, entry.value)
    return found


@cache
def options_class(name: str) -> type[TargetOptions]:
    """The options of target `name`; KeyError if there is no such target.

    UserError for a package of another distribution that cannot be imported or has no such class.
    """
    package = target_packages()[name]
    try:
        return importlib.import_module(f"{package}.options").Options
    except Exception as error:
        if package.startswith("moec."):
            raise
        raise UserError(
            f"target {name}: {package}.options cannot be used: {error}",
            remedy="reinstall or remove the distribution",
        ) from error


def default_targets() -> dict[str, TargetOptions]:
    """What a spec without `targets:` means: the target whose options say that they are the default."""
    (name,) = (name for name in _own_targets() if options_class(name).default)
    return parse_targets([name])


def targets_that_save_sessions() -> list[str]:
    """Those of this distribution."""
    return [name for name in _own_targets() if options_class(name).saves_sessions]


def _own_targets() -> list[str]:
    return [name for name, package in target_packages().items() if package.startswith("moec.")]


def normalized(value: Any) -> Any:
    """`[a, {b: {...}}]`, `{a: {...}, b: null}` and `a` are all read as a mapping of name to raw options."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, Mapping):
        return {key: {} if options is None else options for key, options in value.items()}
    if not isinstance(value, list):
        return value
    found: dict[Any, Any] = {}
    faults: list[Fault] = []
    for index, item in enumerate(value):
        if not isinstance(item, (str, Mapping)) or (isinstance(item, Mapping) and len(item) != 1):
            faults.append(Fault((index,), f"expected a target's name or one `name: {{options}}`, got {shown(item)}"))
            continue
        name, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        if name in found:
            faults.append(Fault((index,), f"target {shown(name)} is listed twice"))
        found[name] = {} if options is None else options
    if faults:
        raise collected("targets", faults)
    return found


def parse_targets(value: Any) -> dict[str, TargetOptions]:
    """Validate every target's options with that target's class; all faults at once."""
    raw = normalized(value)
    if not isinstance(raw, Mapping):
        raise collected("targets", [Fault((), f"expected a list of targets, got {shown(value)}")])
    if not raw:
        raise collected("targets", [Fault((), f"name a target; known here: {', '.join(target_packages())}")])
    found: dict[str, TargetOptions] = {}
    faults: list[Fault] = []
    for name, options in raw.items():
        if not isinstance(name, str) or name not in target_packages():
            faults.append(Fault((name,), "unknown target" + suggestion(str(name), target_packages())))
            continue
        try:
            found[name] = options_class(name).model_validate(options)
        except ValidationError as error:
            faults += [Fault((name, *d["loc"]), d["msg"], d["type"]) for d in error.errors(include_url=False)]
    if faults:
        raise collected("targets", faults)
    return found
