"""Sessions over one model, one for each of the conversations that were answered last."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from moec.assistant.prefixes import shared_length
from moec.compiler.errors import RunError
from moec.compiler.target import Session

log = logging.getLogger("moec.server")
_LOST = 64  # tokens of another conversation that are given up rather than that a session is copied


class Conversations:
    """`take` a session for a prompt: the one that begins like it, or a copy of it where it goes on otherwise.

    most: sessions kept, each with caches of its own; the one that was not used for the longest time goes first.
    """

    def __init__(self, session: Session, most: int) -> None:
        self._most = most
        self._sessions = [session]  # the one used last is the last

    def __len__(self) -> int:
        return len(self._sessions)

    def take(self, ids: Sequence[int]) -> Session:
        """The session that holds the most of a prompt's beginning; what it holds behind that is of no use to others."""
        same = {id(s): shared_length(s.tokens, ids) for s in self._sessions}
        best = max(self._sessions, key=lambda s: (same[id(s)], -s.position))
        if best.position - same[id(best)] > _LOST and self._most > 1:
            best = self._copy(best, same[id(best)])
        else:
            self._sessions.remove(best)
            self._sessions.append(best)
        return best

    def close(self) -> None:
        """Close all of them."""
        for session in self._sessions:
            session.close()

    def _copy(self, best: Session, same: int) -> Session:
        """A session with the first `same` tokens of `best`; `best` itself where there can be no other."""
        try:
            made = best.fork()
        except RunError as error:
            log.warning("one conversation is kept: %s", error.message)
            self._most = 1
            return best
        made.rewind(same if getattr(made, "rewinds", False) else 0)
        self._sessions.append(made)
        while len(self._sessions) > self._most:
            self._sessions.pop(0).close()
        return made
