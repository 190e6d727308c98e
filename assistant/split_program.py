"""The regular expressions by which tokenizers split texts, as programs of a small backtracking machine for native apps.

Expressions are in Oniguruma's syntax, as `tokenizers` reads them; the parts of it that tokenizers use are supported,
everything else is refused. An instruction is three integers:

    CHAR set 0      one character of a set           LOOK negative next  what follows matches, or not; goes on at `next`
    SPLIT a b       go on at a, if that fails at b   ATOMIC next 0       what follows matches once; goes on at `next`
    JUMP a 0                                         MATCH 0 0           the end of a program, LOOK or ATOMIC
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

CHAR, SPLIT, JUMP, MATCH, LOOK, ATOMIC = range(6)
LAST = 0x10FFFF  # the last code point
MAX_CODE = 20_000  # instructions of a tokenizer's expressions; usual ones have 60
Ranges = tuple[tuple[int, int], ...]  # code points, both ends included, ascending, not adjacent


class Unknown(Exception):
    """The part of a tokenizer that the tables of native apps cannot express, in one line."""


@cache
def character_class(name: str) -> Ranges:
    """`s`, `d`, `numeric` or a general category as `tokenizers` knows it; Unknown for others.

    The file has what the library itself matches for each code point; tests/assistant/test_native_text.py compares.
    """
    text = resources.files("moec.assistant").joinpath("character_classes.json").read_text("ascii")
    classes = json.loads(text)
    if name not in classes:
        raise Unknown(f"characters of the class {name}")
    pairs = (part.split("-") for part in classes[name].split())
    return tuple((int(pair[0], 16), int(pair[-1], 16)) for pair in pairs)


def union(*given: Iterable[tuple[int, int]]) -> Ranges:
    """All code points that are in one of them."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(pair for ranges in given for pair in ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return tuple(found)


def complement(given: Ranges) -> Ranges:
    """All other code points."""
    found, begin = [], 0
    for low, high in given:
        if low > begin:
            found.append((begin, low - 1))
        begin = high + 1
    return (*found, (begin, LAST)) if begin <= LAST else tuple(found)


class Program:
    """The instructions of several expressions, one after the other, and the sets that they share."""

    def __init__(self) -> None:
        self.code: list[tuple[int, int, int]] = []
        self.sets: list[Ranges] = []

    def add(self, expression: str) -> int:
        """Append an expression; returns where it begins. Unknown."""
        return self._append(_Parser(expression).whole())

    def add_set(self, ranges: Ranges, *, repeated: bool) -> int:
        """Append one character of a set, or a run of them."""
        node: _Node = ("set", ranges)
        return self._append(("repeat", node, 1, None, "greedy") if repeated else node)

    def add_runs(self, *sets: Ranges) -> int:
        """Append a run of characters of one of several sets."""
        return self._append(("either", [("repeat", ("set", ranges), 1, None, "greedy") for ranges in sets]))

    def use(self, ranges: Ranges) -> int:
        """Which of the sets this is; appended where it is not among them."""
        if ranges not in self.sets:
            self.sets.append(ranges)
        return self.sets.index(ranges)

    def add_text(self, text: str) -> int:
        """Append a text."""
        return self._append(("row", [("set", ((ord(c), ord(c)),)) for c in text]))

    def _append(self, node: _Node) -> int:
        begin = len(self.code)
        self._emit(node)
        self.code.append((MATCH, 0, 0))
        return begin

    def _put(self, op: int, a: int = 0, b: int = 0) -> int:
        if len(self.code) >= MAX_CODE:
            raise Unknown(f"expressions of more than {MAX_CODE} instructions")
        self.code.append((op, a, b))
        return len(self.code) - 1

    def _emit(self, node: _Node) -> None:
        kind = node[0]
        if kind == "set":
            self._put(CHAR, self.use(node[1]))
        elif kind == "row":
            for part in node[1]:
                self._emit(part)
        elif kind == "either":
            ends = []
            for part in node[1][:-1]:
                fork = self._put(SPLIT)
                self._emit(part)
                ends.append(self._put(JUMP))
                self.code[fork] = (SPLIT, fork + 1, len(self.code))
            self._emit(node[1][-1])
            for end in ends:
                self.code[end] = (JUMP, len(self.code), 0)
        elif kind in ("look", "atomic"):
            at = self._put(LOOK)
            self._emit(node[1])
            self._put(MATCH)
            self.code[at] = (LOOK, node[2], len(self.code)) if kind == "look" else (ATOMIC, len(self.code), 0)
        else:
            self._repeat(*node[1:])

    def _repeat(self, node: _Node, least: int, most: int | None, how: str) -> None:
        if how == "possessive":
            return self._emit(("atomic", ("repeat", node, least, most, "greedy")))
        if _may_be_empty(node):
            raise Unknown("a repetition of what may be empty")
        for _ in range(least):
            self._emit(node)
        forks = []
        if most is None:
            fork = self._put(SPLIT)
            self._emit(node)
            self._put(JUMP, fork)
            forks.append(fork)
        for _ in range(0 if most is None else most - least):
            forks.append(self._put(SPLIT))
            self._emit(node)
        for fork in forks:
            inside, behind = fork + 1, len(self.code)
            self.code[fork] = (SPLIT, inside, behind) if how == "greedy" else (SPLIT, behind, inside)
        return None


