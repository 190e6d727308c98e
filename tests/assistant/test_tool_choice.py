"""Answers that must call a tool, of models that would rather say anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")

from moec.assistant.assistant import Assistant
from moec.compiler.errors import RunError
from tests.assistant.speaking import VOCABULARY, Speaking, assistant

ASK = [{"role": "user", "content": "Hi"}]
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"name": {"enum": ["Oslo", 'a "b"']}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "noop", "parameters": {"type": "object", "properties": {}}}},
]
FAMILIES = ("hermes", "granite", "mistral", "llama3", "lfm2")


def babbling(seed: int) -> Speaking:
    """Likes another token at every position."""
    rows = np.random.default_rng(seed).standard_normal((64, VOCABULARY)).astype(np.float32)
    return Speaking(likes=lambda position: rows[position % 64], context=4000)


def calls_of(speaks: Assistant, seed: int, choice: str) -> list[Any]:
    answer = speaks.generate(babbling(seed), ASK, tools=TOOLS, tool_choice=choice, max_new_tokens=1500)
    assert "".join(answer).strip() == ""
    return answer.calls


@pytest.mark.parametrize("family", FAMILIES)
def test_it_calls(tmp_path: Path, family: str) -> None:
    speaks = assistant(tmp_path, family)
    for seed in range(3):
        (call, *_) = calls_of(speaks, seed, "weather")
        assert call.name == "weather"
        found = json.loads(call.arguments)
        assert set(found) == {"city", "days"}
        assert found["city"] in ("Oslo", 'a "b"')
        assert 1 <= found["days"] <= 9


@pytest.mark.parametrize("family", ["deepseek", "harmony"])
def test_what_cannot_be_forced_is_refused(tmp_path: Path, family: str) -> None:
    with pytest.raises(RunError, match="cannot be forced"):
        assistant(tmp_path, family).generate(babbling(0), ASK, tools=TOOLS, tool_choice="required")


OPTIONAL = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}, "é": {"$ref": "#/$defs/n"}, "d": {"const": {}}},
    "required": ["é"],
    "$defs": {"n": {"enum": [None, [1, {"z": "\n"}]]}},
}


def test_keywords_that_may_be_left_out(tmp_path: Path) -> None:
    """Each keyword that is not required comes in some calls and not in others, and what is written is a call."""
    speaks = assistant(tmp_path, "lfm2")
    tools = [{"type": "function", "function": {"name": "f.g-h", "parameters": OPTIONAL}}]
    seen, written = set(), set()
    for seed in range(24):
        answer = speaks.generate(babbling(seed), ASK, tools=tools, tool_choice="required", max_new_tokens=1500)
        assert "".join(answer) == ""
        for call in answer.calls:
            found = json.loads(call.arguments)
            assert call.name == "f.g-h"
            assert "é" in found
            assert found["é"] in (None, [1, {"z": "\n"}])
            seen |= found.keys()
            written.add(tuple(found))
    assert seen == {"a", "b", "é", "d"}
    assert {("é",), ("a", "b", "é", "d")} <= written


@pytest.mark.parametrize(
    "more",
    [
        {"minProperties": 1},
        {"properties": {"a b": {}}},
        {"properties": []},
        {"properties": 5},
        {"properties": True},
        {"required": [{}]},
        {"required": [5]},
        {"required": ["absent"]},
        {"required": "é"},
        {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    ],
)
def test_arguments_that_no_keywords_express_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {**OPTIONAL, **more}}}]
    with pytest.raises(RunError, match="arguments of f cannot be forced"):
        assistant(tmp_path, "lfm2").generate(babbling(0), ASK, tools=tools, tool_choice="required")


def test_faults_of_a_choice(tmp_path: Path) -> None:
    speaks = assistant(tmp_path, "hermes")
    with pytest.raises(RunError, match="no tool named absent"):
        speaks.generate(babbling(0), ASK, tools=TOOLS, tool_choice="absent")
    with pytest.raises(RunError, match="no tools to call"):
        speaks.generate(babbling(0), ASK, tool_choice="required")
    with pytest.raises(RunError, match="at once"):
        speaks.generate(babbling(0), ASK, tools=TOOLS, tool_choice="required", regex="a")
