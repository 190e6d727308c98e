"""Messages and tools from outside: what is none is named with its place."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.assistant.messages import MAX_MESSAGES, checked_messages, checked_tools
from moec.compiler.errors import RunError

HI = {"role": "user", "content": "Hi"}


def test_what_clients_send_is_what_templates_read() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    given = [
        {"role": "developer", "content": "Brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    read = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "c1"}
    assert checked_messages(given) == [
        {"role": "developer", "content": "Brief."},
        {"role": "user", "content": "a b", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [read]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]


def call(**function: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "messages: no messages"),
        ("Hi", "messages: no messages"),
        (None, "messages: no messages"),
        ([HI] * (MAX_MESSAGES + 1), "messages: 10001 messages"),
        ([HI, "x"], r"messages\[1\]: is no object"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]\.role: unknown role robot; use one of system, developer"),
        ([{"content": "x"}], r"messages\[0\]\.role: unknown role None"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]\.role: unknown role \['user'\]"),
        ([{"role": "user"}], r"messages\[0\]: has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: is no text"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\]\.content: holds half a character"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\]: a part of type image_url"),
        ([{**HI, "audio": "x"}], r"messages\[0\]\.audio: is not known"),
        ([{**HI, "tool_calls": [1]}], "a user message calls no tools"),
        (call(name="a b"), r"tool_calls\[0\]\.function\.name: no name of a function: a b"),
        (call(name="a", arguments="{"), r"tool_calls\[0\]\.function\.arguments: is not JSON"),
        (call(name="a", arguments="[" * 100_000), r"tool_calls\[0\]\.function\.arguments: is not JSON"),
        (call(name="a", arguments="[1]"), r"tool_calls\[0\]\.function\.arguments: is no object"),
    ],
)
def test_what_is_no_conversation_is_named(messages: Any, what: str) -> None:
    with pytest.raises(RunError, match=what) as caught:
        checked_messages(messages)
    assert "\n" not in str(caught.value)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("tools", "what"),
    [
        ({}, "tools: is no list"),
        ([TOOL] * 1001, "tools: 1001 tools"),
        ([{"type": "retrieval"}], r"tools\[0\]: is no function"),
        ([TOOL, TOOL], r"tools\[1\]\.function\.name: a second tool add"),
        ([{"type": "function", "function": {"name": ""}}], "no name of a function"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "parameters: is no object"),
    ],
)
def test_what_is_no_tool_is_named(tools: Any, what: str) -> None:
    with pytest.raises(RunError, match=what):
        checked_tools(tools)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "function", "name", "type", "x"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=JSON)
def test_whatever_comes_is_checked_or_refused(value: Any) -> None:
    for check in (checked_messages, checked_tools):
        with contextlib.suppress(RunError):
            assert isinstance(check(value), list)
