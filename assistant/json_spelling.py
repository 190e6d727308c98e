"""How a chat template writes JSON: what `json.dumps` is told, so that other programs can write the same text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Spelling:
    """The options of `json.dumps`. indent: spaces, 0 for one line; item and key: what follows an item and a key."""

    ascii: bool = False
    indent: int = 0
    item: str = ", "
    key: str = ": "
    sorted: bool = False

    def of(self, value: Any) -> str:
        """A value as JSON."""
        return json.dumps(
            value,
            ensure_ascii=self.ascii,
            indent=self.indent or None,
            separators=(self.item, self.key),
            sort_keys=self.sorted,
        )


_LAYOUTS = (
    (0, ", ", ": "),
    (0, ",", ":"),
    (0, ",", ": "),
    (0, ", ", ":"),
    *((spaces, item, ": ") for spaces in (4, 2, 1, 3, 8) for item in (",", ", ")),
)
#: What templates are known to use, the usual first.
SPELLINGS = tuple(
    Spelling(ascii, *layout, sorted=order) for ascii, order, layout in product((False, True), (False, True), _LAYOUTS)
)


def spelling_in(text: str, value: Any) -> Spelling | None:
    """The spelling in which a text holds a value; None if it holds it in none."""
    return next((found for found in SPELLINGS if found.of(value) in text), None)
