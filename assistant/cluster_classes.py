"""Which characters form a grapheme cluster, as the installed `tokenizers` has it: part of character_classes.json.

SentencePiece's table of characters is applied to grapheme clusters of less than six bytes (`normalizers.Precompiled`).
The library does not say where clusters end, but a table that turns every cluster into one letter shows how many there
are: a cluster of six bytes or more is then a letter for each of its characters. From probes around each character
follow the classes of Unicode's Annex 29, in the version that the library was built with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

_MARK = "\u0301"  # two bytes, joined to what stands before it
_BREAK = "\x01"  # a control character, which the table leaves as it is
_KA, _VIRAMA, _ZWJ, _SIGN = "\u0915", "\u094d", "\u200d", "\u00a9"  # consonant, linker, joiner, pictograph
_SYLLABLES = range(0xAC00, 0xD7A4)
_LEAD, _VOWEL, _TRAIL = "\u1100", "\u1160", "\u11a8"


def cluster_classes(codes: Iterable[int]) -> dict[str, list[int]]:
    """Code points by class:

    joins: joined to what stands before. prepends: joined to what follows. breaks: joined to nothing. leads, vowels,
    trails: of Hangul. pictographs, and extends: what may stand between one and a joiner. consonants, linkers, and
    conjuncts: what may stand between two consonants beside a linker, linkers among them.
    """
    given = [code for code in codes if code not in (0, ord(_BREAK))]
    joins = _counted(given, 1, before="a")
    found = {
        "joins": joins,
        "prepends": _counted(given, 1, behind="a"),
        "breaks": sorted({0, ord(_BREAK), *_counted(given, 2, behind=_MARK * 2)}),
        "pictographs": _counted(given, 4, behind=_ZWJ + _SIGN + _MARK),
        "extends": _counted(joins, 5, before=_SIGN, behind=_ZWJ + _SIGN + _MARK),
        "consonants": _counted(given, 4, behind=_VIRAMA + _KA + _MARK),
        "linkers": _counted(joins, 4, before=_KA, behind=_KA + _MARK),
        "conjuncts": _counted(joins, 5, before=_KA + _VIRAMA, behind=_KA + _MARK),
    }
    taken = {*found["prepends"], *_SYLLABLES}
    for name, behind in (("leads", _LEAD), ("vowels", _VOWEL), ("trails", _TRAIL)):
        found[name] = [code for code in _counted(given, 3, behind=behind + _MARK) if code not in taken]
        taken.update(found[name])
    return found


def letter_map(letter: str, kept: Iterable[int] = ()) -> bytes:
    """A table of characters that turns every cluster into `letter`, but those that begin with a byte of `kept`."""
    children, leaf, units = 256, 512, [0] * 768
    units[0] = children << 10
    for byte in set(range(1, 256)) - set(kept):
        units[children + byte] = byte | 0x100 | ((children + byte) ^ leaf) << 10
    units[leaf] = 1 << 31
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + letter.encode() + b"\0"


def _counted(codes: Iterable[int], wanted: int, *, before: str = "", behind: str = "") -> list[int]:
    """Those that make `wanted` letters with what stands around them."""
    from tokenizers import normalizers

    given = list(codes)
    change = normalizers.Precompiled(letter_map("Y", [ord(_BREAK)]))
    parts = change.normalize_str(_BREAK.join(before + chr(code) + behind for code in given)).split(_BREAK)
    return [code for code, part in zip(given, parts, strict=True) if len(part) == wanted]
