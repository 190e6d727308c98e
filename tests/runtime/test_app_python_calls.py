"""Calls in Python's syntax, as LFM2 writes them, in the C interface against `assistant/python_calls.py`: the same
calls, their arguments spelled alike, and nothing where there is none."""

from __future__ import annotations

import ctypes
import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from moec.assistant.python_calls import MAX_DEPTH, MAX_NUMBER, python_calls, written_calls
from moec.assistant.tool_formats import tool_format
from tests.assistant.conversations import template
from tests.assistant.test_python_calls import test_hostile_texts_end_soon as ends_soon
from tests.assistant.test_python_calls import test_what_is_no_call as no_call
from tests.assistant.test_python_calls import test_what_is_read as is_read
from tests.runtime import app
from tests.runtime.test_app_segments import opened_with
from tests.tiny import TinyModels, tiny_text

FORM = tool_format(template("lfm2").text)
LETTERS = (
    *"ab\\\\\\'\"'\"[]{}(),::==-+.0159eExuUNv \t\n\r\v\fé日😀\0\x01\x7f\u2028", "\\x4", "\\u00e9", "\\U0001f600",
    "\\ud83d", "\\ude00", "\\n", "\\\n", "True", "null", "1.5", "1e400", "1e-400", "-0", "'a'", '"b"', "[1, ",
    "{'a': ", "f(", ")]",
)  # fmt: skip


@pytest.fixture(scope="module")
def lfm2(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    copy = tmp_path_factory.mktemp("lfm2") / "artifact"
    artifact = opened_with(tiny(tiny_text()) / "artifact", "lfm2", copy)
    yield artifact
    app.call("close", artifact)


def native(artifact: int, text: str) -> list[tuple[str, str]] | None:
    """Calls of a text between the markers, None where it stayed text."""
    assert FORM is not None
    whole = f"{FORM.begin}{text}{FORM.end}"
    splitter = app.call("splitter", artifact, None, 0, app.TOOLS)
    raw = whole.encode()
    app.call("split", splitter, raw, len(raw))
    app.call("split", splitter, None, 0)
    calls, said = [], ""
    segment = app.Segment(size=ctypes.sizeof(app.Segment))
    while app.call("next_segment", splitter, ctypes.byref(segment)):
        if segment.kind == 2:
            calls.append((segment.name.decode(), segment.arguments.decode()))
        else:
            text_at = ctypes.c_void_p.from_buffer(segment, app.Segment.text.offset).value  # it may hold zero bytes
            said += ctypes.string_at(text_at, segment.bytes).decode()
    app.call("close", splitter)
    assert bool(calls) != (said == whole), (calls, said)
    return calls or None


def compare(artifact: int, text: str) -> bool:
    """Whether it was a call, in both."""
    assert FORM is not None
    found, wanted = native(artifact, text), FORM.parse(text.strip())  # as the splitter gives it
    if wanted is None:
        assert found is None, text
        return False
    assert found is not None, text
    if python_calls(text.strip()) is None:  # JSON, which is given as it was written
        assert [(n, repr(json.loads(a))) for n, a in found] == [(c.name, repr(json.loads(c.arguments))) for c in wanted]
    else:
        assert found == [(call.name, call.arguments) for call in wanted], text
    return True


def value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(9 if depth < 4 else 7)
    if kind == 0:
        return draw.choice((True, False, None))
    if kind == 1:
        return draw.choice((0, -1, draw.randrange(-(10**40), 10**40), draw.randrange(100)))
    if kind == 2:
        return draw.choice(
            (0.5, -0.0, 1e22, 1e-7, draw.uniform(-1e9, 1e9), draw.random() * 10 ** draw.randrange(-300, 300))
        )
    if kind < 7:
        return "".join(draw.choice(LETTERS) for _ in range(draw.randrange(6)))
    if kind == 7:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(value(draw, 9)): value(draw, depth + 1) for _ in range(draw.randrange(4))}


