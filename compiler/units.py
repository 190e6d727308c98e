"""Quantities and texts as people read them."""

from __future__ import annotations

import re

#: Control characters of both ranges but for line ends and tabs, which a terminal may take for a command, and those that
#: change the direction of writing, by which one name looks like another.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` for a terminal: a control character, which a file or a model may hold, is U+FFFD."""
    return CONTROL.sub("\ufffd", text)


def size(count: float) -> str:
    """Bytes in decimal units, as file managers and data sheets use them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
