"""A folder that is replaced as a whole: artifacts, checkpoints, corpora.

It is written in a temporary sibling and put in place by one rename, so what stood there survives a crash, Ctrl-C and a
full disk.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moec.compiler.errors import UserError

_TEMPORARY, _ASIDE = ".moec-part-", "-old"


@contextmanager
def replacing(out: Path, *, marker: str, kind: str) -> Iterator[Path]:
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
    try:  # before the folder is made: a signal that comes right after must find who removes it
        with _disk_faults(out):
            try:
                temporary.mkdir()
            except FileNotFoundError:  # the parent is there, but holds no folders: /proc and its kind
                raise UserError("no folder can be made there", place=str(out), remedy="choose another --out") from None
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
    """Remove what a killed compile left beside `out`; a living one keeps its folder.

    One that was killed while it put its folder in place has left the good one aside, and that comes back.
    """
    for folder in out.parent.glob(f".{_glob_escaped(out.name)}{_TEMPORARY}*"):
        pid = folder.name.removesuffix(_ASIDE).rpartition("-")[2]
        if pid.isdigit() and int(pid) != os.getpid() and _alive(int(pid)):
            continue
        if folder.name.endswith(_ASIDE) and not out.exists():
            os.rename(folder, out)
        else:
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
    old = new.with_name(new.name + _ASIDE)
    try:
        os.rename(out, old)
        os.rename(new, out)
    except BaseException:
        if not out.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically: renameat2(RENAME_EXCHANGE) on Linux, renamex_np(RENAME_SWAP) on macOS."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2  # AT_FDCWD of Linux; RENAME_EXCHANGE and RENAME_SWAP are both 2
    if sys.platform.startswith("linux") and hasattr(libc, "renameat2"):
        return bool(libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(os.fsencode(a), os.fsencode(b), exchange) == 0)
    return False
