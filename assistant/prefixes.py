"""A cache of prompt prefixes: sessions saved in a folder, found by the tokens that they hold.

A file's name has its artifact, the number of its tokens and their digest, so that a search reads no file; behind these
the name under which the prefix was kept, if any. A restored session equals the saved one bit for bit. A damaged file,
or one that does not hold what its name says, is removed with a warning, and its prefix is computed again; one that
cannot be used for another reason stays. A name has one prefix of an artifact, which stays until other tokens replace it
or it is forgotten; of prefixes without a name those that were used last stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import NoRoomError, RunError, SessionFileError, UserError
from moec.compiler.target import Session

log = logging.getLogger("moec.prefixes")
LEAST = 16  # tokens; fewer are not worth a file without a name
MOST_FILES = 64  # of one artifact without a name; the least recently used one is removed first
#: artifact, number of tokens, their digest (of 16 digits in an application's folder, runtime/app/prefixes.h), name
_FILE = re.compile(r"([0-9a-f]{16})-([0-9]{1,9})-([0-9a-f]{32}|[0-9a-f]{16})(?:\.([A-Za-z0-9._-]{1,64}))?\.session")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def checked_name(name: Any, place: str = "prefix") -> str:
    """A name for a prefix; UserError for what is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        name = str(name)
        what = f"no name of a prefix: {''.join(c if c.isprintable() else '?' for c in name[:40])!r}"
        raise UserError(what, place=place, remedy="use 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'")
    return name


@dataclass(frozen=True)
class Kept:
    """A prefix in a folder. artifact: the digits of its digest in the file's name; name: None without one."""

    file: Path
    artifact: str
    tokens: int
    digest: str
    name: str | None

    @property
    def used(self) -> float:
        """When it was written or restored last, in seconds since 1970; 0 where the system does not tell."""
        try:
            return self.file.stat().st_atime
        except OSError:
            return 0.0


def kept_in(folder: Path) -> list[Kept]:
    """The prefixes in a folder, of every artifact, the longest first. OSError."""
    found = (_FILE.fullmatch(name) for name in os.listdir(folder))
    kept = [Kept(folder / m[0], m[1], int(m[2]), m[3], m[4]) for m in found if m is not None]
    return sorted(kept, key=lambda one: (-one.tokens, one.file.name))


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences of ids."""
    most = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:most]) != np.asarray(other[:most]))
    return int(differing[0]) if len(differing) else most


class PrefixCache:
    """The folder with an artifact's prefixes; created if missing. artifact: the digest of its contents.

    UserError where the folder cannot be used.
    """

    def __init__(self, folder: Path, artifact: str) -> None:
        self._folder, self._artifact = folder, artifact[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.listdir(folder)
        except OSError as error:
            raise UserError(
                f"cannot be used: {error.strerror}", place=str(folder), remedy="name another --prefix-cache"
            ) from None

    def restore(self, session: Session, ids: Sequence[int], held: int) -> int:
        """Restore the longest saved prefix of `ids` into `session`, if it is longer than the `held` ids that are there.

        Returns how many of the first ids the session then holds. At least one id is left to compute.
        """
        digests: dict[int, str] = {}
        for kept in self._files():
            count, file = kept.tokens, kept.file
            if not held < count < len(ids):
                continue
            if count not in digests:
                digests[count] = _digest(ids[:count])
            if kept.digest != digests[count]:
                continue
            try:
                self._restore(session, file)
            except SessionFileError as error:
                self._remove(file, str(error))
                held = min(held, session.position)
                continue
            except RunError as error:
                log.warning("a prefix is not used: %s", error)
                held = min(held, session.position)
                continue
            if session.tokens != list(ids[:count]):
                self._remove(file, f"{file}: holds other tokens than its name says")
                session.reset()
                return 0
            # the folder may be read-only; of the time of writing sessions learn that their file was changed
            with contextlib.suppress(OSError):
                os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
            return count
        return held

    def _restore(self, session: Session, file: Path) -> None:
        """Restore a file, where a memory budget has no room for two sessions' caches in place of the session's own."""
        try:
            session.restore(file)
        except NoRoomError:
            session.reset()
            session.restore(file)

    def keep(self, session: Session, name: str | None = None) -> None:
        """As `save`, where prefixes without a name have 16 tokens at least; a failure is a warning and no more."""
        if name is None and len(session.tokens) < LEAST:
            return
        try:
            self.save(session, name)
        except (RunError, OSError) as error:
            log.warning("the prefix is not kept: %s", error)

    def save(self, session: Session, name: str | None = None) -> None:
        """Save what a session holds, unless it is saved already; under a name in place of what had it.

        UserError for what is no name; RunError, OSError where it cannot be saved.
        """
        file = self._file(session.tokens, name)
        if not file.exists():
            session.save(file)
        own = self._files()
        if name is not None:  # behind the new one, so that a process that ends here leaves both and not neither
            same = self._file(session.tokens).name
            old = [kept for kept in own if kept.file != file and (kept.name == name or kept.file.name == same)]
        else:
            old = sorted((kept for kept in own if kept.name is None), key=lambda kept: kept.used, reverse=True)
            old = old[MOST_FILES:]
        for kept in old:
            kept.file.unlink(missing_ok=True)

    def has(self, name: str, ids: Sequence[int]) -> bool:
        """Whether these ids are kept under this name."""
        return self._file(ids, name).exists()

    def _files(self) -> list[Kept]:
        """The artifact's prefixes, the longest first; none where the folder cannot be read any more."""
        try:
            return [kept for kept in kept_in(self._folder) if kept.artifact == self._artifact]
        except OSError as error:
            log.warning("%s: prefixes are not used: %s", self._folder, error.strerror)
            return []

    def _file(self, ids: Sequence[int], name: str | None = None) -> Path:
        ending = "" if name is None else f".{checked_name(name)}"
        return self._folder / f"{self._artifact}-{len(ids)}-{_digest(ids)}{ending}.session"

    def _remove(self, file: Path, why: str) -> None:
        log.warning("%s; it is removed and computed again", why)
        with contextlib.suppress(OSError):
            file.unlink()


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()[:32]
