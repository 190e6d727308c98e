"""The native build that a wheel brings (tools/wheel.py puts it there), and whether it fits where it was installed.

It is a folder like one of the cache, with a record of what it was made from and for. It serves if all of that is so
here: the same sources, the same executorch, which lies beside moec since the libraries look for it there, and the same
kind of machine. Anything else is a reason to build instead, never to load it all the same.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "shipped"
_RECORD = "build.json"


@dataclass(frozen=True)
class Record:
    """What a build was made from and for. `sources` is the digest of the native sources, `executorch` a version."""

    sources: str
    executorch: str
    machine: str  # as platform.machine() says it
    system: str  # as sys.platform says it

    def write(self, folder: Path) -> None:
        (folder / _RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


def read_record(folder: Path) -> Record | None:
    """The record in `folder`; None if it is missing or no such record."""
    try:
        values = json.loads((folder / _RECORD).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    names = [field.name for field in fields(Record)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        return None
    if not all(isinstance(value, str) for value in values.values()):
        return None
    return Record(**values)


def mismatch(folder: Path, *, sources: str, executorch: str, executorch_folder: Path) -> str | None:
    """Why the build in `folder` does not fit here, in a few words; None if its record says that it does."""
    record = read_record(folder)
    if record is None:
        return "their record is damaged"
    if (record.system, record.machine) != (sys.platform, platform.machine()):
        return f"they are for {record.system} on {record.machine}, this is {sys.platform} on {platform.machine()}"
    if record.executorch != executorch:
        return f"they are for executorch {record.executorch}, and {executorch} is installed"
    beside = folder.parents[2] / "executorch"  # <site-packages>/moec/runtime/shipped
    if not beside.is_dir() or not beside.samefile(executorch_folder):
        return f"executorch is not installed beside moec but in {executorch_folder.parent}"
    if record.sources != sources:
        return "they were built from other sources than those installed"
    return None