def written(draw: random.Random, given: Any) -> str:
    """A value as a model may write it: in the spelling of Python or of JSON, with white space."""
    space = draw.choice(("", "", " ", "\n\t"))
    if isinstance(given, dict):
        items = [f"{written(draw, key)}{space}:{space}{written(draw, item)}" for key, item in given.items()]
        return "{" + f"{space},{space}".join(items) + draw.choice(("", ",") if items else ("",)) + "}"
    if isinstance(given, list):
        items = [written(draw, item) for item in given]
        return "[" + f"{space},{space}".join(items) + draw.choice(("", ",") if items else ("",)) + "]"
    if isinstance(given, str):
        return draw.choice((repr(given), json.dumps(given), json.dumps(given, ensure_ascii=False)))
    return draw.choice((repr(given), json.dumps(given)))


def some_calls(draw: random.Random) -> str:
    names = ("f", "get_weather", "a.b-c", "x9")
    keys = ("a", "city", "é", "b_2", "日")
    found = []
    for _ in range(draw.randrange(1, 4)):
        given = [f"{key}={written(draw, value(draw))}" for key in draw.sample(keys, draw.randrange(4))]
        found.append(f"{draw.choice(names)}({', '.join(given)})")
    return "[" + draw.choice((", ", ",\n ")).join(found) + "]"


def mutant(draw: random.Random, text: str) -> str:
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(("", *LETTERS)) + text[at + draw.randrange(3) :]
    return text


@pytest.mark.parametrize("seed", range(3))
def test_the_same_calls(lfm2: int, seed: int) -> None:
    draw, calls, none = random.Random(seed), 0, 0
    for _ in range(500):
        text = some_calls(draw)
        assert compare(lfm2, text) is (python_calls(text) is not None)
        calls += 1
        for _ in range(3):
            if compare(lfm2, mutant(draw, text)):
                calls += 1
            else:
                none += 1
        compare(lfm2, "[f(x=" + "".join(draw.choice(LETTERS) for _ in range(draw.randrange(8))) + ")]")
    assert min(calls, none) > 300


def test_what_is_written_is_read(lfm2: int) -> None:
    draw = random.Random(9)
    for _ in range(200):
        calls = [(name, {"a": value(draw), "b": value(draw)}) for name in ("f", "g.h")]
        wanted = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
        assert native(lfm2, written_calls(calls)) == wanted


def cases(test: Any) -> Sequence[Any]:
    """The first parameters of a test of the Python reader."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return [case[0] if isinstance(case, tuple) else case for case in mark.args[1]]


def test_what_python_reads_and_refuses(lfm2: int) -> None:
    """The cases that the Python reader is tested with, and texts that are deep or long."""
    assert all(compare(lfm2, text) for text in cases(is_read))
    assert not any(compare(lfm2, text) for text in cases(no_call))
    began = time.process_time()
    assert not any(native(lfm2, text) for text in cases(ends_soon))
    assert time.process_time() - began < 10  # quadratic time would be minutes
    for depth in (MAX_DEPTH, MAX_DEPTH + 1):
        for begin, end in ("[]", ("{'a': ", "}"), ("[{'a': ", "}]")):
            inside = depth // (2 if len(begin) > 6 else 1)
            compare(lfm2, f"[f(a={begin * inside}1{end * inside})]")
    for number in ("9" * MAX_NUMBER, "-" + "9" * MAX_NUMBER, "1." + "0" * 97, "1." + "0" * 98, "1e308", "1.8e308"):
        compare(lfm2, f"[f(a={number})]")
    assert native(lfm2, '[{"name": "f", "arguments": {"a": 1}}]') == [("f", '{"a": 1}')]


def test_a_name_or_text_with_a_zero_byte(lfm2: int) -> None:
    """In C a name ends at a zero byte: none has one. A text has it escaped."""
    assert native(lfm2, "[f\0()]") is None
    assert native(lfm2, "[f(a='x\0y')]") == [("f", '{"a": "x\\u0000y"}')]
    assert native(lfm2, "[f(a='\\x00')]") == [("f", '{"a": "\\u0000"}')]
