"""The state of a run on disk, from which `--resume` continues; a kill at any moment leaves a complete one.

    OUT/state/latest.json     which stage and step, the folder of its tensors, and how long metrics.jsonl was then
    OUT/state/STAGE-STEP/     weights, moments and biases by torch.distributed.checkpoint, from one process or many

The folder is complete on disk before latest.json, which is replaced in one rename, names it with the digest of each of
its files: a flipped bit is found before anything continues from it. The data position is the step: batches are a
function of it. A state is data: its metadata is unpickled with the classes of `_KNOWN` only, its values as plain ones.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import pickletools
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import EnumType
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from moec.compiler.artifact import file_digest
from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes
from moec.training.parallel import World

FOLDER, LATEST = "state", "latest.json"
_MAX_BYTES = 256 << 20  # of latest.json and of a state's metadata, which has some hundred bytes for each tensor
_PLAIN_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch then unpickles tensors and plain values, whatever a caller asks
_KNOWN = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


@dataclass(frozen=True)
class StageResult:
    """A finished stage. heldout: loss by domain after the last step, nats per predicted token."""

    name: str
    checkpoint: str
    steps: int
    tokens: int
    seconds: float
    heldout: dict[str, float]


@dataclass(frozen=True)
class Position:
    """Where a run is: `step` steps of `stage` are done. `folder` holds the tensors; None at the start of a stage.

    seconds: of training in this stage. metrics_bytes: the length of metrics.jsonl. random: torch's generator, as hex.
    digests: SHA-256 of every file of the folder.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    stage: str
    step: int
    seconds: float
    metrics_bytes: int
    folder: str | None = None
    random: str = ""
    finished: tuple[StageResult, ...] = field(default=())
    digests: dict[str, str] = field(default_factory=dict)


_POSITION = TypeAdapter(Position)


class StateStore:
    """The states of one run. Only the newest is kept."""

    def __init__(self, out: Path, world: World) -> None:
        self._root, self._world = out / FOLDER, world

    def latest(self) -> Position | None:
        """UserError if it is damaged."""
        file = self._root / LATEST
        try:
            if not file.exists():
                return None
            found = _POSITION.validate_json(read_bytes(file, limit=_MAX_BYTES), strict=True)
            if found.folder is not None and Path(found.folder).name != found.folder:
                raise ValueError(f"folder {found.folder!r}")
            if min(found.step, found.metrics_bytes, found.seconds) < 0 or not math.isfinite(found.seconds):
                raise ValueError(f"step {found.step}, {found.metrics_bytes} bytes, {found.seconds} s")
            if found.random:
                torch.Generator().set_state(_random_state(found.random))
            return found
        except ValidationError as error:
            fault = error.errors()[0]
            what = f"damaged: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        except (ValueError, RuntimeError) as error:
            what = f"damaged: {str(error).splitlines()[0]}"
        raise UserError(what, place=str(file), remedy="start again in another --out") from None

    def save(self, position: Position, tensors: dict[str, Tensor] | None = None) -> None:
        """Write `tensors`, then make `position` the latest, then remove what was before it. All processes call it."""
        if tensors is not None:
            folder = self.cleared(str(position.folder))
            writer = dcp.FileSystemWriter(folder, sync_files=True)
            with state_written(folder), _no_warning_of_one_process():
                dcp.save(dict(tensors), storage_writer=writer, no_dist=self._world.size == 1)
        if self._world.main:
            with disk_faults(self._root):
                self._root.mkdir(parents=True, exist_ok=True)
                if position.folder is not None:
                    position = replace(position, digests=_digests(self._root / position.folder))
            write_whole(self._root / LATEST, json.dumps(asdict(position)) + "\n")
            for old in self._root.iterdir():
                if old.is_dir() and old.name != position.folder:
                    shutil.rmtree(old, ignore_errors=True)
        self._world.barrier()

    def cleared(self, name: str) -> Path:
        """An empty folder for tensors, whatever a killed run left there. All processes call it."""
        folder = self._root / name
        if self._world.main:
            shutil.rmtree(folder, ignore_errors=True)
            with disk_faults(folder):
                folder.mkdir(parents=True)
        self._world.barrier()
        return folder

    def load(self, position: Position, tensors: dict[str, Tensor]) -> None:
        """Read the state into `tensors`, in place, whatever the number of processes that wrote it."""
        folder = self._root / str(position.folder)
        with state_read(folder, position), _no_warning_of_one_process():
            dcp.load(tensors, storage_reader=_Reader(folder), no_dist=self._world.size == 1)


