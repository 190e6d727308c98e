"""Answers that native apps take apart, against Python's: every family's form, on texts cut anywhere."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from moec.assistant.native_text import FILE, tables
from moec.assistant.segments import Channels, Piece, Segments, has_channels, has_thinking, opens_thinking
from moec.assistant.template import ChatTemplate
from moec.assistant.tool_formats import call_markers, tool_format
from moec.compiler.tokenizer import load_tokenizer
from tests.assistant.conversations import NAMES, template
from tests.assistant.speaking import tokenizer
from tests.runtime import app
from tests.tiny import TinyModels, tiny_text

KINDS = ("text", "thinking", "call")
BOTH = app.SEGMENTS | app.TOOLS
#: What calls are made of, whole and damaged, beside what only looks like them.
FRAGMENTS = (

    '{"name": "weather", "arguments": {"city": "Åbo 🙂", "n": -1.5e3, "deep": [[{"a": null}], true, NaN]}}',
    '{"name": "a\\u00e9\\n\\ud83d\\ude42", "parameters": {}}',
    '{"function": {"name": "f", "arguments": "{\\"x\\": 1}"}}',
    '{"name": "a", "name": "b", "arguments": {"k": 1, "k": 2}}', '{"name": "", "arguments": {}}',
    '{"name": 3}', "{}", "[]", '[{"name": "a"}, {"name": "b", "arguments": {}}]',
    '{"name": "get\\u0000all", "arguments": {}}',
    '[{"name": "a"}, 7]', '{"name": "a", "arguments": [1]}', '{"name": "a", "arguments": "x"}',
    '{"name": "a", "arguments": {"x": 01}}', '{"name": "a", "arguments": {"x": 1}', "{", '"\\x"',
    "1 2", '{"name": "t\tab"}', "get[ARGS]{}", 'get[CALL_ID]9[ARGS]{"a": "[TOOL_CALLS]"}',
    'name{"q": 1.}',
    "<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>text\n\n</parameter></function>",
    "<function=>x</function>", '<function=g><parameter=q>"z"</parameter><parameter=q></parameter>',
    "</function>", "<parameter=z>", "<function=\nx>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "function<｜tool▁sep｜>", "\n```json\n", "\n```", "name", "<|channel|>",
    "analysis", " final", "commentary to=functions.do-it.x_1 ", "<|message|>", "<|start|>assistant",
    "<|constrain|>json", "<|end|>", "<|call|>", "<|return|>", "to=functions.", "<think>",
    "</think>", "<thi", "</", "[TOOL", "<|", " ", "\n", "\n\n", "\t", "\u3000", "\x1c", "Hello, ",
    "日本 🙂", ",", ";", "ipython", "x" * 40,
)  # fmt: skip
#: Sequences that are calls in one family or another.
CALLS = (
    ["<｜tool▁call▁begin｜>", "name", "<｜tool▁sep｜>", '{"a": 1}', "<｜tool▁call▁end｜>"],
    [
        "<｜tool▁call▁begin｜>",
        "function<｜tool▁sep｜>",
        "name",
        "\n```json\n",
        '{"a": 1}',
        "\n```",
        "<｜tool▁call▁end｜>",
    ],
    [
        "<|channel|>",
        "commentary to=functions.do-it.x_1 ",
        "<|message|>",
        '{"a": "é"}',
        "<|call|>",
        "<|start|>assistant",
    ],
    ["<|channel|>", "analysis", "<|message|>", "Hello, ", "<|end|>", "<|start|>assistant"],
    ["get[ARGS]{}", "[TOOL_CALLS]", "get[ARGS]{}"],
    ["<think>", "\n\n", "Hello, ", "\n", "</think>", "\n\n"],
)


def generated(draw: random.Random, marks: Sequence[str]) -> str:
    found: list[str] = list(draw.choice(CALLS)) if draw.random() < 0.3 else []
    for _ in range(draw.randrange(1, 9)):
        found += draw.choice(CALLS) if draw.random() < 0.2 else [draw.choice((*FRAGMENTS, *marks, *marks))]
        if marks and draw.random() < 0.3:
            inner = draw.choice(CALLS) * draw.choice((1, 2)) if draw.random() < 0.5 else [draw.choice(FRAGMENTS[:20])]
            found += [marks[0], *inner, *marks[1:2]]
    return "".join(found)


def cut(draw: random.Random, text: str) -> list[str]:
    ends = sorted(draw.randrange(len(text) + 1) for _ in range(draw.choice((0, 1, 4, len(text)))))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def joined(given: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Texts of one kind behind each other as one: the two may part them differently."""
    found: list[tuple[str, Any]] = []
    for kind, value in given:
        if found and kind != "call" and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + value)
        else:
            found.append((kind, value))
    return found


def of_python(pieces: Sequence[Piece]) -> list[tuple[str, Any]]:
    called = [
        ("call", (p.call.name, repr(json.loads(p.call.arguments)))) if p.call else (p.kind, p.text) for p in pieces
    ]
    return joined(called)


