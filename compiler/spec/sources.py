"""The `model:` section. Each source of models brings the class of its form; no list of forms is kept here.

Sources are the files `moec/sources/<name>_source.py` and the modules that entry points in the group `moec.sources` name
(`key = "module"`). Importing one registers a `ModelSource` (compiler/source.py) and nothing heavy.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from moec.compiler.errors import CompileError, UserError
from moec.compiler.spec.strict import Fault, Section, collected, shown

if TYPE_CHECKING:
    from moec.compiler.source import ModelSource

ENTRY_POINTS = "moec.sources"


@cache
def _own() -> tuple[str, ...]:
    """Import the sources of this distribution; their modules."""
    home = importlib.import_module("moec.sources")
    names = sorted(file.stem for folder in home.__path__ for file in Path(folder).glob("*_source.py"))
    for name in names:
        importlib.import_module(f"moec.sources.{name}")
    return tuple(names)


@cache
def _others() -> dict[str, importlib.metadata.EntryPoint]:
    """Entry points of other distributions by the key of `model:` that they serve."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def source_keys() -> list[str]:
    """The keys of `model:` that choose a source: that of the default first, then by name."""
    from moec.compiler.source import registered

    _own()
    default = default_source().key
    return sorted({*registered(), *_others()}, key=lambda key: (key != default, key))


def default_source() -> ModelSource[Any]:
    """The source whose faults are reported for a section without any source's key."""
    from moec.compiler.source import registered

    _own()
    return next(source for source in registered().values() if source.default)


def find_source(key: str) -> ModelSource[Any]:
    """The source of a key in `source_keys()`. UserError for one of another distribution that cannot be imported."""
    from moec.compiler.source import registered

    _own()
    if key not in registered():
        entry = _others()[key]
        try:
            importlib.import_module(entry.value)
            return registered()[key]
        except Exception as error:
            # a fault of another distribution must not look like a bug of moec
            what = "does not register it" if isinstance(error, KeyError) else f"cannot be imported: {error}"
            raise UserError(
                f"model source {key}: its module {entry.value} {what}", remedy="reinstall or remove the distribution"
            ) from error
    return registered()[key]


def source_for(raw: Mapping[str, Any]) -> ModelSource[Any]:
    """The source of a section not yet read: that whose key it has."""
    return find_source(next((key for key in source_keys() if key in raw), default_source().key))


def source_of(model: Section) -> ModelSource[Any]:
    """The source of a section that was read: a spec's `model`. CompileError for a class that no source registered."""
    from moec.compiler.source import registered

    _own()
    for source in registered().values():
        if type(model) is source.section:
            return source
    raise CompileError(f"models of the form {type(model).__name__} have no source here")


def parse_model(raw: Any) -> Section:
    """The section as the class of its source; all faults at once."""
    if isinstance(raw, Section):
        return raw
    if not isinstance(raw, Mapping):
        raise collected("model", [Fault((), f"expected a mapping, got {shown(raw)}", "mapping_type")])
    try:
        return source_for(raw).section.model_validate(raw)
    except ValidationError as error:
        faults = [Fault(tuple(d["loc"]), d["msg"], d["type"]) for d in error.errors(include_url=False)]
        raise collected("model", faults) from None
