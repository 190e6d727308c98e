"""Conversations with tools in the C interface against jinja's rendering of them, and what is no tool, call or turn."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from moec.assistant.assistant import Assistant
from moec.assistant.native_text import FILE, tables
from moec.assistant.probing import MARKERS, TEXTS
from moec.assistant.role_form import FILE as ROLES
from moec.assistant.role_form import RoleForm, role_form
from moec.assistant.template import ChatTemplate
from moec.assistant.tool_probes import conversation, definitions, random_text
from moec.compiler.artifact import Artifact
from moec.compiler.tokenizer import load_tokenizer
from tests.assistant.conversations import TOKENS, form_of, template
from tests.assistant.speaking import tokenizer
from tests.assistant.test_tool_form import REGULAR, tools_of
from tests.runtime import app
from tests.tiny import TinyModels, tiny_text

SPECIAL = ("<tool_call>", "</tool_call>", "<|eot_id|>", "[INST]", "<｜User｜>")


def opened_with(folder: Path, found: ChatTemplate, copy: Path, name: str = "") -> int:
    """An artifact with this chat template (a family's has a name), whose tokens are bytes and a few special ones."""
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text(found.text, "utf-8")
    (copy / "tokenizer_config.json").write_text(json.dumps(TOKENS), "utf-8")
    made = tokenizer()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    made.save(str(copy / "tokenizer.json"))
    form = form_of(name) if name else role_form(found)
    assert isinstance(form, RoleForm)
    (copy / ROLES).write_text(form.json(), "utf-8")
    (copy / FILE).write_bytes(tables(copy, load_tokenizer(copy / "tokenizer.json")))
    return app.open_artifact(copy)


def turns_of(messages: Sequence[dict[str, Any]]) -> list[app.Turn]:
    return [
        app.turn(
            message["role"],
            message["content"],
            [
                (call["function"]["name"], json.dumps(call["function"]["arguments"], indent=2))
                for call in message.get("tool_calls", ())
            ],
        )
        for message in messages
    ]


def info_of(artifact: int) -> app.Info:
    info = app.Info(size=ctypes.sizeof(app.Info))
    app.call("describe", artifact, ctypes.byref(info))
    return info


@pytest.mark.parametrize("name", sorted(REGULAR))
def test_conversations_with_tools_are_the_templates(name: str, tiny: TinyModels, tmp_path: Path) -> None:
    folder = tiny(tiny_text()) / "artifact"
    artifact = opened_with(folder, template(name), tmp_path / "copy", name)
    python = Assistant.of(Artifact.open(folder), tokenizer=tmp_path / "copy" / "tokenizer.json")
    python.template = template(name)
    form, drawn = tools_of(name), random.Random(name)
    assert info_of(artifact).has_tools == 1
    compared = 0
    for index in range(100):
        tools = definitions(drawn, form, drawn.randint(1, 5))
        texts = (*TEXTS, *MARKERS, *SPECIAL, *(random_text(drawn) for _ in range(10)))
        messages = conversation(drawn, form, tools, texts, system=True)
        if messages[0]["content"] == "":
            continue  # an empty system prompt is none: Python leaves it to the template
        if any(text in message["content"] for text in form.unless_contains for message in messages):
            with pytest.raises(app.AppError, match="differently; leave it out"):
                app.chat_with_tools(artifact, json.dumps(tools), turns_of(messages))
            continue
        raw = json.dumps(tools, ensure_ascii=index % 2 == 0, indent=index % 3 or None)
        ids = app.chat_with_tools(artifact, raw, turns_of(messages))
        assert app.detokenize(artifact, ids, app.SPECIAL) == form.render(messages, tools)
        # Python knows the place of a special token by a stand-in, which is sorted differently as a key
        if not form.tool_spelling.sorted or not any(s in key for tool in tools for key in _keys(tool) for s in SPECIAL):
            assert ids == python.chat_prompt(messages, tools=tools).ids
            compared += 1
    assert compared > (5 if form.tool_spelling.sorted else 40)
    app.call("close", artifact)


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [key for name, item in value.items() for key in (name, *_keys(item))]
    return [key for item in value for key in _keys(item)] if isinstance(value, list) else []


@pytest.fixture(scope="module")
def hermes(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> int:
    return opened_with(
        tiny(tiny_text()) / "artifact", template("hermes"), tmp_path_factory.mktemp("hermes") / "artifact", "hermes"
    )


def tool(parameters: str = "{}", name: str = '"f"') -> str:
    return f'[{{"type": "function", "function": {{"name": {name}, "parameters": {parameters}}}}}]'


ASKED = (app.turn("user", "x"),)


def shown(hermes: int, parameters: str) -> str:
    ids = app.chat_with_tools(hermes, tool(parameters), ASKED)
    text = app.detokenize(hermes, ids, app.SPECIAL).split("<tools>\n")[1].split("\n</tools>")[0]
    return text.split('"parameters": ', 1)[1][:-2]


def test_json_is_that_of_python(hermes: int) -> None:
    drawn = random.Random(3)
    floats = [struct.unpack("<d", drawn.randbytes(8))[0] for _ in range(3000)]
    floats += [2.0**n for n in range(-1074, 1024)] + [10.0**n for n in range(-30, 30)]
    numbers = [repr(number) for number in floats if number == number and abs(number) != float("inf")]
    numbers += [f"{number:.25e}" for number in floats[:200] if number == number and abs(number) != float("inf")]
    numbers += ["0", "-0", "-0.0", "0e0", "1E5", "1e+05", "123456789012345678901234567890", "-1", "1.50", "1e15",
                "1e16", "123456789012345680.0", "0.0001", "0.00001", "5e-324", "2.5e-324",
                "1.7976931348623157e308"]  # fmt: skip
    texts = [
        '{"numbers": [' + ", ".join(numbers) + "]}",
        '{"a": 1, "b": {"c": [ ], "d": { }}, "a": 2, "\\u00e9": '
        '"\\ud83d\\ude42\\/\\b\\f\\n\\r\\t\\u0000\\u001f\\u007f"}',
        '\n{ "x"\t:\r["<>&\'\\"\\\\", true ,false,null, "\u2028日本🙂"] } ',
        '{"deep": ' + "[" * 90 + "]" * 90 + "}",
    ]
    for text in texts:
        assert shown(hermes, text) == json.dumps(json.loads(text), ensure_ascii=False)


HALF = '{"a": "\\ud800"}'


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("", "tools: is not JSON, at byte 0"),
        ("nothing", "tools: is not JSON, at byte 0"),
        ("[", "tools: is not JSON, at byte 1"),
        ("{}", "tools: is no list"),
        ("[] x", "tools: is not JSON, at byte 3"),
        ("[1]", r"tools\[0\]: is no function"),
        ('[{"type": "retrieval", "function": {"name": "f"}}]', r"tools\[0\]: is no function"),
        ('[{"type": "function", "function": "f"}]', r"tools\[0\]: is no function"),
        ('[{"type": "function", "function": {}}]', r"tools\[0\]\.function\.name: no name"),
        (tool(name='"a b"'), r"tools\[0\]\.function\.name: no name"),
        (tool(name="7"), r"tools\[0\]\.function\.name: no name"),
        (tool(name=json.dumps("x" * 129)), r"tools\[0\]\.function\.name: no name"),
        (tool("[]"), r"tools\[0\]\.function\.parameters: is no object"),
        (tool()[:-1] + "," + tool()[1:], r"tools\[1\]\.function\.name: a second tool f"),
        (tool(HALF), "half a surrogate pair"),
        (tool(HALF.replace("d800", "dc00")), "half a surrogate pair"),
        (tool('{"a": "\\ud800\\ud800"}'), "half a surrogate pair"),
        (tool('{"a": "\\ud8"}'), "tools: is not JSON"),
        (tool('{"a": "\\x"}'), "tools: is not JSON"),
        (tool('{"a": "\n"}'), "tools: is not JSON"),
        (tool('{"a": NaN}'), "tools: is not JSON"),
        (tool('{"a": -Infinity}'), "tools: is not JSON"),
        (tool('{"a": 01}'), "tools: is not JSON"),
        (tool('{"a": 1.}'), "tools: is not JSON"),
        (tool('{"a": 1,}'), "tools: is not JSON"),
        (tool("{'a': 1}"), "tools: is not JSON"),
        (tool('{"a": 1e999}'), "a number out of range"),
        (tool('{"a": %s}' % ("9" * 5000)), "more than 4300 characters"),
        (tool('{"a": %s}' % ("[" * 100_000)), "more than 100 values inside each other"),
        (b'[{"type": "\xff"}]', "tools: is not UTF-8, at byte 11"),
        ("[" + ",".join(["{}"] * 10**6) + "]", "tools: more than 1 MB"),
        ("[" + ",".join(["{}"] * 1001) + "]", "tools: more than 1000 of them"),
        ("[" * 10**6, "more than 100 values inside each other"),
    ],
    ids=range(33),
)  # fmt: skip
def test_what_is_no_tool_is_named(hermes: int, tools: str | bytes, words: str) -> None:
    with pytest.raises(app.AppError, match=words) as caught:
        app.chat_with_tools(hermes, tools, ASKED)
    assert "\n" not in str(caught.value)


