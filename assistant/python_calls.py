"""Calls of tools in Python's syntax, as LFM2 writes them: read without evaluating anything, and written.

    calls    = "[" call { "," call } [","] "]"
    call     = name "(" [ key "=" value { "," key "=" value } [","] ] ")"
    name     = one or more of A-Z a-z 0-9 _ . -
    key      = one or more of those and of the characters beyond ASCII
    value    = text | number | True | true | False | false | None | null
             | "[" [ value { "," value } [","] ] "]" | "{" [ text ":" value { "," text ":" value } [","] ] "}"
    number   = as JSON writes it, of at most 100 characters, finite as a double
    text     = '...' or "...", where ' or " inside, and \\, stand behind a backslash

Between any two of these there may be spaces, tabs, line feeds and carriage returns. Inside of a text: any character as
it is, a line end too; `\\\\ \\' \\" \\/ \\a \\b \\f \\n \\r \\t \\v`; `\\xHH`, `\\uHHHH` and `\\UHHHHHHHH`, a code
point; a backslash before a line feed: both are left out; before a digit or N: no call; before anything else: both stay,
as in Python. In what results the two halves of a surrogate pair are one character; half of one alone is no call.

Anything else is no call: positional arguments, a key that comes twice in a call, tuples, sets, bytes, names, operators,
lists and objects more than 64 deep (the list of calls and the call itself aside). Of equal keys in an object the last
one's value counts, in the place of the first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 64
MAX_NUMBER = 100  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
KEY = re.compile(r"[A-Za-z0-9_.\-\u0080-\U0010ffff]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = {"'": re.compile(r"[^'\\]*"), '"': re.compile(r'[^"\\]*')}
_ESCAPE = re.compile(r"x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}")
_LETTERS = {**{c: c for c in "\\'\"/"}, "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_WORD = re.compile(r"[A-Za-z]+")


class _NoCallError(Exception):
    """The text is none of the above."""


def python_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Names and arguments of the calls that a text consists of; None where it is anything else."""
    try:
        return _Reader(text).calls()
    except _NoCallError:
        return None


def written_calls(calls: list[tuple[str, Mapping[str, Any]]]) -> str:
    """The text of calls, which `python_calls` reads back; arguments are values of JSON."""
    return "[" + ", ".join(f"{name}({_arguments(given)})" for name, given in calls) + "]"


def _arguments(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_written(value)}" for key, value in given.items())


def _written(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)}: {_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return repr(value)


class _Reader:
    """`_at`: what has been read of the text; what stands there is never white space."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._skip()

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        self._take("[")
        found: list[tuple[str, dict[str, Any]]] = []
        while not self._ends(found, "]"):
            name = self._match(_NAME)
            self._take("(")
            arguments: dict[str, Any] = {}
            while not self._ends(arguments, ")"):
                key = self._match(KEY)
                if key in arguments:
                    raise _NoCallError
                self._take("=")
                arguments[key] = self._value(0)
            found.append((name, arguments))
        if self._at < len(self._text) or not found:
            raise _NoCallError
        return found

    def _value(self, depth: int) -> Any:
        first = self._text[self._at : self._at + 1]
        if first in ("'", '"') and first:
            return self._string(first)
        if first == "-" or first.isdecimal():
            return self._number()
        if first.isalpha():
            return _word(self._match(_WORD))
        if depth == MAX_DEPTH:
            raise _NoCallError
        if first == "[":
            self._take("[")
            items: list[Any] = []
            while not self._ends(items, "]"):
                items.append(self._value(depth + 1))
            return items
        self._take("{")
        members: dict[str, Any] = {}
        while not self._ends(members, "}"):
            quote = self._text[self._at : self._at + 1]
            if quote not in ("'", '"') or not quote:
                raise _NoCallError
            key = self._string(quote)
            self._take(":")
            members[key] = self._value(depth + 1)
        return members

    def _ends(self, found: Any, end: str) -> bool:
        """Whether a list ends here; takes its end, or the comma behind the item before."""
        if found and self._text.startswith(",", self._at):
            self._take(",")
        elif found:
            self._take(end)
            return True
        if self._text.startswith(end, self._at):
            self._take(end)
            return True
        return False

    def _number(self) -> int | float:
        found = _NUMBER.match(self._text, self._at)
        if found is None or len(found[0]) > MAX_NUMBER:
            raise _NoCallError
        self._at = found.end()
        self._skip()
        value = float(found[0])
        if not math.isfinite(value):
            raise _NoCallError
        return value if found[1] or found[2] else int(found[0])

    def _string(self, quote: str) -> str:
        parts, at = [], self._at + 1
        while True:
            plain = _PLAIN[quote].match(self._text, at)
            assert plain is not None
            parts.append(plain[0])
            at = plain.end()
            if self._text.startswith(quote, at):
                break
            part, at = self._escaped(at + 1)
            parts.append(part)
        self._at = at + 1
        self._skip()
        return _whole("".join(parts))

    def _escaped(self, at: int) -> tuple[str, int]:
        """What stands behind a backslash, and where that ends."""
        if at >= len(self._text):
            raise _NoCallError
        letter = self._text[at]
        if letter in "xuU":
            digits = _ESCAPE.match(self._text, at)
            code = -1 if digits is None else int(digits[0][1:], 16)
            if digits is None or code > 0x10FFFF:
                raise _NoCallError
            return chr(code), digits.end()
        if letter == "N" or "0" <= letter <= "9":
            raise _NoCallError
        return "" if letter == "\n" else _LETTERS.get(letter, "\\" + letter), at + 1

    def _match(self, what: re.Pattern[str]) -> str:
        found = what.match(self._text, self._at)
        if found is None:
            raise _NoCallError
        self._at = found.end()
        self._skip()
        return found[0]

    def _take(self, mark: str) -> None:
        if not self._text.startswith(mark, self._at):
            raise _NoCallError
        self._at += 1
        self._skip()

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()


def _word(text: str) -> bool | None:
    if text not in _WORDS:
        raise _NoCallError
    return _WORDS[text]


def _whole(text: str) -> str:
    """A text whose surrogate pairs are joined."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise _NoCallError from None
