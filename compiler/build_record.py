"""Paths and timings of a compile, kept on the machine that compiled and not in the artifact.

They are in `OUT.build.json` beside the folder OUT. Nothing in the folder depends on the machine, so that the same
compile gives the same bytes everywhere. A record names the contents of its artifact; one of other contents is ignored.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moec.compiler.artifact import Artifact, Manifest
from moec.compiler.errors import CheckpointError, UserError
from moec.compiler.files import read_bytes
from moec.compiler.spec import Spec

_MAX_BYTES = 1 << 20


class BuildRecord(BaseModel):
    """`contents`: of the artifact (`Manifest.contents`). `model`: the paths of the model by key. All are absolute.

    seconds: of each stage; pass_seconds: of each pass, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contents: str
    checkpoint: str
    model: dict[str, str]
    machine: str
    seconds: dict[str, float]
    pass_seconds: tuple[tuple[str, float], ...]


def model_paths(spec: Spec) -> dict[str, Path]:
    """The paths in the spec's `model:` section, by key; none where the section holds all of the model."""
    return {name: value for name, value in spec.model if isinstance(value, Path)}


def portable(spec: Spec) -> Spec:
    """The spec without the folders of one machine: paths are cut to their last part, the checkpoint is left out."""
    names = {key: Path(path.name) for key, path in model_paths(spec).items()}
    changes: dict[str, Any] = {"checkpoint": None, "model": spec.model.model_copy(update=names)}
    if spec.device is not None and os.sep in spec.device:
        changes["device"] = None
    return spec.model_copy(update=changes)


def located(spec: Spec, places: Mapping[str, Path]) -> Spec:
    """A portable spec with the paths of its model put back. CheckpointError for a path that `places` does not have."""
    missing = sorted(set(model_paths(spec)) - set(places))
    if missing:
        what = f"where its model ({missing[0]}) lies is not known here: no build record lies beside the artifact"
        raise CheckpointError(what, place=spec.name, remedy="name it with --checkpoint")
    return spec.model_copy(update={"model": spec.model.model_copy(update=dict(places))}) if places else spec


def record_file_of(folder: Path) -> Path:
    whole = folder.absolute()
    return whole.parent / f"{whole.name}.build.json"


def check_record_place(folder: Path) -> None:
    """UserError if another file, not a record of ours, has the name that the record of an artifact at `folder`
    takes."""
    file = record_file_of(folder)
    if not file.exists() and not file.is_symlink():
        return
    try:
        ours = not file.is_symlink() and set(BuildRecord.model_fields) == set(_read(file))
    except (UserError, ValueError, RecursionError, TypeError):
        ours = False
    if not ours:
        remedy = "move it away, or choose another --out"
        raise UserError("has the name of the build record, and moec did not write it", place=str(file), remedy=remedy)


def write_build_record(
    folder: Path,
    manifest: Manifest,
    *,
    checkpoint: Path,
    model: Mapping[str, Path],
    seconds: Mapping[str, float],
    pass_seconds: tuple[tuple[str, float], ...],
) -> None:
    """Write the record beside the artifact, completely or not at all. A failure is no error: the artifact works
    without."""
    record = BuildRecord(
        contents=manifest.contents,
        checkpoint=str(checkpoint.absolute()),
        model={key: str(path.absolute()) for key, path in model.items()},
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        seconds=dict(seconds),
        pass_seconds=pass_seconds,
    )
    file = record_file_of(folder)
    part = file.with_name(f".{file.name}.part{os.getpid()}")
    try:
        part.write_text(record.model_dump_json(indent=1) + "\n", "utf-8")
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)


def read_build_record(artifact: Artifact) -> BuildRecord | None:
    """The record beside the artifact; None where there is none, a damaged one, or one of another artifact."""
    try:
        record = BuildRecord.model_validate(_read(record_file_of(artifact.folder)))
    except (UserError, ValueError, RecursionError, ValidationError):
        return None
    return record if record.contents == artifact.manifest.contents else None


def _read(file: Path) -> Any:
    return json.loads(read_bytes(file, limit=_MAX_BYTES))
