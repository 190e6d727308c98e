"""Calls in Python's syntax, compared with Python's own reader of literals, and with hostile texts."""

from __future__ import annotations

import ast
import time
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.assistant.python_calls import MAX_DEPTH, MAX_NUMBER, python_calls, written_calls

TEXTS = st.text().map(lambda text: text.encode("utf-8", "replace").decode())
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(allow_nan=False, allow_infinity=False), TEXTS
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4))
)
NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
ARGUMENTS = st.dictionaries(st.from_regex(r"[A-Za-z_.é日-]{1,6}", fullmatch=True), VALUES, max_size=4)


@settings(max_examples=200, deadline=None)
@given(calls=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3))
def test_what_is_written_is_read_back(calls: list[tuple[str, Any]]) -> None:
    assert repr(python_calls(written_calls(calls))) == repr(calls)


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_what_python_writes_is_read(value: Any) -> None:
    """Quotes of either kind, and escapes as Python has them."""
    assert repr(python_calls(f"[f(x={value!r})]")) == repr([("f", {"x": value})])


PIECES = st.sampled_from([
    *"ab\\\\\\'\"'\"[]{}(),::-+.0159eExuUNv é日", "\\x4", "\\u00e9", "\\U0001f600", "True", "None", "1.5", "'a'", '"b"',
    "[1, ", "{'a': ", "\\\n",
])  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(pieces=st.lists(PIECES, max_size=10))
def test_nothing_is_read_otherwise_than_python_reads_it(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = python_calls(f"[f(x={text})]")
    if found is None or [list(arguments) for _, arguments in found] != [["x"]]:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that Python does not know either
        called = ast.parse(f"f(x={text})", mode="eval").body
    assert isinstance(called, ast.Call)
    assert repr(found) == repr([("f", {"x": ast.literal_eval(called.keywords[0].value)})])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[get_weather(city="Ulm", days=3), other()]', [("get_weather", {"city": "Ulm", "days": 3}), ("other", {})]),
        (" [ a.b-c ( x = 1 ,\n\ty=[ ] , ) , ] ", [("a.b-c", {"x": 1, "y": []})]),
        ("[f(a=true, b=false, c=null, é=True)]", [("f", {"a": True, "b": False, "c": None, "é": True})]),
        ("[f(a={'b': 1, 'c': 2, 'b': [3,],})]", [("f", {"a": {"b": [3], "c": 2}})]),
        (r"[f(a='\'\"\\\/\d\n\x41\u00e9\ud83d\ude00')]", [("f", {"a": "'\"\\/\\d\nAé😀"})]),
        ("[f(a='one\ntwo\\\n three\0')]", [("f", {"a": "one\ntwo three\0"})]),  # line ends, as models write them
        ("[f(a=')]', b=\"'\")]", [("f", {"a": ")]", "b": "'"})]),
        (f"[f(a={'[' * MAX_DEPTH}{']' * MAX_DEPTH})]", ...),
        (f"[f(a={'9' * MAX_NUMBER})]", [("f", {"a": int("9" * MAX_NUMBER)})]),
    ],
)
def test_what_is_read(text: str, wanted: Any) -> None:
    found = python_calls(text)
    assert found is not None
    assert wanted is ... or repr(found) == repr(wanted)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "[,]", "f()", "[f()", "f()]", "[f()] x", "[f(),,g()]", "[f() g()]", "[[f()]]", "[f]", "[f()()]"),
        *("[f(1)]", "[f('a')]", "[f(a=1, 2)]", "[f(a=1, a=1)]", "[f(*a)]", "[f(**{})]", "[f(a==1)]", "[f(a=)]"),
        *("[f(a=b)]", "[f(a=g())]", "[f(a=1+2)]", "[f(a=1j)]", "[f(a=+1)]", "[f(a=--1)]", "[f(a=TRUE)]", "[f(,)]"),
        *("[f(a=(1,))]", "[f(a=())]", "[f(a={1})]", "[f(a={1: 2})]", "[f(a={'a'})]", "[f(a=b'x')]", "[f(a=r'x')]"),
        *("[f(a=01)]", "[f(a=1.)]", "[f(a=.5)]", "[f(a=0x1)]", "[f(a=1_0)]", "[f(a=1e999)]", "[f(a=nan)]"),
        *("[f(a='x''y')]", "[f(a='''x''')]", "[f(a='x)]", "[f(a='x\\", r"[f(a='\x4')]", r"[f(a='\u12')]"),
        *(r"[f(a='\N{DASH}')]", "[f(a=...)]", "[f(a=not 1)]"),
        *(r"[f(a='\0')]", r"[f(a='\ud800')]", r"[f(a='\U00110000')]", r"[f(a='\U0000dc00')]", "[f a=1)]", "[f(a b=1)]"),
        *('[f("a"=1)]', "[é()]", "[f\0()]", "[f(a=[1 2])]", "[f(a={'a' 1})]", "[f(a={a: 1})]", "[f(a=[)]", "[f(a=1]]"),
        f"[f(a={'[' * (MAX_DEPTH + 1)}{']' * (MAX_DEPTH + 1)})]",
        f"[f(a={'9' * (MAX_NUMBER + 1)})]",
    ],
)  # fmt: skip
def test_what_is_no_call(text: str) -> None:
    assert python_calls(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[f(a=" + "[" * 100_000,
        "[f(a=" + "{'a':" * 100_000,
        "[f(a=" + "1" * 200_000 + ")]",
        "[f(a=0." + "1" * 200_000 + ")]",
        "[f(a='" + "\\x41" * 100_000,
        "[f(" + "a=1," * 100_000,
        "[" + "f()," * 100_000 + "x",
        "[f(a=" + " " * 200_000,
        "[f(a='" + "\\ud83d" * 50_000 + "')]",
    ],
)
def test_hostile_texts_end_soon(text: str) -> None:
    began = time.process_time()
    assert python_calls(text) is None
    assert time.process_time() - began < 3.0  # a tenth of it here; quadratic time would be minutes