CALL = ("assistant", "", [("f", "{}")])


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([("user", "x"), ("user", "y")], r"turns\[1\]: after a system prompt"),
        ([("assistant", "x")], r"turns\[0\]: after"),
        ([("user", "x"), ("tool", "y")], r"turns\[1\]: after"),
        ([("user", "x"), ("system", "y")], r"turns\[1\]: after"),
        ([("robot", "x")], r"turns\[0\]: after"),
        ([("user", "x"), ("assistant", "y")], "turns: the last must be"),
        ([("user", "x"), CALL], "turns: the last must be"),
        ([("system", "x")], "turns: the last must be"),
        ([("user", "x"), CALL, ("user", "y")], r"turns\[2\]: after"),
        ([("user", "x", [("f", "{}")])], r"turns\[0\]\.calls: only a turn of the assistant"),
        ([("user", "x"), ("assistant", "", [("f g", "{}")])], r"turns\[1\]\.calls\[0\]\.name: no name"),
        (
            [("user", "x"), ("assistant", "", [("f", "{")])],
            r"turns\[1\]\.calls\[0\]\.arguments: is not JSON, at byte 1",
        ),
        ([("user", "x"), ("assistant", "", [("f", "[]")])], r"turns\[1\]\.calls\[0\]\.arguments: is no object"),
        ([("user", "x"), ("assistant", "</think>")], r"turns\[1\]: the chat template renders </think> differently"),
        ([("user", "x"), ("assistant", "", [("f", "{}")] * 1001)], r"turns\[1\]\.calls: NULL, or not 0 to 1000"),
        ([("user", None)], r"turns\[0\]\.content: NULL"),
        ([], "turns: NULL, or not 1 to 10000"),
    ],
)
def test_what_is_no_conversation_is_named(hermes: int, turns: list[Any], words: str) -> None:
    with pytest.raises(app.AppError, match=words):
        app.chat_with_tools(hermes, tool(), [app.turn(*turn) for turn in turns])


