"""What chat templates are probed with: their rendering of a conversation, and texts that are known to confuse them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moec.assistant.messages import first_rendered
from moec.assistant.template import ChatTemplate

#: Texts at which some templates cut, or by which they tell kinds of contents.
MARKERS = ("</think>", "<think>", "<tool_call>", "</tool_response>", "<|im_end|>", "[INST]")
TEXTS = ("Hi", "What is it?", "a\nb", "  in spaces \n", "\n", "{{ x }}{% y %}", "\"quoted\" 'twice' \\n",
         "日本語 🙂 é", "<b>&amp;</b>", "x" * 300,
         "1. a\n2. b\n\n```py\nprint()\n```", "user", "assistant: yes")  # fmt: skip


class Irregular(Exception):
    """Why a template has no regular form, in one line."""


def rendered(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """A conversation up to where the model's answer begins, as `Assistant` renders it."""
    return first_rendered(
        lambda given: template.render(given, tools=tools, generation_prompt=True), [dict(m) for m in messages]
    )[0]


def plain(turns: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Messages from roles and contents."""
    return [{"role": role, "content": content} for role, content in turns]


def markers_to_avoid(differing: Callable[[tuple[str, ...]], str | None]) -> tuple[str, ...]:
    """The MARKERS without which a form is the template.

    differing: the contents of a conversation of given texts that form and template render differently; None if there is
    none. Irregular where they differ on other texts.
    """
    texts: tuple[str, ...] = (*TEXTS, *MARKERS)
    for _ in range(len(MARKERS) + 1):
        found = differing(texts)
        if found is None:
            return tuple(marker for marker in MARKERS if marker not in texts)
        marker = next((m for m in MARKERS if m in texts and m in found), None)
        if marker is None:
            raise Irregular(f"it renders {found[:80]!r} differently from other contents")
        texts = tuple(text for text in texts if text != marker)
    raise Irregular("its rendering depends on the contents")


class Reading:
    """Texts between items, of renderings whose items are known."""

    def __init__(self) -> None:
        self.between: dict[str, str] = {}

    def read(self, text: str, items: Sequence[tuple[str, str]]) -> None:
        at, last = 0, "start"
        for kind, item in (*items, ("end", "")):
            found = text.find(item, at) if kind != "end" else len(text)
            if found < 0:
                raise Irregular(f"it renders a {_NAMES[kind]} differently in another place")
            if self.between.setdefault(f"{last}>{kind}", text[at:found]) != text[at:found]:
                raise Irregular(f"what stands between {_NAMES[last]} and {_NAMES[kind]} is not always the same")
            at, last = found + len(item), kind


_NAMES = {
    "start": "the beginning", "system": "system prompt", "tool": "tool", "user": "question", "reply": "answer",
    "said": "text before a call", "call": "call", "result": "result of a tool", "end": "the answer to come",
}  # fmt: skip
