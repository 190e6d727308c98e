"""Forms of conversations with tools: equal to jinja's rendering, or said to be irregular."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from moec.assistant.json_spelling import SPELLINGS, Spelling, spelling_in
from moec.assistant.probing import MARKERS, TEXTS, Irregular, rendered
from moec.assistant.role_form import RoleForm, write_form
from moec.assistant.template import ChatTemplate
from moec.assistant.tool_form import Pattern, ToolForm
from moec.assistant.tool_probes import conversation, definitions, random_json, random_text, tool_form
from tests.assistant.conversations import NAMES, form_of, template
from tests.conftest import one_line

#: Families whose tools have a form. Mistral's stand before the last question, and GPT-OSS's template has the date.
REGULAR = {"deepseek", "granite", "hermes", "lfm2", "llama3", "qwen3"}


def tools_of(name: str) -> ToolForm:
    found = form_of(name)
    assert isinstance(found, RoleForm)
    assert found.tools is not None
    return found.tools


def form_in(text: str) -> ToolForm:
    return tool_form(ChatTemplate(text, {}, "x"))


def test_which_families_are_regular() -> None:
    assert {name for name in NAMES if getattr(form_of(name), "tools", None) is not None} == REGULAR


@pytest.mark.parametrize("name", sorted(REGULAR))
def test_the_form_is_the_template(name: str) -> None:
    """On other conversations than those that it was proved on."""
    form, drawn, compared = tools_of(name), random.Random(name), 0
    for _ in range(120):
        tools = definitions(drawn, form, drawn.randint(1, 5))
        texts = (*TEXTS, *MARKERS, *(random_text(drawn) for _ in range(20)))
        messages = conversation(drawn, form, tools, texts, system=drawn.random() < 0.5)
        if any(text in message["content"] for text in form.unless_contains for message in messages):
            continue
        if messages[0] == {"role": "system", "content": ""}:
            continue  # an empty system prompt is none: apps leave it out
        assert form.render(messages, tools) == rendered(template(name), messages, tools)
        compared += 1
    assert compared > 50


def test_what_a_form_says() -> None:
    hermes, llama3, lfm2 = (tools_of(name) for name in ("hermes", "llama3", "lfm2"))
    assert hermes.tool == Pattern(("tool",), ())
    assert hermes.call == Pattern(("name", "arguments"), ('", "arguments": ',))
    assert hermes.tool_spelling == hermes.call_spelling == Spelling()
    assert hermes.between["tool>tool"] == "\n"
    assert hermes.between["result>result"] == "\n</tool_response>\n<tool_response>\n"
    assert hermes.between["result>end"] == "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert (hermes.ways["said"], hermes.says, hermes.unless_contains) == ("newlines", "not empty", ("</think>",))
    assert llama3.tool_spelling == Spelling(indent=4, item=",")
    assert (llama3.tools_first, llama3.one_call, llama3.says) == (True, True, "never")
    assert (lfm2.said_last, lfm2.tools_first, lfm2.between["system>tool"]) == (
        *(True, False),
        "\nTools: <|tool_list_start|>[",
    )
    assert tools_of("deepseek").tool == Pattern(("name", "function"), ("\n",))
    assert tools_of("deepseek").tool_spelling.sorted


def test_spellings_differ_from_each_other() -> None:
    value = {"b": ["é", {"x": 1}], "a": {}}
    assert len({found.of(value) for found in SPELLINGS}) == len(SPELLINGS)
    assert all(spelling_in(f"<{found.of(value)}>", value) == found for found in SPELLINGS)
    assert spelling_in("{'b': 1}", value) is None


# a template of the usual kind, in parts that tests exchange
PARTS = {
    "tools": "{% for tool in tools or [] %}{{ tool | tojson }};{% endfor %}",
    "system": "{{ 'S:' ~ messages[0].content ~ '|' if messages[0].role == 'system' }}",
    "user": "U:{{ m.content }}|",
    "reply": "A:{{ m.content }}|",
    "call": "{% for c in m.tool_calls %}C:{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}|",
    "result": "R:{{ m.content }}|",
    "end": "A:",
}


def written(**changed: str) -> str:
    parts = {**PARTS, **changed}
    return (
        f"{parts['tools']}{parts['system']}{{% for m in messages %}}{{% if m.role == 'user' %}}{parts['user']}"
        f"{{% elif m.tool_calls %}}{parts['call']}{{% elif m.role == 'assistant' %}}{parts['reply']}"
        f"{{% elif m.role == 'tool' %}}{parts['result']}{{% endif %}}{{% endfor %}}"
        f"{{{{ '{parts['end']}' if add_generation_prompt }}}}"
    )


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, {"says": "never", "tools_first": True}),
        ({"result": "R:{{ m.content | tojson }}|"}, {"ways": {"result": "escaped"}}),
        ({"result": "R:{{ m.content | tojson(ensure_ascii=true) }}|"}, {"ways": {"result": "escaped ascii"}}),
        ({"tools": "{% for t in tools %}{{ t.function.name }}: {{ t.function.description }} "
                   "{{ t.function.parameters | tojson(indent=2, sort_keys=true) }}\n{% endfor %}"},
         {"tool": Pattern(("name", "description", "parameters"), (": ", " ")),
          "tool_spelling": Spelling(indent=2, item=",", sorted=True)}),
        ({"tools": "{{ tools | tojson(separators=(',', ':')) }}"}, {"tool_spelling": Spelling(item=",", key=":")}),
        ({"tools": "{{ tools | tojson(ensure_ascii=true) }}"}, {"tool_spelling": Spelling(ascii=True)}),
        ({"call": "{{ m.content.strip() ~ ' ' if m.content.strip() }}" + PARTS["call"]},
         {"says": "not blank", "ways": {"said": "both"}}),
        ({"call": PARTS["call"].replace("tojson", "tojson(indent=1)")},
         {"call_spelling": Spelling(indent=1, item=",")}),
        # arguments as the text of an object, which DeepSeek's templates want
        ({"call": PARTS["call"].replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments + '.' }}")},
         {"call_spelling": Spelling()}),
        ({"system": "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"}, {}),
    ],
)  # fmt: skip
def test_forms_that_are_known(changed: dict[str, str], wanted: dict[str, Any]) -> None:
    form = form_in(written(**changed))
    for key, value in wanted.items():
        found = getattr(form, key)
        assert found == value or (key == "ways" and value.items() <= found.items()), key


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"tools": ""}, "renders no tools"),
        ({"tools": "{{ tools }}"}, "does not write tools as JSON"),
        ({"tools": "{{ tools | tojson(indent=2) }}"}, "does not write tools as JSON"),
        ({"tools": "{{ tools | length }}{% for t in tools %}{{ t | tojson }}{% endfor %}"}, "differently"),
        ({"tools": "{% for t in tools %}{{ loop.index }}{{ t | tojson }}{% endfor %}"}, "tools differently"),
        ({"tools": "{{ (tools | tojson).replace('日', '?') }}"}, "definitions of some tools differently"),
        ({"call": "{{ m.tool_calls }}|"}, "does not write calls as JSON"),
        ({"call": "{% for c in m.tool_calls %}{{ loop.index }}{{ c.function.name }}"
                  "{{ c.function.arguments | tojson }}{% endfor %}|"}, "depends on their arguments, number or place"),
        ({"result": "R{{ loop.index }}:{{ m.content }}|"}, "is not always the same"),
        ({"result": "{{ raise_exception('no id') if not m.tool_call_id }}"}, "no id"),
        ({"system": ""}, "leaves out the system prompt"),
        ({"user": "U:{{ m.content | replace('é', 'e') }}|"}, "differently from other contents"),
        ({"reply": "A:{{ m.content }}{{ 'x' if messages | length > 9 }}|"}, "number or place"),
    ],
)  # fmt: skip
def test_what_is_irregular_is_said(changed: dict[str, str], why: str) -> None:
    with one_line(Irregular, why):
        form_in(written(**changed))


def test_what_compiling_says(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_text(written())
    assert write_form(tmp_path) == (("chat_roles.json",), ())
    found = json.loads((tmp_path / "chat_roles.json").read_text())
    assert (found["tools"]["between"]["user>end"], found["no_tools"]) == ("|A:", "")
    file.write_text(written(tools="{{ tools or '' }}"))
    files, notes = write_form(tmp_path)
    assert files == ("chat_roles.json",)
    assert notes == ("chat template: no tools for apps without jinja, since it does not write tools as JSON",)
    file.write_text(written(tools=""))  # which reads no tools: nothing to note
    assert write_form(tmp_path) == (("chat_roles.json",), ())
    found = json.loads((tmp_path / "chat_roles.json").read_text())
    assert (found["tools"], found["no_tools"]) == (None, "it renders no tools")


def test_a_conversation_outside_the_form() -> None:
    form = form_in(written(system="{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"))
    drawn = random.Random(1)
    tools = definitions(drawn, form, 1)
    with pytest.raises(ValueError, match="no system after start"):
        form.render([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], tools)
    llama3 = tools_of("llama3")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": random_json(drawn, 1)}}}
    with pytest.raises(ValueError, match="one call in a turn"):
        llama3.render([{"role": "assistant", "content": "", "tool_calls": [call, call]}], tools)
