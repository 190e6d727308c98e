"""Answers taken apart: calls of every family's form, thinking, and nothing lost however the text comes in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moec.assistant.segments import Channels, Piece, Segments, has_channels, has_thinking, opens_thinking
from moec.assistant.tool_formats import FORMATS, ToolCall, tool_format
from tests.assistant.conversations import CALLS, template

HERMES, MISTRAL, DEEPSEEK, GRANITE, LLAMA3, LFM2 = (
    tool_format(template(name).text) for name in ("hermes", "mistral", "deepseek", "granite", "llama3", "lfm2")
)


def joined(pieces: list[Piece]) -> list[tuple[str, Any]]:
    """Pieces of one kind behind each other as one; calls as (name, arguments)."""
    found: list[tuple[str, Any]] = []
    for piece in pieces:
        if piece.call is not None:
            found.append(("call", (piece.call.name, json.loads(piece.call.arguments))))
        elif found and found[-1][0] == piece.kind:
            found[-1] = (piece.kind, found[-1][1] + piece.text)
        else:
            found.append((piece.kind, piece.text))
    return found


def split(splitter: Segments | Channels, *pieces: str) -> list[tuple[str, Any]]:
    return joined([found for piece in pieces for found in splitter.push(piece)] + splitter.finish())


def test_the_template_tells_the_format() -> None:
    names = ("hermes", "mistral", "deepseek", "granite", "llama3", "lfm2", "chatml", "plain", "harmony")
    found = [tool_format(template(name).text) for name in names]
    assert [f.name if f else None for f in found] == [
        "hermes",
        "mistral",
        "deepseek",
        "granite",
        "llama3",
        "lfm2",
        None,
        None,
        None,
    ]
    assert [name for name in names if has_channels(template(name).text)] == ["harmony"]
    assert has_thinking(template("hermes").text)
    assert not has_thinking(template("chatml").text)
    prompt = template("deepseek").render([{"role": "user", "content": "x"}], generation_prompt=True)
    assert opens_thinking(prompt)
    assert not opens_thinking(
        template("hermes").render([{"role": "user", "content": "<think>"}], generation_prompt=True)
    )


CALL = ("call", ("add", {"a": 1, "b": "x"}))
TEXT = '{"name": "add", "arguments": {"a": 1, "b": "x"}}'


@pytest.mark.parametrize(
    ("form", "said", "wanted"),
    [
        (HERMES, f"Sure.\n<tool_call>\n{TEXT}\n</tool_call>", [("text", "Sure.\n"), CALL]),
        (HERMES, f"<tool_call>{TEXT}</tool_call>\n<tool_call>{TEXT}</tool_call>", [CALL, CALL]),
        (HERMES, f"<tool_call>[{TEXT}, {TEXT}]</tool_call> done", [CALL, CALL, ("text", " done")]),
        (
            HERMES,
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx\n</parameter>\n</function>\n"
            "</tool_call>",
            [CALL],
        ),
        (MISTRAL, f"[TOOL_CALLS] [{TEXT}]", [CALL]),
        (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": 1, "b": "x"}', [CALL]),
        (MISTRAL, '[TOOL_CALLS]add{"a": 1, "b": "x"}[TOOL_CALLS]add{"a": 1, "b": "x"}', [CALL, CALL]),
        (GRANITE, f"<|tool_call|>[{TEXT}]", [CALL]),
        (LLAMA3, '{"name": "add", "parameters": {"a": 1, "b": "x"}}', [CALL]),
        (LLAMA3, f"\n<|python_tag|>{TEXT}; {TEXT}", [("text", "\n"), CALL, CALL]),
        (
            DEEPSEEK,
            "I ask.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
            '{"a": 1, "b": "x"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            [("text", "I ask."), CALL],
        ),
        (
            DEEPSEEK,
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": "x"}<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>",
            [CALL],
        ),
        (
            LFM2,
            "<|tool_call_start|>[add(a=1, b='x'), add(a=1, b=\"x\")]<|tool_call_end|>Adding.",
            [CALL, CALL, ("text", "Adding.")],
        ),
        (LFM2, f"<|tool_call_start|>[{TEXT}]<|tool_call_end|>", [CALL]),
    ],
)
def test_calls_are_found(form: Any, said: str, wanted: list[tuple[str, Any]]) -> None:
    assert split(Segments(form), said) == wanted
    assert split(Segments(form), *said) == wanted  # letter by letter
    assert split(Segments(), said) == [("text", said)]  # without tools it is text


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (HERMES, "<tool_call>no JSON</tool_call>"),
        (HERMES, f"<tool_call>{TEXT}"),  # the context ended in the middle of a call: read as one, see below
        (HERMES, "a <tool_cal"),
        (HERMES, "<tool_call>[" * 40),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (MISTRAL, "[TOOL_CALLS] nothing"),
        (GRANITE, '<|tool_call|>[{"name": 1}]'),
        (LLAMA3, '{"answer": 42}'),
        (LLAMA3, 'See: {"name": "add", "parameters": {}}'),
        (DEEPSEEK, "<｜tool▁calls▁begin｜>x<｜tool▁calls▁end｜>"),
        (LFM2, "<|tool_call_start|>[add(1, b='x')]<|tool_call_end|>"),
        (LFM2, "<|tool_call_start|>[]<|tool_call_end|> none"),
    ],
)
def test_what_is_no_call_stays_text(form: Any, said: str) -> None:
    for pieces in ([said], list(said)):
        found = split(Segments(form), *pieces)
        if said == f"<tool_call>{TEXT}":
            assert found == [CALL]
        else:
            assert found == [("text", said)]


def test_thinking_is_apart() -> None:
    said = "<think>\nLet me see.\n</think>\n\nIt is 4."
    wanted = [("thinking", "Let me see.\n"), ("text", "It is 4.")]
    for pieces in ([said], list(said)):
        assert split(Segments(thinks=True), *pieces) == wanted
        assert split(Segments(thinking=True), *"".join(pieces).removeprefix("<think>\n")) == wanted
    # in the middle of an answer the marker is text, and so is it for a model that does not think
    assert split(Segments(thinks=True), "a <think>b") == [("text", "a <think>b")]
    assert split(Segments(), said) == [("text", said)]
    assert split(Segments(thinking=True), "cut of") == [("thinking", "cut of")]
    both = f"<think>a</think><tool_call>{TEXT}</tool_call>"
    assert split(Segments(HERMES, thinks=True), *both) == [("thinking", "a"), CALL]


def test_channels() -> None:
    said = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
        '<|constrain|>json<|message|>{"a": 1, "b": "x"}<|call|>'
    )
    final = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    for pieces in (lambda t: [t], list):
        assert split(Channels(), *pieces(said)) == [("thinking", "Hm."), CALL]
        assert split(Channels(), *pieces(said.removesuffix("<|call|>"))) == [("thinking", "Hm."), CALL]
        assert split(Channels(), *pieces(final)) == [("thinking", "Hm."), ("text", "It is 4.")]
        assert split(Channels(), *pieces("Just text")) == [("text", "Just text")]
        other = "<|start|>assistant to=functions.add<|channel|>commentary json<|message|>no JSON<|call|>"
        assert split(Channels(), *pieces(other)) == [("text", "no JSON")]


WORDS = st.sampled_from(
    [
        "a",
        " ",
        "\n",
        "{",
        "}",
        '"',
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        TEXT,
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "<|tool_call_start|>",
        "<|tool_call_end|>",
        "[add(a=1)]",
    ]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(words=st.lists(WORDS, max_size=8), form=st.sampled_from([None, *FORMATS]), thinks=st.booleans(), data=st.data())
def test_the_pieces_do_not_matter(words: list[str], form: Any, thinks: bool, data: st.DataObject) -> None:
    said = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=6)))
    pieces = [said[a:b] for a, b in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    whole = split(Segments(form, thinks=thinks), said)
    assert split(Segments(form, thinks=thinks), *pieces) == whole
    if not thinks and all(kind == "text" for kind, _ in whole):
        assert "".join(text for _, text in whole) == said


@pytest.mark.parametrize("name", ["hermes", "mistral", "deepseek", "granite", "llama3", "lfm2"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(call=CALLS)
def test_what_a_template_writes_is_read_back(name: str, call: dict[str, Any]) -> None:
    """The template's own rendering of a call, as the model learned to write it, is parsed into the call."""
    form = tool_format(template(name).text)
    assert form is not None
    asked = [{"role": "user", "content": "x"}]
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    before = template(name).render(asked, generation_prompt=True).removesuffix("<think>\n")
    after = template(name).render([*asked, *said])
    assert after.startswith(before)
    text = after[len(before) :]
    for end in ("<|im_end|>\n", "</s>", "<｜end▁of▁sentence｜>", "<|end_of_text|>\n", "<|eot_id|>"):
        text = text.removesuffix(end)
    function = call["function"]
    found = [(k, v) for k, v in split(Segments(form), text) if k == "call" or v.strip()]
    assert found == [("call", (function["name"], function["arguments"]))]


def test_a_call_is_told_as_json() -> None:
    assert HERMES is not None
    (call,) = HERMES.parse('{"name": "f", "arguments": {"é": [1, null]}}') or []
    assert call == ToolCall("f", '{"é": [1, null]}')
