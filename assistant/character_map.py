"""Tables of characters for native apps: SentencePiece's (`Precompiled`), lower case, and what clusters are made of.

SentencePiece keeps its table as a Darts double array with the texts behind it. `tokenizers` looks up grapheme clusters
of less than six bytes, else each character, and takes the shortest key that matches: so only keys of up to five bytes
count, and none that begins with another. They are written out as a sorted list (`runtime/app/character_map.h`).
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import sys
from array import array
from collections import defaultdict
from importlib import resources

from moec.assistant.split_program import Unknown, character_class

LONGEST = 5  # bytes of a key
MOST_UNITS = 1 << 20  # of a double array; SentencePiece's own have 60,000
_LONGEST_TEXT = 64  # characters that stand for one; SentencePiece's tables have up to 18
_DAMAGED = "a Precompiled table that is damaged"
_BLOCK = 256  # units that belong together, one for each byte
#: the flags of runtime/app/character_map.cpp, by class in character_classes.json
_CLASSES = {
    "joins": 1,
    "prepends": 2,
    "breaks": 4,
    "pictographs": 8,
    "extends": 16,
    "consonants": 32,
    "linkers": 64,
    "conjuncts": 128,
    "leads": 256,
    "vowels": 512,
    "trails": 1024,
}

Pairs = list[tuple[bytes, str]]


def precompiled(table: str) -> Pairs:
    """The keys of a `Precompiled` normalizer's `precompiled_charsmap` and what stands for each, sorted; Unknown."""
    try:
        raw = base64.b64decode(table, validate=True)
    except (binascii.Error, ValueError):
        raise Unknown(_DAMAGED) from None
    size = int.from_bytes(raw[:4], "little") // 4
    if len(raw) < 4 * (size + 1) or size % _BLOCK or size == 0:
        raise Unknown(_DAMAGED)
    if size > MOST_UNITS:
        raise Unknown(f"a Precompiled table of {size:,} units")
    units = array("I", raw[4 : 4 * (size + 1)])
    if sys.byteorder == "big":
        units.byteswap()
    texts = raw[4 * (size + 1) :]
    return sorted((key, _text(texts, value)) for key, value in _keys(units))


def _keys(units: array[int]) -> list[tuple[bytes, int]]:
    """The shortest keys of a double array, and their values."""
    children: dict[int, list[int]] = defaultdict(list)  # units by the place that their labels are added to
    for place, unit in enumerate(units):
        label = unit & 0xFF
        if label and not unit >> 31:
            children[place ^ label].append(place)
    found, level = [], [(b"", _offset(units[0]))]
    for _ in range(LONGEST):
        beyond = []
        for key, base in level:
            for place in children.get(base, ()):
                longer, target = key + bytes([units[place] & 0xFF]), place ^ _offset(units[place])
                if target >= len(units):
                    raise Unknown(_DAMAGED)
                if units[place] >> 8 & 1:
                    found.append((longer, units[target] & 0x7FFFFFFF))
                else:
                    beyond.append((longer, target))
        if len(found) + len(beyond) > len(units):  # units that several keys lead to
            raise Unknown(_DAMAGED)
        level = beyond
    return found


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 0x200) >> 6)


def _text(texts: bytes, begin: int) -> str:
    end = texts.find(b"\0", begin)
    if begin > len(texts):
        raise Unknown(_DAMAGED)
    try:
        found = texts[begin : end if end >= 0 else len(texts)].decode()
    except UnicodeDecodeError:
        raise Unknown(_DAMAGED) from None
    if len(found) > _LONGEST_TEXT:
        raise Unknown(f"a Precompiled table with a text of {len(found):,} characters")
    return found


def lower_case() -> Pairs:
    """What each character that `Lowercase` changes becomes."""
    text = resources.files("moec.assistant").joinpath("character_classes.json").read_text("ascii")
    found: Pairs = []
    for part in json.loads(text)["lower"].split():
        codes, becomes = part.split(">")
        low, high = (int(code, 16) for code in codes.split("-"))
        first, *others = (int(code, 16) for code in becomes.split(","))
        for code in range(low, high + 1):
            found.append((chr(code).encode(), "".join(map(chr, (first + code - low, *others)))))
    return sorted(found)


def maps_bytes(maps: list[Pairs]) -> bytes:
    """The part MAPS of a `text.moec`."""
    found = struct.pack("<I", len(maps))
    for pairs in maps:
        texts = [[ord(c) for c in text] for _, text in pairs]
        found += struct.pack("<II", len(pairs), sum(map(len, texts)))
        at, rows = 0, []
        for (key, _), text in zip(pairs, texts, strict=True):
            rows.append(struct.pack("<QII", int.from_bytes(key.ljust(8, b"\0"), "big"), at, len(text)))
            at += len(text)
        found += b"".join(rows) + array("I", [code for text in texts for code in text]).tobytes()
    return found


def clusters_bytes() -> bytes:
    """The part CLUS: first and last code point and flags, where a class has them."""
    flags: dict[int, int] = defaultdict(int)
    for name, flag in _CLASSES.items():
        for low, high in character_class(f"cluster_{name}"):
            for code in range(low, high + 1):
                flags[code] |= flag
    rows: list[list[int]] = []
    for code in sorted(flags):
        if rows and rows[-1][1:] == [code - 1, flags[code]]:
            rows[-1][1] = code
        else:
            rows.append([code, code, flags[code]])
    return array("I", [n for row in rows for n in row]).tobytes()
