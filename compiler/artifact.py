"""An artifact: a folder with the program file(s), the tokenizer and `manifest.json`.

`new_artifact` replaces an artifact as a whole. `Artifact.open` checks what can be checked without reading gigabytes;
`check_contents` reads every file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.files import open_regular, read_bytes
from moec.compiler.replacing import await_replaced, replacing
from moec.compiler.spec.targets import TargetOptions, options_class
from moec.compiler.units import CONTROL

FORMAT = 2
MANIFEST = "manifest.json"
_REMEDY = "compile it again with `moec compile`"
# Enough to hold a program's header and instructions, little enough to be read at every load.
_HEAD_BYTES = 1 << 22
_MAX_MANIFEST = 16 << 20  # bytes; those of the largest models that were compiled are below 1 MB


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
    digest: str
    refusals: tuple[str, ...] = ()


class CodesEntry(_Record):
    """Weights held as codes of one format, role and origin: how many, and where the codes come from.

    origin: `carried: FORMAT` bit for bit from a checkpoint, or `computed: METHOD`. levels: the table whose values the
    codes number, if they are not numbers themselves.
    """

    role: str
    weights: int
    bits: int
    group_size: int
    group_axis: str
    zero_points: bool = False
    levels: str = ""
    origin: str

    @model_serializer(mode="wrap")
    def _as_before(self, standard: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `levels` where there are none: earlier versions read such manifests."""
        written: dict[str, Any] = standard(self)
        if not self.levels:
            del written["levels"]
        return written


class StateEntry(_Record):
    """States of the Program with equal declarations; a target that stores them otherwise says so in `details`.

    shape: an extent is a number, or `positions` (`positions<=N`: the last N). block: elements along each axis that
    share a scale, 0 for the whole axis; empty without codes. bytes: of all of them at the model's context.
    """

    states: int
    shape: tuple[int | str, ...]
    dtype: str
    update: str
    block: tuple[int, ...] = ()
    bytes: int


class Digests(_Record):
    """What went in. `checkpoint` covers names, types, shapes and sizes of the tensors, not their bytes."""

    spec: str
    checkpoint: str
    graph: str
    kernel: str | None = None


_Count = Annotated[int, Field(ge=1, lt=1 << 31)]
_Id = Annotated[int, Field(ge=0, lt=1 << 31)]


class ModelRecord(_Record):
    """What a runtime must know; lengths in tokens. `moe_layers` are module paths in the order they run.

    `prompt_begins`, `prompt_ends`: the ids that the post-processor of the model's tokenizer puts around every text;
    None without a tokenizer. `bos_id` is the model's BOS id, whether or not prompts begin with it.
    """

    name: str
    vocab_size: _Count
    context: _Count
    max_tokens: _Count
    bos_id: _Id | None
    eos_ids: tuple[_Id, ...]
    moe_layers: tuple[str, ...]
    prompt_begins: tuple[_Id, ...] | None = None
    prompt_ends: tuple[_Id, ...] | None = None


class Manifest(_Record):
    """All that is known of an artifact. `details` are the target's facts (`Target.facts`); `notes` are for the user.

    Nothing in it depends on machine or time (those are in `build_record`): the same compile gives the same manifest.
    calibration: the method that computed the codes, the text, and every expert with the tokens that it saw.
    """

    format: int
    moec: str
    name: str
    target: str
    spec: dict[str, Any]
    quantization: Any
    model: ModelRecord
    digests: Digests
    passes: tuple[PassEntry, ...]
    files: tuple[FileRecord, ...]
    sizes_by_role: dict[str, int]
    details: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    codes: tuple[CodesEntry, ...] = ()
    calibration: dict[str, Any] | None = None
    states: tuple[StateEntry, ...] = ()

    @property
    def contents(self) -> str:
        """SHA-256 over the names and digests of all files: what an artifact is, whatever made it. Hexadecimal."""
        lines = "".join(f"{f.sha256}  {f.name}\n" for f in sorted(self.files, key=lambda f: f.name))
        return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()

    def section(self, *names: str) -> Mapping[str, Any]:
        """A mapping inside `spec`, such as ("model", "moe"); empty where there is none."""
        found: Any = self.spec
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}


