"""Prompts and the streams made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.analysis.profile import prompts as p
from moec.compiler.errors import RunError, UserError
from moec.compiler.texts import shipped_prompts


def test_shipped_prompts_are_long_and_licensed() -> None:
    """Room for 8K tokens a domain, at the four characters a token that large vocabularies reach."""
    found = shipped_prompts()
    length = {d: sum(len(x.text) for x in found if x.domain == d) for d in ("code", "knowledge", "math")}
    assert {x.domain for x in found} == set(length)
    assert min(length.values()) > 4 * 8192
    file = Path(__file__).parents[3] / "specs/prompts/profile.jsonl"
    assert all({"title", "licence"} <= set(json.loads(line)) for line in file.read_text("utf-8").splitlines())
    notes = (file.parent / "LICENCES.txt").read_text()
    assert {json.loads(line)["licence"] for line in file.read_text("utf-8").splitlines()} == {
        name for name in ("PSF-2.0", "public domain", "MIT") if name.lower() in notes.lower()
    }


def test_reads_json_lines_and_plain_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"domain": "code", "text": "a b"}\n\n{"text": "c\u2028d"}\n', "utf-8")
    assert [(x.domain, x.text) for x in p.read_prompts(tmp_path / "x.jsonl")] == [("code", "a b"), ("text", "c\u2028d")]
    (tmp_path / "tale.txt").write_text("once upon")
    assert [(x.domain, x.text) for x in p.read_prompts(tmp_path / "tale.txt")] == [("tale", "once upon")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no prompt"),
        ("a.jsonl", b"\n \n", "holds no prompt"),
        ("a.jsonl", b'{"text": " "}', "a.jsonl:1: the prompt is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}', "a.jsonl:2: no `text`"),
        ("a.jsonl", b"[1]", "a.jsonl:1: no `text`"),
        ("a.jsonl", b"{", "a.jsonl:1: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"domain": "dummy", "text": "x"}', "'dummy' is no name of a domain"),
        ("a.txt", b"", "the prompt is empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_refuses(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        p.read_prompts(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(UserError, match=r"/nonexistent: cannot be read: .*; give a file of prompts"):
        p.read_prompts(Path("/nonexistent"))


def characters(text: str) -> list[int]:
    return [1, *(ord(c) for c in text)]  # as a tokenizer that adds BOS itself


def test_streams_begin_each_prompt_and_never_cut_one() -> None:
    given = [p.Prompt("a", "xy", "1"), p.Prompt("b", "z", "2"), p.Prompt("a", "wwww", "3"), p.Prompt("a", "v", "4")]
    streams = p.real_streams(given, characters, room=6)
    assert [s.name for s in streams] == ["a", "b"]
    # the third prompt of five tokens does not fit behind the first, the fourth does
    assert streams[0].ids == (1, ord("x"), ord("y"), 1, ord("v"))
    assert p.real_streams(given[:1], lambda text: [5, 6], room=6)[0].ids == (5, 6)  # nothing is added to them


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(RunError, match="f:3: the prompt has 5 tokens, the model's context leaves room for 4"):
        p.real_streams([p.Prompt("a", "wwww", "f:3")], characters, room=4)
    with pytest.raises(RunError, match="makes no tokens"):
        p.real_streams([p.Prompt("a", "x", "f:1")], lambda text: [], room=4)


def test_mixed_takes_turns() -> None:
    streams = [p.Stream("a", p.REAL, (1,) * 5), p.Stream("b", p.REAL, (2,) * 7)]
    assert p.mixed_stream(streams, every=2).ids == (1, 1, 2, 2, 1, 1, 2, 2, 1, 2)
    assert p.dummy_stream(7, 3).ids == (7, 7, 7)
