"""An artifact: a folder with the program file(s), the tokenizer and `manifest.json`.

It is written in a temporary sibling folder and put in place by one rename, so a good artifact survives a crash,
Ctrl-C and a full disk. `Artifact.open` checks what can be checked without reading gigabytes, `check_contents` reads
all.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moec.compiler.errors import ArtifactError, UserError

FORMAT = 1
MANIFEST = "manifest.json"
_REMEDY = "compile it again with `moec compile`"
# Enough to hold a program's header and instructions, little enough to be read at every load.
_HEAD_BYTES = 1 << 22
_TEMPORARY = ".moec-part-"


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
    """All that is known of an artifact. `details` belongs to the target; `notes` are things a user should know."""

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


@contextmanager
def replacing(out: Path, *, marker: str = MANIFEST, kind: str = "an artifact") -> Iterator[Path]:
    """A temporary sibling folder that takes the place of `out` when the block ends well, and vanishes otherwise.

    UserError, before anything is done, if `out` cannot be written or holds something that is not `kind`, which is
    known by its file `marker`.
    """
    _check_replaceable(out, marker, kind)
    temporary = out.parent / f".{out.name}{_TEMPORARY}{os.getpid()}"
    with _disk_faults(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{out.parent} is no folder", place=str(out), remedy="choose another --out") from None
        _remove_stale(out)
        try:
            temporary.mkdir()
        except FileNotFoundError:  # the parent is there, but holds no folders: /proc and its kind
            raise UserError("no folder can be made there", place=str(out), remedy="choose another --out") from None
    try:
        with _disk_faults(out):
            yield temporary
            _flush(temporary)
            _put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(out: Path, marker: str, kind: str) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError("exists and is not a folder", place=str(out), remedy="choose another --out")
    if out.is_dir() and not (out / marker).exists() and any(out.iterdir()):
        raise UserError(f"holds files and is not {kind}", place=str(out), remedy="choose another --out")


@contextmanager
def _disk_faults(out: Path) -> Iterator[None]:
    """What the disk refuses is the user's to mend."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space or choose another --out",
            errno.EDQUOT: "free some space or choose another --out",
            errno.EACCES: "choose a folder you may write, with --out",
            errno.EPERM: "choose a folder you may write, with --out",
            errno.EROFS: "choose a folder on a writable disk, with --out",
            errno.ENOTDIR: "choose another --out",
            errno.EEXIST: "another compile is writing there; wait for it",
            errno.ENAMETOOLONG: "choose a shorter --out",
            errno.EFBIG: "choose a disk that takes large files, with --out",
        }
        if error.errno not in remedies:
            raise
        raise UserError(f"cannot write: {error.strerror}", place=str(out), remedy=remedies[error.errno]) from error


def _remove_stale(out: Path) -> None:
    """Remove what a killed compile left beside `out`; a living one keeps its folder."""
    for folder in out.parent.glob(f".{_glob_escaped(out.name)}{_TEMPORARY}*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and int(pid) != os.getpid() and _alive(int(pid)):
            continue
        shutil.rmtree(folder, ignore_errors=True)


def _glob_escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(folder: Path) -> None:
    """Bring the files to the disk before the rename: a machine that loses power must not find a hollow artifact."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _put_in_place(new: Path, out: Path) -> None:
    """`out` becomes `new` in one step where the system can exchange two folders, else in two renames."""
    if not out.exists() or not any(out.iterdir()):
        os.replace(new, out)
        return
    if _exchange(new, out):
        return  # the old artifact now bears the temporary name, and is removed with it
    old = new.with_name(new.name + "-old")
    os.rename(out, old)
    try:
        os.rename(new, out)
    except BaseException:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically: renameat2(RENAME_EXCHANGE) on Linux, renamex_np(RENAME_SWAP) on macOS."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2  # AT_FDCWD of Linux; RENAME_EXCHANGE and RENAME_SWAP are both 2
    if sys.platform.startswith("linux") and hasattr(libc, "renameat2"):
        return libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return libc.renamex_np(os.fsencode(a), os.fsencode(b), exchange) == 0
    return False