def test_turns_of_another_header_are_refused(hermes: int) -> None:
    bad = app.turn("user", "x")
    bad.size = 16
    with pytest.raises(app.AppError, match=r"turns\[0\]\.size is 16, not 40"):
        app.chat_with_tools(hermes, tool(), [bad])
    raw = app.turn("user", "x")
    raw.content = b"\xff"
    with pytest.raises(app.AppError, match=r"turns\[0\]\.content: is not UTF-8"):
        app.chat_with_tools(hermes, tool(), [raw])
    no_calls = app.turn("assistant", "x", [("f", "{}")])
    no_calls.calls = None
    with pytest.raises(app.AppError, match=r"turns\[1\]\.calls: NULL"):
        app.chat_with_tools(hermes, tool(), [ASKED[0], no_calls])


def test_without_tools_it_is_a_conversation_of_turns(hermes: int) -> None:
    turns = [("system", "Brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    wanted = app.chat(hermes, turns)
    for tools in (None, "[]"):
        assert app.chat_with_tools(hermes, tools, [app.turn(*turn) for turn in turns]) == wanted
        for calling in ([("user", "x"), CALL, ("tool", "y")], [("user", "x"), ("tool", "y")]):
            with pytest.raises(app.AppError, match=r"turns\[1\]: calls and what tools answer need the tools"):
                app.chat_with_tools(hermes, tools, [app.turn(*turn) for turn in calling])
    # no content, and no arguments, are empty ones
    given = [app.turn("user", "x"), app.turn("assistant", None, [("f", None)]), app.turn("tool", "y")]
    empty = [app.turn("user", "x"), app.turn("assistant", "", [("f", "{}")]), app.turn("tool", "y")]
    assert app.chat_with_tools(hermes, tool(), given) == app.chat_with_tools(hermes, tool(), empty)


def test_one_call_in_a_turn(tiny: TinyModels, tmp_path: Path) -> None:
    artifact = opened_with(tiny(tiny_text()) / "artifact", template("llama3"), tmp_path / "copy", "llama3")
    turns = [app.turn("user", "x"), app.turn("assistant", "", [("f", "{}")] * 2), app.turn("tool", "y")]
    with pytest.raises(app.AppError, match=r"turns\[1\]\.calls: the model's chat template takes one call"):
        app.chat_with_tools(artifact, tool(), turns)
    app.call("close", artifact)


def test_a_template_without_a_form_says_why(tiny: TinyModels, tmp_path: Path) -> None:
    numbered = template("hermes").text.replace("'\\n' + (tool | tojson)", "loop.index ~ (tool | tojson)")
    for index, (text, words) in enumerate((
        (template("chatml").text, "not with this model's chat template, since it renders no tools"),
        (numbered, "since it renders definitions of some tools differently"),
    )):  # fmt: skip
        artifact = opened_with(tiny(tiny_text()) / "artifact", ChatTemplate(text, TOKENS, "x"), tmp_path / str(index))
        assert (info_of(artifact).has_chat, info_of(artifact).has_tools) == (1, 0)
        assert app.chat_with_tools(artifact, None, ASKED) == app.chat(artifact, [("user", "x")])
        with pytest.raises(app.AppError, match=words) as caught:
            app.chat_with_tools(artifact, tool(), ASKED)
        assert "\n" not in str(caught.value)
        app.call("close", artifact)


def test_tables_of_an_older_version_have_no_tools(tiny: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    app.call("close", opened_with(tiny(tiny_text()) / "artifact", template("hermes"), folder, "hermes"))
    whole = json.loads((folder / ROLES).read_text("utf-8"))
    (folder / ROLES).write_text(json.dumps({k: v for k, v in whole.items() if k not in ("tools", "no_tools")}), "utf-8")
    (folder / FILE).write_bytes(tables(folder, load_tokenizer(folder / "tokenizer.json")))
    artifact = app.open_artifact(folder)
    with pytest.raises(app.AppError, match="tools: the artifact is older than their form; compile it again"):
        app.chat_with_tools(artifact, tool(), ASKED)
    app.call("close", artifact)