@contextmanager
def state_written(folder: Path) -> Iterator[None]:
    """UserError where torch.distributed.checkpoint cannot write to `folder`."""
    try:
        yield
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:  # the last is no Exception
        what = f"the state cannot be written: {str(error).strip().splitlines()[-1]}"
        remedy = "is the disk full? free some space and continue with --resume"
        raise UserError(what, place=str(folder), remedy=remedy) from error


@contextmanager
def state_read(folder: Path, position: Position) -> Iterator[None]:
    """Check the files of `folder`; inside the block torch unpickles plain values only, whoever calls it.

    UserError where they are not those that were written, or torch.distributed.checkpoint cannot read them.
    """
    remedy = "start again in another --out"
    if _digests(folder) != position.digests:
        raise UserError("damaged: its files are not those that were written", place=str(folder), remedy=remedy)
    before = os.environ.get(_PLAIN_ONLY)
    os.environ[_PLAIN_ONLY] = "1"
    try:
        _metadata(folder)
        yield
    except (OSError, dcp.api.CheckpointException, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        what = f"the saved state cannot be read: {str(error).splitlines()[0]}"
        raise UserError(what, place=str(folder), remedy=remedy) from error
    finally:
        if before is None:
            del os.environ[_PLAIN_ONLY]
        else:
            os.environ[_PLAIN_ONLY] = before


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by name; links and folders, which no state has, by an empty one."""
    found: dict[str, str] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        found[file.name] = file_digest(file) if file.is_file() and not file.is_symlink() else ""
    return found


def _member(kind: Any, name: Any) -> Any:
    """The only attributes that a metadata file may take: how Python 3.11 before 3.11.4 pickles members of an Enum."""
    if isinstance(kind, EnumType) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError("its metadata takes an attribute, which no state does")


class _Unpickler(pickle.Unpickler):
    """Of a metadata file: the classes of torch.distributed.checkpoint, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which no state does")


def _check_memo(data: bytes) -> None:
    """ValueError for a pickle that numbers what it remembers higher than it has opcodes: the table is as long as the
    highest number, so five bytes would take gigabytes."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (not isinstance(argument, int) or argument > count):
            raise ValueError(f"{opcode.name} {argument}")


def _metadata(folder: Path) -> Any:
    """What torch.distributed.checkpoint wrote about a state, checked; ValueError and UnpicklingError."""
    try:
        data = read_bytes(folder / ".metadata", limit=_MAX_BYTES)
        _check_memo(data)
        found = _Unpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, UserError):
        raise
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        raise ValueError(f"its metadata is damaged: {error}") from None
    infos = getattr(found, "storage_data", None)
    if not isinstance(found, Metadata) or not isinstance(infos, dict):
        raise ValueError("its metadata is damaged")
    for info in infos.values():
        path = getattr(info, "relative_path", None)
        if not isinstance(path, str) or Path(path).name != path or info.transform_descriptors is not None:
            raise ValueError(f"its metadata names the file {path!r}")
    return found


class _Reader(dcp.FileSystemReader):
    """As torch has it, with metadata that is unpickled here."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found: Metadata = _metadata(Path(self.path))
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


@contextmanager
def _no_warning_of_one_process() -> Iterator[None]:
    """That there is only one process is what `no_dist` said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def random_state() -> str:
    return torch.get_rng_state().numpy().tobytes().hex()


def restore_random_state(text: str) -> None:
    torch.set_rng_state(_random_state(text))


def _random_state(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


@contextmanager
def disk_faults(file: Path) -> Iterator[None]:
    """What the disk refuses to write is the user's to mend."""
    try:
        yield
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        remedy = "is the disk full? free some space and continue with --resume"
        raise UserError(what, place=str(file), remedy=remedy) from error


def write_whole(file: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old text or the new, also after a power cut. UserError if it fails."""
    beside = file.with_name(file.name + ".new")
    with disk_faults(file):
        try:
            with beside.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(beside, file)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def read_json(file: Path) -> Any:
    return json.loads(read_bytes(file, limit=_MAX_BYTES))