class Artifact:
    """An artifact folder whose manifest was read and whose files have the right length and head."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        overrides: Mapping[str, Any] | None = None,
        *,
        cache_aware: float = 0.0,
    ) -> None:
        """`overrides`: options of the target for this session, in place of those the artifact was compiled with.
        `cache_aware`: see `within`; an artifact cannot bring it, since results then depend on what ran before."""
        self.folder = folder
        self.manifest = manifest
        self.cache_aware = cache_aware
        self._overrides = dict(overrides or {})

    def __repr__(self) -> str:
        return f"Artifact({str(self.folder)!r}, {self.manifest.name} for {self.manifest.target})"

    def path(self, name: str) -> Path:
        """The path of one of the manifest's files; ArtifactError if the manifest does not list it."""
        if all(f.name != name for f in self.manifest.files):
            raise ArtifactError(f"the manifest lists no {name}", place=str(self.folder), remedy=_REMEDY)
        return self.folder / name

    def with_threads(self, threads: int | None) -> Artifact:
        """The same artifact, run with this many threads (None: unchanged); RunError if its target takes no number."""
        return self._changed("threads", threads, "no number of threads", "--threads")

    def within(self, memory_mb: int | None, cache_aware: float | None = None) -> Artifact:
        """The same artifact, run within this many megabytes (10^6 bytes; None: unchanged). RunError if its target has
        no memory budget.

        cache_aware: how much the router of a token that is run alone prefers experts in memory, as a share (0 to 1) of
        the range of what it selects by; None: unchanged. RunError for another number, and for one without a budget."""
        changed = self._changed("memory_mb", memory_mb, "no budget of memory", "--memory-mb")
        if cache_aware is None:
            return changed
        if not 0 <= cache_aware <= 1:
            raise RunError(f"cache-aware selection by {cache_aware}", remedy="give a number from 0 to 1")
        if cache_aware and getattr(changed.options(), "memory_mb", None) is None:
            what, remedy = "cache-aware selection needs a memory budget", "add --memory-mb N"
            raise RunError(what, place=str(self.folder), remedy=remedy)
        return Artifact(self.folder, self.manifest, changed._overrides, cache_aware=cache_aware)

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Options of the target for this session, in place of those the artifact was compiled with."""
        return dict(self._overrides)

    def with_options(self, options: Mapping[str, Any]) -> Artifact:
        """The same artifact with these options of its target, whatever `overrides` has; None takes one away that the
        artifact brings. `options()` checks them."""
        return Artifact(self.folder, self.manifest, {**self._overrides, **options}, cache_aware=self.cache_aware)

    def in_memory(self) -> Artifact:
        """The same artifact without its budget of memory, for one who wants its logits in a process that holds more
        than the artifact: they are the same. With cache-aware selection, which changes them, it is unchanged."""
        without = "memory_mb" not in options_class(self.manifest.target).model_fields
        return self if without or self.cache_aware else self.with_options({"memory_mb": None})

    def _changed(self, option: str, value: int | None, what: str, flag: str) -> Artifact:
        if value is None:
            return self
        target = self.manifest.target
        if option not in options_class(target).model_fields:
            raise RunError(f"artifacts for {target} take {what}", place=str(self.folder), remedy=f"leave {flag} out")
        try:
            options_class(target).model_validate({option: value})
        except ValidationError as error:  # others may be required, which the artifact has
            faults = [fault["msg"] for fault in error.errors(include_url=False) if fault["loc"][:1] == (option,)]
            if faults:
                what, remedy = f"{flag} {value}: {faults[0]}", f"give another {flag}"
                raise RunError(what, place=str(self.folder), remedy=remedy) from None
        overrides = {**self._overrides, option: value}
        return Artifact(self.folder, self.manifest, overrides, cache_aware=self.cache_aware)

    def options(self) -> TargetOptions:
        """The options that its spec gave its target; ArtifactError if they are damaged."""
        target = self.manifest.target
        given = self.manifest.section("targets").get(target) or {}
        try:
            if self._overrides and isinstance(given, Mapping):
                given = {**given, **self._overrides}
            return options_class(target).model_validate(given)
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
    return replacing(out, kind="an artifact")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; ArtifactError if it is missing, not JSON, of another format, or incomplete."""
    file = folder / MANIFEST
    await_replaced(folder)
    if not folder.is_dir():
        found = "is a file, not an artifact folder" if folder.exists() else "no such artifact folder"
        raise ArtifactError(found, place=str(folder), remedy="name a folder that `moec compile` wrote")
    if not file.exists():
        raise ArtifactError(f"no {MANIFEST} in this folder", place=str(folder), remedy=_REMEDY)
    text = read_bytes(file, limit=_MAX_MANIFEST, fault=ArtifactError, remedy=_REMEDY)
    try:
        raw = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"damaged: {_one_line(error)}", place=str(file), remedy=_REMEDY) from error
    version = raw.get("format") if isinstance(raw, dict) else None
    if version == 1:
        raw = _from_format_1(raw)
    elif version != FORMAT:
        raise ArtifactError(f"format {version!r}, this moec reads format {FORMAT}", place=str(file), remedy=_REMEDY)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"damaged: {where}: {first['msg']}", place=str(file), remedy=_REMEDY) from error
    control = next(_control_characters(raw), None)
    if control is not None:  # `moec inspect` would print them to the user's terminal
        raise ArtifactError(f"damaged: control characters in {control!r}", place=str(file), remedy=_REMEDY)
    for record in manifest.files:  # a manifest is input: it may not point outside its folder
        if Path(record.name).name != record.name or "\0" in record.name:
            raise ArtifactError(f"damaged: file name {record.name!r}", place=str(file), remedy=_REMEDY)
    return manifest


def _from_format_1(raw: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 1 as one of today: it also held the checkpoint's folder and the seconds that were taken."""
    passes = raw.get("passes")
    if isinstance(passes, list):
        passes = [{k: v for k, v in p.items() if k != "seconds"} if isinstance(p, dict) else p for p in passes]
    rest = {k: v for k, v in raw.items() if k not in ("checkpoint", "seconds")}
    return {**rest, "passes": passes, "format": FORMAT}


def _control_characters(value: Any) -> Iterator[str]:
    """Texts of a JSON value that hold control characters other than line ends and tabs."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _control_characters(key)
            yield from _control_characters(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _control_characters(inner)
    elif isinstance(value, str) and CONTROL.search(value):
        yield value[:40]


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_file(file: Path, record: FileRecord) -> None:
    if not file.exists():
        raise ArtifactError("the file is missing", place=str(file), remedy=_REMEDY)
    try:
        with open_regular(file, fault=ArtifactError, remedy=_REMEDY) as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(_HEAD_BYTES)
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
