"""A group of processes with a limit of memory and of what it reads from a block device, by control groups of Linux.

Both versions of cgroups are written: in version 1 the controllers `memory` and `blkio`, in version 2 `memory` and `io`.
Making a group takes the administrator's right; without it `limited` yields a group that limits nothing and says why.
A group limits what is read within tenths of a second, and a burst passes as fast as the device is. Direct reads are
therefore also made to take their time one by one, by paced_reads.c in the processes.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from moec.compiler.errors import UserError
from moec.runtime.native import find_compiler

ROOT = Path("/sys/fs/cgroup")
_DEVICES = Path("/sys/dev/block")
_DEPARTURE_S = 5.0  # of processes that were killed, before their group can be removed


@dataclass(frozen=True)
class Group:
    """What processes enter. folders: of the group, one for each controller or one for all; none if nothing is limited.
    missing: what could not be limited, and why; "" if all was. paced: environment that paces direct reads."""

    folders: tuple[Path, ...] = ()
    missing: str = ""
    paced: tuple[str, ...] = ()

    def command(self, command: list[str]) -> list[str]:
        """The same command, run in the group."""
        command = ["/usr/bin/env", *self.paced, *command] if self.paced else command
        if not self.folders:
            return command
        enter = "".join(f'echo $$ > "{folder}/cgroup.procs" && ' for folder in self.folders)
        return ["/bin/sh", "-c", enter + 'exec "$@"', "sh", *command]

    def killed(self) -> bool:
        """Whether the system ended a process of the group for want of memory."""
        return any(_killed(folder) for folder in self.folders)


@dataclass
class _Making:
    folders: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    paced: tuple[str, ...] = ()


@contextmanager
def limited(
    *, memory_mb: float | None = None, read_gb_per_s: float | None = None, file: Path | None = None, root: Path = ROOT
) -> Iterator[Group]:
    """A group whose processes have at most `memory_mb` million bytes, page cache included, and read at most
    `read_gb_per_s` from the device that holds `file`. It is removed at the end."""
    making = _Making()
    name = f"moec-bench-{os.getpid()}-{time.monotonic_ns()}"
    try:
        if memory_mb is not None or read_gb_per_s is not None:
            version_2 = (root / "cgroup.controllers").exists()
            (_make_2 if version_2 else _make_1)(making, root, name, memory_mb, read_gb_per_s, file)
        if read_gb_per_s is not None:
            library = _pacing()
            if isinstance(library, Path):
                preload = ":".join(filter(None, (str(library), os.environ.get("LD_PRELOAD", ""))))
                making.paced = (f"LD_PRELOAD={preload}", f"MOEC_STORAGE={read_gb_per_s * 1e9:.0f}")
            else:
                making.missing.append(f"single direct reads: {library}")
        yield Group(tuple(making.folders), "; ".join(making.missing), making.paced)
    finally:
        for folder in making.folders:
            _remove(folder)


@cache
def _pacing() -> Path | str:
    """paced_reads.c, built for this process, or why that is not possible."""
    if not sys.platform.startswith("linux"):
        return "paced on Linux only"
    folder = Path(tempfile.mkdtemp(prefix="moec-paced-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, built = Path(__file__).with_name("paced_reads.c"), folder / "paced_reads.so"
    flags = ["-x", "c", "-std=gnu11", "-O1", "-shared", "-fPIC"]
    try:
        command = [find_compiler(), *flags, str(source), "-o", str(built), "-ldl"]
    except UserError as error:
        return str(error)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{source.name} does not compile: {done.stderr.strip()[-300:]}" if done.returncode else built


def device_of(file: Path, devices: Path = _DEVICES) -> str | None:
    """ "major:minor" of the whole disk that holds `file`; None if the system shows none, as for network file systems.
    A partition has no limits of its own."""
    number = os.stat(file).st_dev
    entry = devices / f"{os.major(number)}:{os.minor(number)}"
    if not entry.exists():
        return None
    whole = entry.resolve().parent if (entry / "partition").exists() else entry
    return (whole / "dev").read_text().strip()


def forget_pages(file: Path) -> None:
    """Drop the pages of `file` from the page cache, so that who reads them next pays for them."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


_WITH_SWAP_1 = "memory.memsw.limit_in_bytes"


def _make_1(
    making: _Making, root: Path, name: str, memory_mb: float | None, rate: float | None, file: Path | None
) -> None:
    if memory_mb is not None:
        bytes_ = str(round(memory_mb * 1e6))
        _limit(making, root / "memory" / name, {"memory.limit_in_bytes": bytes_, _WITH_SWAP_1: bytes_}, "memory")
    if rate is not None:
        device = device_of(file) if file is not None else None
        if device is None:
            making.missing.append("reads: the file is on no block device that can be limited")
            return
        throttle = {"blkio.throttle.read_bps_device": f"{device} {round(rate * 1e9)}"}
        _limit(making, root / "blkio" / name, throttle, "reads")


def _make_2(
    making: _Making, root: Path, name: str, memory_mb: float | None, rate: float | None, file: Path | None
) -> None:
    settings = {}
    if memory_mb is not None:
        settings |= {"memory.max": str(round(memory_mb * 1e6)), "memory.swap.max": "0"}
    device = device_of(file) if rate is not None and file is not None else None
    if rate is not None and device is None:
        making.missing.append("reads: the file is on no block device that can be limited")
    if rate is not None and device is not None:
        settings |= {"io.max": f"{device} rbps={round(rate * 1e9)}"}
    try:
        (root / "cgroup.subtree_control").write_text("+memory +io")
    except OSError as error:
        making.missing.append(f"memory and reads: {error.strerror}")
        return
    _limit(making, root / name, settings, "memory and reads")


def _limit(making: _Making, folder: Path, settings: dict[str, str], what: str) -> None:
    try:
        folder.mkdir()
    except OSError as error:
        making.missing.append(f"{what}: {error.strerror}")
        return
    try:
        for file, value in settings.items():
            if file in ("memory.swap.max", _WITH_SWAP_1) and not (folder / file).exists():
                continue  # a system without swap accounting
            (folder / file).write_text(value)
    except OSError as error:
        making.missing.append(f"{what}: {error.strerror}")
        _remove(folder)
        return
    making.folders.append(folder)


def _killed(folder: Path) -> bool:
    for name in ("memory.events", "memory.oom_control"):
        try:
            lines = dict(line.split() for line in (folder / name).read_text().splitlines())
        except OSError:
            continue
        return int(lines.get("oom_kill", "0")) > 0
    return False


def _remove(folder: Path) -> None:
    until = time.monotonic() + _DEPARTURE_S
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > until:
                return
            time.sleep(0.05)
