"""A folder that is replaced as a whole: artifacts, checkpoints, corpora.

It is written in a temporary sibling and put in place by one rename, so the old folder survives a crash, Ctrl-C and a
full disk. The file `.moec` marks a folder as ours and lists what we wrote there: a folder without it, or with any
other file in it, is never replaced.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes

MARK = ".moec"
_TEMPORARY, _ASIDE = ".moec-part-", "-old"
_MAX_MARK = 1 << 24  # bytes; a path in it is some tens long, and a corpus has hundreds
_WAIT_SECONDS = 2.0  # for the moment between two renames; they follow each other at once


@contextmanager
def replacing(out: Path, *, kind: str) -> Iterator[Path]:
    """A temporary sibling folder that takes the place of `out` when the block ends well, and vanishes otherwise.

    `kind`, such as "an artifact", is noted in it. UserError, before anything is done, if `out` cannot be written, holds
    something that is not `kind`, or holds a file that was not written with it.
    """
    _check_replaceable(out, kind)
    with _disk_faults(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{out.parent} is no folder", place=str(out), remedy="choose another --out") from None
    made: list[Path] = []
    handles: list[int] = []
    try:
        with _disk_faults(out):
            with _locked(out.parent):  # nobody may take the new folder for one that a killed process left
                _remove_stale(out)
                _make_temporary(out, made, handles)
            yield made[0]
            _mark(made[0], kind)
            _flush(made[0])
            _check_replaceable(out, kind)  # minutes may have passed
            _put_in_place(made[0], out, handles)
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for handle in handles:
            os.close(handle)


def await_replaced(folder: Path) -> None:
    """Where `folder` is missing only because it is being replaced, wait; where that was cut off, put it back.

    Systems that cannot exchange two folders need two renames, between which there is none.
    """
    until = time.monotonic() + _WAIT_SECONDS
    while not folder.exists():
        aside = [p for p in _siblings(folder) if p.name.endswith(_ASIDE)]
        if not aside or time.monotonic() > until:
            return
        for old in aside:
            if _abandoned(old):
                with suppress(OSError):  # another reader was first, or it is not ours to move
                    os.rename(old, folder)
        time.sleep(0.01)


def owned(folder: Path) -> str | None:
    """The kind that our mark in `folder` names; None without one."""
    found = _read_mark(folder)
    return None if found is None else found[0]


def _check_replaceable(out: Path, kind: str) -> None:
    if Path.cwd().is_relative_to(out.resolve()):
        # exchanging it would leave the user's shell in a removed folder
        raise UserError("is the current folder or lies above it", place=str(out), remedy="choose another --out")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError("exists and is not a folder", place=str(out), remedy="choose another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    remedy = "choose another --out, or move it away"
    mark = _read_mark(out)
    if mark is None or mark[0] != kind:
        what = "holds files and is not" if mark is None else f"holds {mark[0]}, not"
        raise UserError(f"{what} {kind} that moec wrote", place=str(out), remedy=remedy)
    others = sorted(_contents(out) - mark[1])
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(f"holds {others[0]!r}{more}, which moec did not write", place=str(out), remedy=remedy)


def _contents(folder: Path) -> set[str]:
    """All that lies in a folder and below, by relative path; a folder's ends with a slash. Links are not followed."""
    found = set()
    for place, folders, names in os.walk(folder):
        inner = Path(place).relative_to(folder)
        for name in folders:
            found.add(str(inner / name) + ("" if (Path(place) / name).is_symlink() else "/"))
        found.update(str(inner / name) for name in names)
    return found


def _mark(folder: Path, kind: str) -> None:
    names = sorted({MARK, *_contents(folder)})
    (folder / MARK).write_text(json.dumps({"moec": kind, "files": names}, indent=1) + "\n", "utf-8")


def _read_mark(folder: Path) -> tuple[str, frozenset[str]] | None:
    """(kind, names) of the mark in a folder; None where there is none, or none that we wrote."""
    try:
        raw = json.loads(read_bytes(folder / MARK, limit=_MAX_MARK))
    except (UserError, ValueError, RecursionError):
        return None
    names = raw.get("files") if isinstance(raw, dict) else None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not isinstance(raw["moec"], str):
        return None
    return raw["moec"], frozenset(names)


