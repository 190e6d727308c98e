"""Writes character_classes.json by the installed `tokenizers`: `python -m moec.assistant.character_classes`."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

from moec.assistant.split_program import LAST

CATEGORIES = ("L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "Nd", "P", "S", "Han")
SURROGATES = range(0xD800, 0xE000)
FILE = Path(__file__).parent / "character_classes.json"


def matched(expression: str) -> str:
    """The code points that an expression of one character matches, as ranges in hexadecimal."""
    from tokenizers import Regex, pre_tokenizers

    splitter = pre_tokenizers.Split(Regex(expression), "removed")
    return _others(splitter)


def classes() -> dict[str, str]:
    """All classes, by name; takes some seconds."""
    from tokenizers import pre_tokenizers

    found = {name: matched(rf"\p{{{name}}}") for name in CATEGORIES}
    found |= {"s": matched(r"\s"), "d": matched(r"\d")}
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True)])
    every = [chr(c) for c in range(LAST + 1) if c not in SURROGATES]
    # a digit is a piece of its own, whatever stands before it
    pieces = digits.pre_tokenize_str("a".join(every))
    numeric = [ord(piece) for piece, _ in pieces if len(piece) == 1 and piece != "a"]
    found["numeric"] = _ranges(numeric)
    return found | normal_forms()


def normal_forms() -> dict[str, str]:
    """The characters that the library's normal forms change: marks that are reordered, and those (de)composed.

    Its Unicode tables are older than Python's; a character's class and decomposition never change once it is assigned.
    """
    from tokenizers import normalizers

    apart, together = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    marks, decomposed, composed = [], [], []
    for code in range(LAST + 1):
        letter = chr(code)
        if code in SURROGATES:
            continue
        if combining := unicodedata.combining(letter):
            row = (
                f"a\u0301{letter}" if combining < 230 else f"a{letter}\u0323"
            )  # classes 230 and 220: in the wrong order
            if apart(row) != row:
                marks.append(code)
        if unicodedata.decomposition(letter) and apart(letter) != letter:
            decomposed.append(code)
            if together(apart(letter)) == letter:
                composed.append(code)
    return {"marks": _ranges(marks), "decomposed": _ranges(decomposed), "composed": _ranges(composed)}


def _others(splitter: object) -> str:
    every = "".join(chr(c) for c in range(LAST + 1) if c not in SURROGATES)
    kept = [part[1] for part in splitter.pre_tokenize_str(every)]  # type: ignore[attr-defined]
    taken, begin = [], 0
    for low, high in [*kept, (len(every), len(every))]:
        taken += [ord(c) for c in every[begin:low]]
        begin = high
    return _ranges(taken)


def _ranges(codes: list[int]) -> str:
    found: list[list[int]] = []
    for code in codes:
        if found and code == found[-1][1] + 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return " ".join(f"{low:x}" if low == high else f"{low:x}-{high:x}" for low, high in found)


if __name__ == "__main__":
    FILE.write_text(json.dumps(classes(), indent=1) + "\n", "ascii")
