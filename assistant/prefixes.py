"""A cache of prompt prefixes: sessions saved in a folder, found by the tokens that they hold.

A file's name has its artifact, the number of its tokens and their digest, so that a search reads no file. A restored
session equals the saved one bit for bit. A damaged file, or one that does not hold what its name says, is removed with
a warning, and its prefix is computed again; one that cannot be used for another reason stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moec.compiler.errors import NoRoomError, RunError, SessionFileError, UserError
from moec.compiler.target import Session

log = logging.getLogger("moec.prefixes")
LEAST = 16  # tokens; fewer are not worth a file
MOST_FILES = 64  # of one artifact; the least recently used one is removed first
_NAME = re.compile(r"([0-9a-f]{16})-([0-9]{1,9})-([0-9a-f]{32})\.session")


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
        for count, file in self._files():
            if not held < count < len(ids) or file.name != self._name(ids[:count]):
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
            with contextlib.suppress(OSError):  # the folder may be read-only
                os.utime(file)
            return count
        return held

    def _restore(self, session: Session, file: Path) -> None:
        """Restore a file, where a memory budget has no room for two sessions' caches in place of the session's own."""
        try:
            session.restore(file)
        except NoRoomError:
            session.reset()
            session.restore(file)

    def keep(self, session: Session) -> None:
        """Save a session, unless its prefix is saved already. A failure is a warning and has no other effect."""
        ids = session.tokens
        file = self._folder / self._name(ids)
        if len(ids) < LEAST or file.exists():
            return
        try:
            session.save(file)
            for _, old in sorted(self._files(), key=lambda found: _used(found[1]), reverse=True)[MOST_FILES:]:
                old.unlink(missing_ok=True)
        except (RunError, OSError) as error:
            log.warning("the prefix is not kept: %s", error)

    def _files(self) -> list[tuple[int, Path]]:
        """(Number of tokens, file) of the artifact's prefixes, the longest first."""
        names = (_NAME.fullmatch(name) for name in os.listdir(self._folder))
        own = [(int(n[2]), self._folder / n[0]) for n in names if n is not None and n[1] == self._artifact]
        return sorted(own, reverse=True)

    def _name(self, ids: Sequence[int]) -> str:
        digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()
        return f"{self._artifact}-{len(ids)}-{digest[:32]}.session"

    def _remove(self, file: Path, why: str) -> None:
        log.warning("%s; it is removed and computed again", why)
        with contextlib.suppress(OSError):
            file.unlink()


def _used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
