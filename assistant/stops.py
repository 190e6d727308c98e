"""Stop strings in a text that comes in pieces: found however they are split, never shown in part."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from moec.compiler.errors import RunError

MAX_STOPS = 1000
MAX_CHARACTERS = 4096  # of one of them


class StopStrings:
    """Takes a text in pieces and gives what is certain to be shown; `found` is the stop string that ended it.

    A text ends at the stop string whose last character comes first (of several that end there, at the longest): what is
    shown does not depend on how the text was cut into pieces. RunError for a stop string of no characters, or too many.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if len(stops) > MAX_STOPS:
            raise RunError(f"{len(stops)} stop strings", remedy=f"give at most {MAX_STOPS}")
        for stop in stops:
            if not stop:
                raise RunError("a stop string has no characters", remedy="leave it out, or give it a character")
            if len(stop) > MAX_CHARACTERS:
                raise RunError(f"a stop string has {len(stop)} characters", remedy=f"give at most {MAX_CHARACTERS}")
        self._stops = sorted(set(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""  # the end of the text so far that may be the beginning of a stop string
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain now; empty after `found`."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        hits = ((at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0)
        hit = min(hits, default=None)
        if hit is not None:
            self._held, self.found = "", hit[2]
            return text[: hit[1]]
        keep = next(
            (at for at in range(max(0, len(text) - self._longest + 1), len(text)) if self._begins(text[at:])), None
        )
        self._held = "" if keep is None else text[keep:]
        return text if keep is None else text[:keep]

    def finish(self) -> str:
        """What was held back, once the text has ended."""
        piece, self._held = self._held, ""
        return piece

    def _begins(self, text: str) -> bool:
        """Whether some stop string begins with `text`."""
        at = bisect_left(self._stops, text)
        return at < len(self._stops) and self._stops[at].startswith(text)
