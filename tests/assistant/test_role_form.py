"""Templates as prefixes and suffixes: equal to jinja's rendering on conversations, or said to be irregular."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from moec.assistant.role_form import Irregular, RoleForm, role_form, write_form
from moec.assistant.template import ChatTemplate
from tests.assistant import conversations
from tests.assistant.conversations import NAMES, plain_turns, template

REGULAR = {"chatml", "hermes", "llama3", "granite", "deepseek", "lfm2", "plain", "qwen3"}


def form_of(name: str) -> RoleForm:
    found = conversations.form_of(name)
    assert isinstance(found, RoleForm)
    return found


def test_which_families_are_regular() -> None:
    assert {name for name in NAMES if isinstance(conversations.form_of(name), RoleForm)} == REGULAR


@pytest.mark.parametrize("name", sorted(REGULAR))
def test_the_form_is_the_template(name: str) -> None:
    """On other conversations than those that it was proved on."""
    found = form_of(name)
    rendered = template(name)

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(messages=plain_turns())
    def same(messages: list[dict[str, Any]]) -> None:
        if messages[-1]["role"] != "user":
            messages = messages[:-1]  # a question is what an answer follows
        pairs = [(m["role"], m["content"]) for m in messages]
        if any(text in content for text in found.unless_contains for _, content in pairs):
            return
        if pairs[0][0] == "system" and not pairs[0][1]:
            return  # an empty system prompt is none: apps leave it out
        assert found.render(pairs) == rendered.render(messages, generation_prompt=True)

    same()


def test_what_a_form_says() -> None:
    assert form_of("chatml") == RoleForm(
        begin="<|im_start|>system\nYou are a test.<|im_end|>\n",
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>\n",
        before={"user": "<|im_start|>user\n", "assistant": "<|im_start|>assistant\n"},
        after={"user": "<|im_end|>\n", "assistant": "<|im_end|>\n"},
        answer="<|im_start|>assistant\n",
        no_tools="it renders no tools",
    )
    assert json.loads(form_of("chatml").json())["before"]["user"] == "<|im_start|>user\n"
    llama3, hermes = form_of("llama3"), form_of("hermes")
    assert llama3.trims == {"system": "both", "user": "both", "assistant": "both"}
    assert hermes.trims == {"assistant": "newlines"}
    assert hermes.unless_contains == ("</think>",)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", "contains the date"),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}|{% endfor %}",
         "between question and answer is not always the same"),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.content }}|{% endfor %}", "a content 2 times"),
        ("{% for m in messages %}{{ m.role }}{{ m.content | upper }}|{% endfor %}", "a content 0 times"),
        ("{{ messages[-1].content }}", "a content 0 times"),
        ("{% for m in messages %}{{ m.role }}:{{ m.content | replace('é', 'e') }}|{% endfor %}",
         "differently from other"),
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
         "{{ messages | length if messages | length > 5 }}",
         "differently from other"),
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.content == '\n' %}{{ raise_exception('empty') }}"
         "{% endif %}|{% endfor %}", "refuses a conversation of turns"),
    ],
)  # fmt: skip
def test_what_is_irregular_is_said(text: str, why: str) -> None:
    with pytest.raises(Irregular, match=why):
        role_form(ChatTemplate(text, {}, "x"))


def test_what_compiling_writes(tmp_path: Path) -> None:
    assert write_form(tmp_path) == ((), ())
    file = tmp_path / "chat_template.jinja"
    file.write_text(template("chatml").text)
    assert write_form(tmp_path) == (("chat_roles.json",), ())
    found = json.loads((tmp_path / "chat_roles.json").read_text())
    assert (found["format"], found["answer"]) == (1, "<|im_start|>assistant\n")
    for text, why in (("{{ strftime_now('%Y') }}", "since it contains the date"), ("{% for %}", "not a chat template")):
        file.write_text(text)
        files, (note,) = write_form(tmp_path)
        assert files == ()
        assert why in note


@pytest.mark.real_model
def test_the_real_models_template(smollm2: Path) -> None:
    found = ChatTemplate.of_folder(smollm2)
    assert found is not None
    assert role_form(found).answer == "<|im_start|>assistant\n"
