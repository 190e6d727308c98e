"""Conversations for tests: strategies that make them, and templates in the forms of the families that moec ships."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from moec.assistant.probing import Irregular
from moec.assistant.role_form import RoleForm, role_form
from moec.assistant.template import ChatTemplate

FOLDER = Path(__file__).parent / "templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

# what templates trip over: white space, quotes, braces, markup, markers of their own, letters beyond ASCII
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "Hi", "  a b \n", "<b>&'\"</b>", "{{ x }}", "</think>", "<|im_end|>", "日本 🙂", "a\\n"]
    ),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace").decode()),
)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["city", "n", "é"]), st.one_of(TEXTS, st.integers(), st.booleans(), st.none())
)
CALLS = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["weather", "add_2"]),
    ARGUMENTS,
)
TOOLS = st.sampled_from(["weather", "add_2"]).map(
    lambda name: {
        "type": "function",
        "function": {
            "name": name,
            "description": "What <it> does",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
)


def template(name: str) -> ChatTemplate:
    return ChatTemplate((FOLDER / f"{name}.jinja").read_text("utf-8"), TOKENS, f"{name}.jinja")


@cache
def form_of(name: str) -> RoleForm | str:
    """The form of a family's template, or why it has none; derived once."""
    try:
        return role_form(template(name))
    except Irregular as reason:
        return str(reason)


def plain_turns(texts: st.SearchStrategy[str] = TEXTS) -> st.SearchStrategy[list[dict[str, Any]]]:
    """A system prompt or none, then questions and answers in turn; the last is either."""

    def made(system: str | None, contents: list[str]) -> list[dict[str, Any]]:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        return turns if system is None else [{"role": "system", "content": system}, *turns]

    return st.builds(made, st.none() | texts, st.lists(texts, min_size=1, max_size=5))


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """As `plain_turns`, with calls, what tools answered, and thinking."""
    messages = draw(plain_turns())
    found: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant" and draw(st.booleans()):
            message = {**message, draw(st.sampled_from(["reasoning_content", "thinking"])): draw(TEXTS)}
        if message["role"] == "assistant" and draw(st.booleans()):
            found.append({**message, "tool_calls": draw(st.lists(CALLS, min_size=1, max_size=2))})
            found.append({"role": "tool", "content": draw(TEXTS)})
        found.append(message)
    return found
