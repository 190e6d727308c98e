"""What conversations with one system prompt and the same tools begin with: found once, not for every turn."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Callable
from typing import Any

from moec.assistant.prefixes import shared_length
from moec.compiler.errors import RunError, UserError

_MOST = 16  # that are remembered; the one used longest ago goes first


class Beginnings:
    """Ids that conversations of a kind begin with, by what tells the kind; from any thread."""

    def __init__(self) -> None:
        self._known: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def of(self, kind: Any, asked: Callable[[str], list[int]]) -> list[int]:
        """The ids that conversations of a kind have in common: those of two questions, as `asked` gives them.

        kind: a value of JSON that tells it. Empty where the template refuses so short a conversation. It holds for a
        day, since templates may write the date.
        """
        key = json.dumps([datetime.date.today().isoformat(), kind], default=repr)
        with self._lock:
            found = self._known.pop(key, None)
            if found is not None:
                self._known[key] = found
                return found
        try:
            one, other = asked("a"), asked("1")
            found = one[: shared_length(one, other)]
        except RunError:
            found = []
        except UserError:  # it failed, which it may not do again
            return []
        with self._lock:
            self._known[key] = found
            while len(self._known) > _MOST:
                self._known.pop(next(iter(self._known)))
        return found
