"""Chat templates: the text that transformers renders, and one line for every template that does harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moec.assistant import template as module
from moec.assistant.template import ChatTemplate
from moec.compiler.errors import ArtifactError, RunError, UserError
from tests.assistant.conversations import NAMES, TOOLS, template, turns

transformers = pytest.importorskip("transformers", reason="the independent party: pip install 'moec[transformers]'")
SLOW = [HealthCheck.too_slow]


def theirs(found: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """What transformers renders; None where the template refuses the conversation or fails on it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    prompt = options.pop("generation_prompt", False)
    variables = options.pop("variables", None) or {}
    try:
        (text,), _ = render_jinja_template(
            [messages], chat_template=found.text, add_generation_prompt=prompt, **options, **found.tokens, **variables
        )
    except Exception:
        return None
    return str(text)


def ours(found: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> str | None:
    try:
        return found.render(messages, **options)
    except UserError:
        return None


def test_every_family_has_its_form() -> None:
    assert {"chatml", "hermes", "llama3", "mistral", "deepseek", "granite", "harmony", "plain"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(messages=turns(), tools=st.none() | st.lists(TOOLS, max_size=2), prompt=st.booleans(), thinks=st.booleans())
def test_a_conversation_is_the_text_of_transformers(
    name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool, thinks: bool
) -> None:
    found = template(name)
    options = {"tools": tools, "generation_prompt": prompt, "variables": {"enable_thinking": thinks}}
    assert ours(found, messages, **options) == theirs(found, messages, **options)


@pytest.mark.parametrize("name", NAMES)
def test_usual_conversations_are_not_refused(name: str) -> None:
    """Two parties that both refuse agree about nothing."""
    asked = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "So"},
    ]
    for messages in (asked[:1], asked, [{"role": "system", "content": "Brief."}, *asked]):
        text = template(name).render(messages, generation_prompt=True)
        assert all(message["content"] in text for message in messages)


@pytest.mark.real_model
def test_the_real_models_template(smollm2: Path) -> None:
    found = ChatTemplate.of_folder(smollm2)
    assert found is not None
    assert "tools" not in found.variables
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)

    @settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
    @given(messages=turns(), prompt=st.booleans())
    def same(messages: list[dict[str, Any]], prompt: bool) -> None:
        text = ours(found, messages, generation_prompt=prompt)
        assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    same()


HOSTILE = {
    "syntax": ("{% for %}", "not a chat template: .*xpected"),
    "refuses": ("{{ raise_exception('no system role\nhere') }}", "refuses it: no system role"),
    "attributes": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered: .*unsafe"),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "cannot be rendered"),
    "attr filter": ("{{ (messages | attr('__class__')).mro() }}", "cannot be rendered"),
    "namespace": ("{% set n = namespace(__class__=1) %}", "cannot be rendered: a namespace cannot hold"),
    "mutates": ("{{ messages.append(1) }}", "cannot be rendered: .*append"),
    "loads a file": ("{% include '/etc/passwd' %}", "cannot be rendered: no loader"),
    "endless": ("{% macro f() %}{% for a in range(99999) %}{{ f2(f2) }}{% endfor %}{% endmacro %}"
                "{% macro f2(g) %}{% for b in range(99999) %}{% endfor %}{% endmacro %}{{ f() }}", "does not end"),
    "recursive": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered: .*recursion"),
    "long": ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "writes without end"),
    "huge": ("{{ 'x' * 99999999999 }}", "takes all memory"),
    "huge range": ("{% for a in range(99999999) %}{% endfor %}", "cannot be rendered: .*[Rr]ange"),
    "divides": ("{{ 1 / 0 }}", "cannot be rendered: division by zero"),
    "undefined": ("{{ messages[7].content.x }}", "cannot be rendered"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, what = HOSTILE[kind]
    monkeypatch.setattr(module, "SECONDS", 2.0)
    hostile = ChatTemplate(text, {}, "build/a/chat_template.jinja")
    for _ in range(2):  # its process may have been ended: the next call starts another
        with pytest.raises(UserError, match=what) as caught:
            hostile.render([{"role": "user", "content": "x"}])
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("build/a/chat_template.jinja: ")
    assert template("chatml").render([{"role": "user", "content": "x"}]).endswith("x<|im_end|>\n")


def test_a_refusal_is_the_conversations_fault_and_a_failure_the_templates() -> None:
    two = [{"role": "user", "content": "a"}] * 2
    with pytest.raises(
        RunError, match=r"mistral\.jinja: the chat template refuses it: Conversation roles must alternate"
    ):
        template("mistral").render(two)
    with pytest.raises(ArtifactError):
        ChatTemplate("{{ 1 / 0 }}", {}, "x").render(two)
    with pytest.raises(RunError, match="not JSON"):
        template("chatml").render([{"role": "user", "content": object()}])


def test_where_a_template_lies(tmp_path: Path) -> None:
    assert ChatTemplate.of_folder(tmp_path) is None
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "extra_special_tokens": {"image_token": "<img>"}}
    file = tmp_path / "tokenizer_config.json"

    def found(**more: Any) -> ChatTemplate | None:
        file.write_text(json.dumps({**config, **more}))
        return ChatTemplate.of_folder(tmp_path)

    assert found() is None
    inside = found(chat_template="{{ bos_token }}{{ image_token }}x")
    assert inside is not None
    assert (inside.render([{"role": "user", "content": ""}]), inside.place) == ("<s><img>x", str(file))
    named = found(chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert named is not None
    assert named.text == "d"
    for name in ([], {}, None, 1, True):  # what is no name is no template of that name
        assert found(chat_template=[{"name": name, "template": "t"}, "x", None]) is None
    (tmp_path / "chat_template.jinja").write_text("own{{ eos_token }}")
    beside = found(chat_template="x")
    assert beside is not None
    assert beside.render([{"role": "user", "content": ""}]) == "own</s>"
    (tmp_path / "given.jinja").write_text("given")
    given = ChatTemplate.of_folder(tmp_path, tmp_path / "given.jinja")
    assert given is not None
    assert given.text == "given"
    file.write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        ChatTemplate.of_folder(tmp_path)


def test_what_a_template_reads() -> None:
    assert "tools" in template("hermes").variables
    assert "tools" not in template("chatml").variables
