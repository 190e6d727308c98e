"""What a sweep keeps on disk, so that a kill at any moment costs no finished run.

    OUT/sweep.json            what was asked for: the grid, the seeds, the digest of all that decides numbers
    OUT/runs/POINT-sSEED/     a run of `moec train` each, continued from its own state
    OUT/results/POINT-sSEED.json   how it ended; written when it has

Each file is complete or not there. A result that is missing though its run is finished is read from the run again.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes
from moec.training.state import disk_faults, write_whole

SWEEP, RESULTS, RUNS = "sweep.json", "results", "runs"
FORMAT = 1
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Request:
    """sweep.json. digest: of spec, stage, points and corpus; another one is another sweep. seeds and time may grow.

    rates: tokens a second by point, as measured when the sweep began.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    format: int
    name: str
    digest: str
    tokens: list[int]
    rates: dict[str, float]
    threads: int
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Result:
    """How a run ended. loss: held out, over the stage's mixture; message: why there is none. seconds: in all."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    point: str
    seed: int
    status: Literal["trained", "diverged", "failed"]
    seconds: float
    tokens: int = 0
    loss: float | None = None
    heldout: dict[str, float] | None = None
    message: str = ""


_REQUEST, _RESULT = TypeAdapter(Request), TypeAdapter(Result)


class Store:
    """The folder of one sweep."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def request(self) -> Request | None:
        """UserError if it is damaged."""
        file = self.out / SWEEP
        if not file.exists():
            return None
        found: Request = _read(file, _REQUEST)
        if found.format != FORMAT:
            raise UserError(f"is of format {found.format}", place=str(file), remedy="choose another --out")
        if (
            not all(math.isfinite(rate) and rate > 0 for rate in found.rates.values())
            or min(found.tokens, default=0) < 1
        ):
            raise _damaged(file, "rates and tokens are above 0")
        return found

    def begin(self, request: Request) -> None:
        """sweep.json comes first: results without it would be those of anything."""
        write_whole(self.out / SWEEP, json.dumps(asdict(request), indent=1) + "\n")

    def run_folder(self, point: str, seed: int) -> Path:
        return self.out / RUNS / f"{point}-s{seed}"

    def result(self, point: str, seed: int) -> Result | None:
        """UserError if it is damaged, or of another run."""
        file = self.out / RESULTS / f"{point}-s{seed}.json"
        if not file.exists():
            return None
        found: Result = _read(file, _RESULT)
        losses = [] if found.loss is None else [found.loss, *(found.heldout or {}).values()]
        if (found.point, found.seed) != (point, seed):
            raise _damaged(file, f"it is of {found.point}, seed {found.seed}")
        if (found.status == "trained") != (found.loss is not None) or found.seconds < 0 or found.tokens < 0:
            raise _damaged(file, f"{found.status} with the loss {found.loss}")
        if not all(math.isfinite(value) and value >= 0 for value in (*losses, found.seconds)):
            raise _damaged(file, f"the loss is {found.loss}")
        return found

    def save(self, result: Result) -> None:
        self._write(f"{result.point}-s{result.seed}.json", json.dumps(asdict(result)) + "\n")

    def keep_traceback(self, point: str, seed: int, text: str) -> None:
        """Beside the result of a run that failed in a way that only a developer can read."""
        self._write(f"{point}-s{seed}.traceback.txt", text)

    def _write(self, name: str, text: str) -> None:
        folder = self.out / RESULTS
        with disk_faults(folder):
            folder.mkdir(exist_ok=True)
        write_whole(folder / name, text)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """One sweep at a time works in a folder, and in none that holds something else."""
        with disk_faults(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            begun = {f"{SWEEP}.new", ".lock"}  # all that a sweep leaves that was killed in its first moments
            if not (self.out / SWEEP).exists() and any(file.name not in begun for file in self.out.iterdir()):
                raise UserError(
                    "holds something that is not a sweep", place=str(self.out), remedy="choose another --out"
                )
            lock = (self.out / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    "another sweep works there", place=str(self.out), remedy="wait for it, or stop it"
                ) from None
            yield


def _read(file: Path, kind: TypeAdapter[Any]) -> Any:
    try:
        return kind.validate_json(read_bytes(file, limit=_MAX_BYTES), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        raise _damaged(file, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def _damaged(file: Path, what: str) -> UserError:
    remedy = "choose another --out" if file.name == SWEEP else "remove it: its run is looked at again"
    return UserError(f"damaged: {what}", place=str(file), remedy=remedy)