@contextmanager
def _disk_faults(out: Path) -> Iterator[None]:
    """What the disk refuses is the user's to mend. Faults of other files, which name themselves, are not `out`'s."""
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
            errno.ENAMETOOLONG: "choose a shorter --out",
            errno.EFBIG: "choose a disk that takes large files, with --out",
        }
        elsewhere = isinstance(error.filename, (str, bytes)) and not _is_part(error.filename, out)
        if error.errno not in remedies or elsewhere:
            raise
        raise UserError(f"cannot write: {error.strerror}", place=str(out), remedy=remedies[error.errno]) from error


def _is_part(name: str | bytes, out: Path) -> bool:
    """Whether a file lies in `out` or its temporary sibling, or is a folder above them."""
    file, whole = Path(os.fsdecode(name)).absolute(), out.absolute()
    if whole.is_relative_to(file) or file.is_relative_to(whole):
        return True
    inner = file.relative_to(whole.parent).parts if file.is_relative_to(whole.parent) else ()
    return bool(inner) and inner[0].startswith(f".{out.name}{_TEMPORARY}")


def _make_temporary(out: Path, made: list[Path], handles: list[int]) -> None:
    """A new folder, in `made`, held by a lock, in `handles`, which ends with this process however it ends.

    The lock says whether its process is alive. A process id could not: other PID namespaces have other ids.
    """
    # named before it is made: a signal finds who removes it
    made.append(out.parent / f".{out.name}{_TEMPORARY}{secrets.token_hex(4)}")
    try:
        made[0].mkdir()
    except FileNotFoundError:  # the parent is there, but holds no folders: /proc and its kind
        raise UserError("no folder can be made there", place=str(out), remedy="choose another --out") from None
    _hold(made[0], handles)


def _hold(folder: Path, handles: list[int]) -> None:
    handles.append(os.open(folder, os.O_RDONLY))
    with suppress(OSError):  # a file system without locks; `_abandoned` then cannot tell, and the folder is kept
        fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _abandoned(folder: Path) -> bool:
    """Whether the process that made a temporary folder has ended: nobody holds it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        return False
    finally:
        os.close(handle)
    return True


def _siblings(out: Path) -> list[Path]:
    return [p for p in out.parent.glob(f".{_glob_escaped(out.name)}{_TEMPORARY}*") if p.is_dir()]


def _remove_stale(out: Path) -> None:
    """Remove what a killed compile left beside `out`; a living one keeps its folder.

    One that was killed while it put its folder in place has left the good one aside, and that comes back.
    """
    for folder in _siblings(out):
        if not _abandoned(folder):
            continue
        if folder.name.endswith(_ASIDE) and not out.exists():
            os.rename(folder, out)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _glob_escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _flush(folder: Path) -> None:
    """Bring the files to the disk before the rename: a machine that loses power must not find a hollow artifact."""
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(new: Path, out: Path, handles: list[int]) -> None:
    """`out` becomes `new` in one step where the system can exchange two folders, else in two renames."""
    if not out.exists() or not any(out.iterdir()):
        os.replace(new, out)
    elif not _exchange(new, out):  # else the old one now bears the temporary name, and is removed with it
        _rename_twice(new, out, handles)
    _flush_names(out.parent)


def _rename_twice(new: Path, out: Path, handles: list[int]) -> None:
    _hold(out, handles)
    old = new.with_name(new.name + _ASIDE)
    try:
        os.rename(out, old)
        os.rename(new, out)
    except BaseException:
        if not out.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush_names(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no fsync of folders
            os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically: renameat2(RENAME_EXCHANGE) on Linux, renamex_np(RENAME_SWAP) on macOS."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2  # AT_FDCWD of Linux; RENAME_EXCHANGE and RENAME_SWAP are both 2
    if sys.platform.startswith("linux") and hasattr(libc, "renameat2"):
        return bool(libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(os.fsencode(a), os.fsencode(b), exchange) == 0)
    return False