#: ("set", Ranges), ("row" | "either", parts), ("look", node, negative), ("atomic", node), or
#: ("repeat", node, least, most, "greedy" | "lazy" | "possessive")
_Node = tuple[Any, ...]


def _may_be_empty(node: _Node) -> bool:
    kind = node[0]
    if kind == "row":
        return all(map(_may_be_empty, node[1]))
    if kind == "either":
        return any(map(_may_be_empty, node[1]))
    if kind == "repeat":
        return node[2] == 0 or _may_be_empty(node[1])
    return kind == "look" or (kind == "atomic" and _may_be_empty(node[1]))


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def whole(self) -> _Node:
        ignore_case = self._take("(?i)")
        node = self._either(ignore_case)
        if self._at < len(self._text):
            self._unknown()
        return node

    def _unknown(self) -> None:
        raise Unknown(f"the expression {self._text[:200]!r}, at {self._text[self._at : self._at + 8]!r}")

    def _take(self, wanted: str) -> bool:
        found = self._text.startswith(wanted, self._at)
        self._at += len(wanted) if found else 0
        return found

    def _next(self) -> str:
        if self._at >= len(self._text):
            self._unknown()
        self._at += 1
        return self._text[self._at - 1]

    def _either(self, ignore_case: bool) -> _Node:
        parts = [self._row(ignore_case)]
        while self._take("|"):
            parts.append(self._row(ignore_case))
        return parts[0] if len(parts) == 1 else ("either", parts)

    def _row(self, ignore_case: bool) -> _Node:
        parts = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._one(ignore_case)))
        return parts[0] if len(parts) == 1 else ("row", parts)

    def _repeated(self, node: _Node) -> _Node:
        bounds = re.compile(r"\{(\d{1,3})(,?)(\d{0,3})\}").match(self._text, self._at)
        if bounds is not None:
            self._at = bounds.end()
            least = int(bounds[1])
            most = least if not bounds[2] else int(bounds[3]) if bounds[3] else None
            if most is not None and most < least:
                self._unknown()
        elif self._at < len(self._text) and self._text[self._at] in "?*+":
            least, most = {"?": (0, 1), "*": (0, None), "+": (1, None)}[self._next()]
        else:
            return node
        how = "lazy" if self._take("?") else "greedy"
        if how == "greedy" and self._take("+"):
            how = "possessive"
        if (bounds is not None and how != "greedy") or self._text[self._at : self._at + 1] in ("?", "*", "+", "{"):
            self._unknown()  # what follows bounds means other things in other libraries
        return ("repeat", node, least, most, how)

    def _one(self, ignore_case: bool) -> _Node:
        for opening, node in (("(?!", 1), ("(?=", 0), ("(?:", None), ("(?>", None), ("(?i:", None), ("(", None)):
            if not self._take(opening):
                continue
            if opening == "(" and self._text.startswith("?", self._at):
                self._unknown()
            inner = self._either(ignore_case or opening == "(?i:")
            if not self._take(")"):
                self._unknown()
            return ("look", inner, node) if node is not None else ("atomic", inner) if opening == "(?>" else inner
        if self._take("["):
            return ("set", self._class(ignore_case))
        if self._take("."):
            return ("set", complement(((10, 10),)))
        if self._text[self._at] in "^$*+?{":
            self._unknown()
        return ("set", self._character(ignore_case))

    def _class(self, ignore_case: bool) -> Ranges:
        negative = self._take("^")
        parts: list[Ranges] = []
        while not self._take("]"):
            if self._text[self._at : self._at + 2] in ("&&", "[:") or self._text[self._at : self._at + 1] == "[":
                self._unknown()
            begin = self._character(False)
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                end = self._character(False)
                if len(begin) != 1 or len(end) != 1 or begin[0][0] != begin[0][1] or end[0][0] < begin[0][0]:
                    self._unknown()
                begin = ((begin[0][0], end[0][0]),)
            parts.append(begin)
        found = union(*parts)
        if ignore_case and any(
            low < 128 and chr(c).isalpha() for low, high in found for c in range(low, min(high, 127) + 1)
        ):
            self._unknown()
        return complement(found) if negative else found

    def _character(self, ignore_case: bool) -> Ranges:
        letter = self._next()
        if letter != "\\":
            return _folded(letter) if ignore_case else ((ord(letter), ord(letter)),)
        letter = self._next()
        if letter in "pP":
            name = re.compile(r"\{(\^?)(\w+)\}").match(self._text, self._at)
            if name is None:
                self._unknown()
                raise AssertionError
            self._at = name.end()
            found = character_class(name[2])
            return complement(found) if (letter == "P") != bool(name[1]) else found
        if letter in "sSdD":
            found = character_class(letter.lower())
            return complement(found) if letter.isupper() else found
        if letter in "rntfv":
            code = {"r": 13, "n": 10, "t": 9, "f": 12, "v": 11}[letter]
            return ((code, code),)
        if letter.isalnum():
            self._unknown()
        return ((ord(letter), ord(letter)),)


def _folded(letter: str) -> Ranges:
    """A character in upper and lower case; only of ASCII, whose case foldings are few."""
    if ord(letter) > 127:
        raise Unknown(f"the character {letter!r} without regard to case")
    also = {"s": "\u017f", "k": "\u212a"}.get(letter.lower(), "")
    return union(*(((ord(c), ord(c)),) for c in {letter.lower(), letter.upper(), *also}))
