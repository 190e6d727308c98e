"""The state of a run on disk: what `--resume` continues from, written so that a kill at any moment leaves a whole one.

    OUT/state/latest.json     which stage and step, the folder of its tensors, and how long metrics.jsonl was then
    OUT/state/STAGE-STEP/     weights, moments and biases by torch.distributed.checkpoint, from one process or many

The folder is complete on disk before latest.json, which is replaced in one rename, names it. The data position is the
step: batches are a function of it.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moec.compiler.errors import UserError
from moec.training.parallel import World

FOLDER, LATEST = "state", "latest.json"


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
    """

    stage: str
    step: int
    seconds: float
    metrics_bytes: int
    folder: str | None = None
    random: str = ""
    finished: tuple[StageResult, ...] = field(default=())


class StateStore:
    """The states of one run. Only the newest is kept."""

    def __init__(self, out: Path, world: World) -> None:
        self._root, self._world = out / FOLDER, world

    def latest(self) -> Position | None:
        """UserError if it is damaged."""
        file = self._root / LATEST
        try:
            raw = json.loads(file.read_text("utf-8"))
            raw["finished"] = tuple(StageResult(**result) for result in raw["finished"])
            return Position(**raw)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"damaged: {error}", place=str(file), remedy="start again in another --out") from None

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
        with state_read(folder), _no_warning_of_one_process():
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=self._world.size == 1)


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
def state_read(folder: Path) -> Iterator[None]:
    """UserError where torch.distributed.checkpoint cannot read what should be in `folder`."""
    try:
        yield
    except (OSError, dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        what = f"the saved state cannot be read: {str(error).splitlines()[0]}"
        raise UserError(what, place=str(folder), remedy="start again in another --out") from error


@contextmanager
def _no_warning_of_one_process() -> Iterator[None]:
    """That there is only one process is what `no_dist` said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def random_state() -> str:
    return torch.get_rng_state().numpy().tobytes().hex()


def restore_random_state(text: str) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8))


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
    return json.loads(file.read_text("utf-8"))
