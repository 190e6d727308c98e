"""Writes character_classes.json by the installed `tokenizers`: `python -m moec.assistant.character_classes`."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

from moec.assistant.cluster_classes import cluster_classes
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
    clusters = {f"cluster_{name}": _ranges(codes) for name, codes in cluster_classes(map(ord, every)).items()}
    return found | normal_forms() | words() | clusters


def words() -> dict[str, str]:
    """What BERT's parts, `Whitespace` and `Lowercase` do with each character.

    word: it is one of a word. punctuation: a piece of its own. control: left out, beside U+0000 and U+FFFD.
    ideographs: set between spaces. nonspacing, combining: left out as accents of the two kinds. lower: what it becomes,
    of several that move alike the first and last, and what the first becomes.
    """
    from tokenizers import normalizers, pre_tokenizers

    def chosen(test: Callable[[str], bool]) -> str:
        return _ranges([c for c in range(LAST + 1) if c not in SURROGATES and test(chr(c))])

    cut, single = pre_tokenizers.Whitespace().pre_tokenize_str, pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    clean, apart, plain = (
        normalizers.BertNormalizer(clean_text=a, handle_chinese_chars=b, strip_accents=c, lowercase=False).normalize_str
        for a, b, c in ((True, False, False), (False, True, False), (False, False, True))
    )
    accents = normalizers.StripAccents().normalize_str
    whole = normalizers.NFD().normalize_str
    return {
        "word": chosen(lambda c: len(cut(f"a{c}")) == 1 and not c.isspace()),
        "punctuation": chosen(lambda c: len(single(f"a{c}")) == 2),
        "control": chosen(lambda c: clean(c) == "" and c not in "\0\ufffd"),
        "ideographs": chosen(lambda c: apart(c) == f" {c} "),
        "nonspacing": chosen(lambda c: plain(c) == "" and whole(c) == c),
        "combining": chosen(lambda c: accents(c) == ""),
        "lower": _lower(),
    }


def _lower() -> str:
    from tokenizers import normalizers

    lower = normalizers.Lowercase().normalize_str
    found: list[tuple[int, int, list[int]]] = []
    for code in range(LAST + 1):
        if code in SURROGATES:
            continue
        becomes = [ord(c) for c in lower(chr(code))]
        if becomes == [code]:
            continue
        first, last, target = found[-1] if found else (0, -2, [0])
        if last + 1 == code and len(becomes) == len(target) == 1 and becomes[0] - target[0] == code - first:
            found[-1] = (first, code, target)
        else:
            found.append((code, code, becomes))
    return " ".join(f"{low:x}-{high:x}>{','.join(f'{c:x}' for c in codes)}" for low, high, codes in found)


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