def of_native(splitter: int) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    segment = app.Segment(size=ctypes.sizeof(app.Segment))
    while app.call("next_segment", splitter, ctypes.byref(segment)):
        kind = KINDS[segment.kind]
        if kind == "call":
            found.append((kind, (segment.name.decode(), repr(json.loads(segment.arguments)))))
        else:
            assert len(segment.text) == segment.bytes
            found.append((kind, segment.text.decode()))
    return joined(found)


def opened_with(folder: Path, name: str, copy: Path, special: Sequence[str] = ()) -> int:
    """An artifact with this chat template, and with special tokens of these texts."""
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(template(name).text, "utf-8")
    if special:
        made = tokenizer()
        made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        made.save(str(copy / "tokenizer.json"))
    (copy / FILE).write_bytes(tables(copy, load_tokenizer(copy / "tokenizer.json")))
    return app.open_artifact(copy)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_segments(name: str, tiny: TinyModels, tmp_path: Path) -> None:
    text = template(name).text
    artifact = opened_with(tiny(tiny_text()) / "artifact", name, tmp_path / "copy")
    form, draw, kinds = tool_format(text), random.Random(name), set()
    info = app.Info(size=ctypes.sizeof(app.Info))
    app.call("describe", artifact, ctypes.byref(info))
    channels = has_channels(text)
    assert (info.has_calls, info.thinks) == (form is not None or channels, has_thinking(text) or channels)
    marks = [m for m in (form.begin, form.end) if m] if form else []
    for _ in range(400):
        with_tools = draw.random() < 0.8 and bool(info.has_calls)
        prompt = draw.choice(("x", "a<think>\n", "<think>y"))
        ids = (app.I32 * 200)(*app.tokenize(artifact, prompt, app.PLAIN))
        count = len(app.tokenize(artifact, prompt, app.PLAIN))
        native = app.call("splitter", artifact, ids, count, BOTH if with_tools else app.SEGMENTS)
        thinking = opens_thinking(prompt)
        python: Segments | Channels = Channels()
        if not channels:
            python = Segments(form if with_tools else None, thinks=has_thinking(text), thinking=thinking)
        answer = generated(draw, marks)
        for piece in cut(draw, answer):
            app.call("split", native, piece.encode(), len(piece.encode()))
            found = of_native(native)
            assert found == of_python(python.push(piece)), answer
            kinds |= {kind for kind, _ in found}
        app.call("split", native, None, 0)
        found = of_native(native)
        assert found == of_python(python.finish()), answer
        kinds |= {kind for kind, _ in found}
        with pytest.raises(app.AppError, match="has ended"):
            app.call("split", native, b"x", 1)
        app.call("close", native)
    expected = {"text", "call"} if form or channels else {"text"}
    assert kinds - {"thinking"} == expected
    app.call("close", artifact)


def test_markers_that_are_special_tokens_are_kept(tiny: TinyModels, tmp_path: Path) -> None:
    """Only where segments are wanted, and those of calls only with tools."""
    special = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>")
    artifact = opened_with(tiny(tiny_text()) / "artifact", "hermes", tmp_path / "copy", special)
    form = tool_format(template("hermes").text)
    assert set(call_markers(form)) == set(special[2:4])
    assert ChatTemplate.of_folder(tmp_path / "copy") is not None
    words = load_tokenizer(tmp_path / "copy" / "tokenizer.json")
    ids = [words.token_to_id(text) for text in special]
    assert None not in ids
    session = app.call("session", artifact)
    allowed = [*ids, *app.tokenize(artifact, "abc", app.PLAIN)]
    biases = [(id_, -float("inf")) for id_ in range(4096) if id_ not in allowed]
    texts = {}
    for flags in (0, app.SEGMENTS, BOTH):
        given = app.options(artifact, temperature=5.0, seed=1, max_new_tokens=60, biases=biases, segments=flags)
        generation = app.begin(session, app.tokenize(artifact, "x"), given)
        texts[flags] = "".join(app.pieces(generation))
        app.call("close", generation)
    kept = {flags: {text for text in special if text in found} for flags, found in texts.items()}
    assert kept[0] == set()
    assert kept[app.SEGMENTS] == {"<think>", "</think>"}
    assert kept[BOTH] == set(special[:4])
    with pytest.raises(app.AppError, match="flags"):
        app.call("splitter", artifact, None, 0, 1)
    made = app.call("splitter", artifact, None, 0, BOTH)
    with pytest.raises(app.AppError, match="not UTF-8"):
        app.call("split", made, b"\xff", 1)
    with pytest.raises(app.AppError, match=r"segment\.size"):
        app.call("next_segment", made, ctypes.byref(app.Segment(size=3)))
    with pytest.raises(app.AppError, match="no open splitter"):
        app.call("split", session, b"x", 1)
    for id_ in (made, session, artifact):
        app.call("close", id_)


def test_calls_of_an_unknown_form_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    artifact = opened_with(tiny(tiny_text()) / "artifact", "plain", tmp_path / "copy")
    with pytest.raises(app.AppError, match="not known"):
        app.call("splitter", artifact, None, 0, BOTH)
    app.call("close", artifact)
