"""An artifact: a folder with the program file(s), the tokenizer and `manifest.json`.

`new_artifact` replaces one as a whole. `Artifact.open` checks what can be checked without reading gigabytes,
`check_contents` reads all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moec.compiler.errors import ArtifactError
from moec.compiler.replacing import replacing
from moec.compiler.spec.targets import TargetOptions, options_class

FORMAT = 1
MANIFEST = "manifest.json"
_REMEDY = "compile it again with `moec compile`"
# Enough to hold a program's header and instructions, little enough to be read at every load.
_HEAD_BYTES = 1 << 22


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """One file of the folder. `head_sha256` covers its first 4 MiB; `bytes` its whole length."""

    name: str
    bytes: int
    sha256: str
    head_sha256: str


class PassEntry(_Record):
    """One pass that ran: how many rewrites, what it refused and why, and the digest of the graph it left."""

    name: str
    changed: int
    seconds: float
    digest: str
    refusals: tuple[str, ...] = ()


class CodesEntry(_Record):
    """Weights that are held as codes alike: how many, of which role, and where the codes come from.

    origin: `carried: FORMAT` bit for bit from a checkpoint, or `computed: METHOD`.
    """

    role: str
    weights: int
    bits: int
    group_size: int
    group_axis: str
    zero_points: bool = False
    origin: str


class Digests(_Record):
    """What went in. `checkpoint` covers names, types, shapes and sizes of the tensors, not their bytes."""

    spec: str
    checkpoint: str
    graph: str
    kernel: str | None = None


_Count = Annotated[int, Field(ge=1, lt=1 << 31)]
_Id = Annotated[int, Field(ge=0, lt=1 << 31)]


class ModelRecord(_Record):
    """What a runtime must know; lengths in tokens. `moe_layers` are module paths in the order they run."""

    name: str
    vocab_size: _Count
    context: _Count
    max_tokens: _Count
    bos_id: _Id | None
    eos_ids: tuple[_Id, ...]
    moe_layers: tuple[str, ...]


class Manifest(_Record):
    """All that is known of an artifact. `details` are the target's facts (`Target.facts`); `notes` are for the user."""

    format: int
    moec: str
    name: str
    target: str
    spec: dict[str, Any]
    checkpoint: str
    quantization: Any
    model: ModelRecord
    digests: Digests
    passes: tuple[PassEntry, ...]
    files: tuple[FileRecord, ...]
    sizes_by_role: dict[str, int]
    details: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    codes: tuple[CodesEntry, ...] = ()

    def section(self, *names: str) -> Mapping[str, Any]:
        """A mapping inside `spec`, such as ("model", "moe"); empty where there is none."""
        found: Any = self.spec
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}


class Artifact:
    """An artifact folder whose manifest was read and whose files have the right length and head."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Artifact({str(self.folder)!r}, {self.manifest.name} for {self.manifest.target})"

    def path(self, name: str) -> Path:
        """The path of one of the manifest's files; ArtifactError if the manifest does not list it."""
        if all(f.name != name for f in self.manifest.files):
            raise ArtifactError(f"the manifest lists no {name}", place=str(self.folder), remedy=_REMEDY)
        return self.folder / name

    def options(self) -> TargetOptions:
        """The options that its spec gave its target; ArtifactError if they are damaged."""
        target = self.manifest.target
        try:
            return options_class(target).model_validate(self.manifest.section("targets").get(target) or {})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in ("spec", "targets", target, *first["loc"]))
            place = str(self.folder / MANIFEST)
            raise ArtifactError(f"damaged: {where}: {first['msg']}", place=place, remedy=_REMEDY) from error

    @property
    def bytes(self) -> int:
        """Length of all listed files together."""
        return sum(f.bytes for f in self.manifest.files)

    @staticmethod
    def open(folder: str | Path) -> Artifact:
        """Read and check a folder; every fault is an ArtifactError with a remedy."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        for record in manifest.files:
            _check_file(folder / record.name, record)
        return Artifact(folder, manifest)

    def check_contents(self) -> None:
        """Read every file whole and compare its digest."""
        for record in self.manifest.files:
            file = self.folder / record.name
            if file_digest(file) != record.sha256:
                raise ArtifactError("the contents differ from the manifest's digest", place=str(file), remedy=_REMEDY)


def new_artifact(out: Path) -> AbstractContextManager[Path]:
    """The folder to write an artifact into, which becomes `out` when the block ends well (see `replacing`)."""
    return replacing(out, marker=MANIFEST, kind="an artifact")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; ArtifactError if it is missing, not JSON, of another format, or incomplete."""
    file = folder / MANIFEST
    if not folder.is_dir():
        found = "is a file, not an artifact folder" if folder.exists() else "no such artifact folder"
        raise ArtifactError(found, place=str(folder), remedy="name a folder that `moec compile` wrote")
    if file.exists() and not file.is_file():
        raise ArtifactError("is not a file", place=str(file), remedy=_REMEDY)
    try:
        raw = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"no {MANIFEST} in this folder", place=str(folder), remedy=_REMEDY) from None
    except OSError as error:
        raise ArtifactError(error.strerror or str(error), place=str(file)) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"damaged: {_one_line(error)}", place=str(file), remedy=_REMEDY) from error
    version = raw.get("format") if isinstance(raw, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"format {version!r}, this moec reads format {FORMAT}", place=str(file), remedy=_REMEDY)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"damaged: {where}: {first['msg']}", place=str(file), remedy=_REMEDY) from error
    for record in manifest.files:  # a manifest is input: it may not point outside its folder
        if Path(record.name).name != record.name or "\0" in record.name:
            raise ArtifactError(f"damaged: file name {record.name!r}", place=str(file), remedy=_REMEDY)
    return manifest


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_file(file: Path, record: FileRecord) -> None:
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ArtifactError("is not a file", place=str(file), remedy=_REMEDY)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(_HEAD_BYTES)
    except FileNotFoundError:
        raise ArtifactError("the file is missing", place=str(file), remedy=_REMEDY) from None
    except IsADirectoryError:
        raise ArtifactError("is a folder, not a file", place=str(file), remedy=_REMEDY) from None
    except OSError as error:
        raise ArtifactError(error.strerror or str(error), place=str(file)) from error
    if size != record.bytes:
        what = "truncated" if size < record.bytes else "too long"
        raise ArtifactError(f"{what}: {size} bytes, the manifest says {record.bytes}", place=str(file), remedy=_REMEDY)
    if hashlib.sha256(head).hexdigest() != record.head_sha256:
        raise ArtifactError(
            "damaged: its first bytes differ from the manifest's digest", place=str(file), remedy=_REMEDY
        )


def file_digest(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def record_file(file: Path, sha256: str | None = None) -> FileRecord:
    """The record of a written file; `sha256` if the writer computed it on the way."""
    with file.open("rb") as stream:
        head = hashlib.sha256(stream.read(_HEAD_BYTES)).hexdigest()
    return FileRecord(name=file.name, bytes=file.stat().st_size, sha256=sha256 or file_digest(file), head_sha256=head)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into an artifact that is being made."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
