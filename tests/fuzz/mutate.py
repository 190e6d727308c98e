"""Mutants of bytes, and of the numbers inside a flatbuffer."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# field number -> what it holds: "1", "2", "4", "8" a number of so many bytes; "s" a string; [x] a vector of x; a name:
# a table of that schema; ("union", {kind: name}): two fields, the first of one byte
Schema = Mapping[str, Mapping[int, Any]]
INTERESTING = (0, 1, 2, 3, 7, 8, 255, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 1 << 20)


def flip(rng: random.Random, data: bytes) -> bytes:
    """`data` with bits or bytes changed, pieces removed or repeated, numbers overwritten, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not out:
            break
        at = rng.randrange(len(out))
        how = rng.randrange(7)
        if how <= 1:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            out[at] = rng.randrange(256)
        elif how == 3:
            del out[at : at + rng.choice((1, 2, 4, 16, 100))]
        elif how == 4:
            piece = out[at : at + rng.choice((1, 4, 16, 64))]
            out[at:at] = piece * rng.choice((1, 1, 2, 50))
        elif how == 5:
            out[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING))
        elif rng.random() < 0.2:
            del out[at:]
    return bytes(out)


def fields(data: bytes, schema: Schema, root: str, base: int = 0) -> list[tuple[int, int]]:
    """(offset, bytes) of every number, length and offset of a flatbuffer that begins at `base`."""
    found: set[tuple[int, int]] = {(base, 4)}
    _table(data, schema, root, base + _u32(data, base), found, set())
    return sorted(found)


def renumber(rng: random.Random, data: bytes, places: Sequence[tuple[int, int]]) -> bytes:
    """One to three numbers changed: to a neighbour, to a limit, to what another place holds."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        offset, width = rng.choice(places)
        mask = (1 << 8 * width) - 1
        old = int.from_bytes(out[offset : offset + width], "little")
        other, size = rng.choice(places)
        new = rng.choice(
            (old + 1, old - 1, old * 2, rng.choice(INTERESTING), int.from_bytes(out[other : other + size], "little"),
             -1, rng.randrange(64), old ^ 1 << rng.randrange(8 * width))
        )  # fmt: skip
        out[offset : offset + width] = (new & mask).to_bytes(width, "little")
    return bytes(out)


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _slots(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """(field, place of the slot in the vtable, place of the value)."""
    vtable = at - struct.unpack_from("<i", data, at)[0]
    for field in range((struct.unpack_from("<H", data, vtable)[0] - 4) // 2):
        slot = vtable + 4 + 2 * field
        offset = struct.unpack_from("<H", data, slot)[0]
        if offset:
            yield field, slot, at + offset


def _table(data: bytes, schema: Schema, name: str, at: int, found: set[tuple[int, int]], seen: set[int]) -> None:
    if at in seen:
        return
    seen.add(at)
    kinds = schema[name]
    values = {field: value for field, _, value in _slots(data, at)}
    for field, slot, value in _slots(data, at):
        found.add((slot, 2))
        kind = kinds.get(field)
        if isinstance(kind, tuple):
            found.add((value, 1))
            table = kind[1].get(data[value])
            if table and field + 1 in values:
                found.add((values[field + 1], 4))
                _table(data, schema, table, values[field + 1] + _u32(data, values[field + 1]), found, seen)
        elif kind is not None:
            _value(data, schema, kind, value, found, seen)


def _value(data: bytes, schema: Schema, kind: Any, at: int, found: set[tuple[int, int]], seen: set[int]) -> None:
    if isinstance(kind, str) and kind.isdigit():
        found.add((at, int(kind)))
        return
    found.add((at, 4))
    start = at + _u32(data, at)
    if isinstance(kind, str) and kind != "s":
        _table(data, schema, kind, start, found, seen)
        return
    found.add((start, 4))
    count = _u32(data, start)
    if kind == "s":
        found.update((start + 4 + i, 1) for i in range(min(count, 8)))
        return
    width = int(kind[0]) if kind[0].isdigit() else 4
    for i in range(min(count, 4096)):
        _value(data, schema, kind[0], start + 4 + width * i, found, seen)
