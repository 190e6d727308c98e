"""Sessions of one model, one for each of the most recent conversations."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from moec.assistant.prefixes import shared_length
from moec.compiler.errors import LostFileError, RunError
from moec.compiler.target import Session

log = logging.getLogger("moec.server")
_LOST = 64  # cached tokens that may be discarded to reuse a session; to keep more, it is copied


class Conversations:
    """`take` gives the session that shares the longest prefix with a prompt, or a copy if it continues differently.

    most: sessions kept, each with its own caches; the least recently used one is closed first.
    """

    def __init__(self, session: Session, most: int) -> None:
        self._most = most
        self._room = True  # for one more than are kept, while it takes the place of another
        self._sessions = [session]  # the most recently used one is last

    def __len__(self) -> int:
        return len(self._sessions)

    def take(self, ids: Sequence[int]) -> Session:
        """A session that holds the longest known prefix of `ids`; the caller may overwrite what follows it."""
        same = {id(s): shared_length(s.tokens, ids) for s in self._sessions}
        best = max(self._sessions, key=lambda s: (same[id(s)], -s.position))
        if best.position - same[id(best)] > _LOST and self._most > 1:
            best = self._copy(best, same[id(best)])
        else:
            self._sessions.remove(best)
            self._sessions.append(best)
        return best

    def close(self) -> None:
        """Close every session."""
        for session in self._sessions:
            session.close()

    def _copy(self, best: Session, same: int) -> Session:
        """A fork of `best`, rewound to its first `same` tokens, or to 0 where sessions only rewind to the beginning.

        Where there is no room for one more, the least recently used goes first, and no more than now are kept from then
        on: if that is `best`, it is given itself.
        """
        made = self._forked(best) if self._room or len(self._sessions) < self._most else None
        if made is None and not self._room and self._sessions[0] is not best:
            self._sessions.pop(0).close()
            made = self._forked(best)
        if made is None:
            self._sessions.remove(best)
            self._sessions.append(best)
            return best
        made.rewind(same if getattr(made, "rewinds", False) else 0)
        self._sessions.append(made)
        while len(self._sessions) > self._most:
            self._sessions.pop(0).close()
        return made

    def _forked(self, session: Session) -> Session | None:
        try:
            return session.fork()
        except LostFileError as error:  # the session has lost its tokens: it may be used itself
            log.warning("a conversation is computed again: %s", error.message)
            return None
        except (RunError, MemoryError) as error:
            self._room, self._most = False, len(self._sessions)
            what = "one conversation is" if self._most == 1 else f"{self._most} conversations are"
            log.warning("%s kept: %s", what, getattr(error, "message", error))
            return None
