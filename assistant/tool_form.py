"""Conversations with tools by a chat template of regular form, for apps that have no jinja.

A conversation is a sequence of items, and between two items stands a text that depends on their kinds alone:

    text = between["start>KIND"] + item + between["KIND>KIND"] + item + ... + between["KIND>end"]

    tool      a definition         system, user   contents
    reply     an answer that calls no tool        said   the content of a turn that also calls tools
    call      a call of a tool                    result   what a tool answered

The definitions stand before or behind the system prompt. A definition and a call are parts (a name, a JSON value) with
texts between them. `assistant/tool_probes.py` derives the form from a template and proves it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.assistant.json_spelling import Spelling

#: Kinds of items as `runtime/app/tool_form.h` numbers them, between the beginning and the end.
KINDS = ("start", "system", "tool", "user", "reply", "said", "call", "result", "end")
#: What an item may be made of, in the same way. A tool: itself, its function, or parts of that; a call: the last two.
PARTS = ("tool", "function", "parameters", "description", "name", "arguments")
#: How contents are written: as they are; without white space at both ends; without newlines at the beginning; as in a
#: JSON string, with letters beyond ASCII as they are or escaped.
WAYS = ("", "both", "newlines", "escaped", "escaped ascii")
#: When the content of a turn that calls tools is written: never, unless it is empty, unless it is white space.
SAYS = ("never", "not empty", "not blank")

Tools = Sequence[Mapping[str, Any]]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Pattern:
    """Parts of an item, as PARTS names them, and the texts between them."""

    parts: tuple[str, ...]
    texts: tuple[str, ...]

    def of(self, values: Mapping[str, str]) -> str:
        """The item whose parts have these texts."""
        return "".join(a + values[part] for a, part in zip(("", *self.texts), self.parts, strict=True))


@dataclass(frozen=True)
class ToolForm:
    """The parts of the module's equation.

    ways: how contents are written, by kind (WAYS). says: SAYS. said_last: what is said stands behind the calls.
    one_call: the template takes one call in a turn. unless_contains: the form does not hold for contents with these.
    """

    between: dict[str, str]
    tools_first: bool
    tool: Pattern
    tool_spelling: Spelling
    call: Pattern
    call_spelling: Spelling
    ways: dict[str, str]
    says: str
    said_last: bool
    one_call: bool
    unless_contains: tuple[str, ...] = ()

    def render(self, messages: Messages, tools: Tools) -> str:
        """The text of a conversation up to where the model's answer begins.

        messages, tools: as `checked_messages` and `checked_tools` return them. ValueError for a conversation that the
        form does not hold for.
        """
        text, last = "", "start"
        for kind, item in (*self._items(messages, tools), ("end", "")):
            if f"{last}>{kind}" not in self.between:
                raise ValueError(f"the form has no {kind} after {last}")
            text += self.between[f"{last}>{kind}"] + item
            last = kind
        return text

    def tool_text(self, tool: Mapping[str, Any]) -> str:
        """A definition."""
        function = tool["function"]
        values = {"tool": tool, "function": function, "parameters": function.get("parameters")}
        texts = {part: self.tool_spelling.of(value) for part, value in values.items()}
        return self.tool.of({**texts, "name": function["name"], "description": function.get("description", "")})

    def call_text(self, call: Mapping[str, Any]) -> str:
        """A call, as a message has it."""
        function = call["function"]
        return self.call.of({"name": function["name"], "arguments": self.call_spelling.of(function["arguments"])})

    def content(self, kind: str, text: str) -> str:
        """A content as the template writes it."""
        return written(text, self.ways.get(kind, ""))

    def _items(self, messages: Messages, tools: Tools) -> Iterator[tuple[str, str]]:
        turns = list(messages)
        definitions = [("tool", self.tool_text(tool)) for tool in tools]
        if self.tools_first:
            yield from definitions
        if turns and turns[0]["role"] == "system":
            yield "system", self.content("system", turns.pop(0)["content"])
        if not self.tools_first:
            yield from definitions
        for turn in turns:
            if turn.get("tool_calls"):
                yield from self._calls(turn["content"] or "", turn["tool_calls"])
                continue
            kind = {"user": "user", "assistant": "reply", "tool": "result"}[turn["role"]]
            yield kind, self.content(kind, turn["content"])

    def _calls(self, content: str, calls: Tools) -> Iterator[tuple[str, str]]:
        if self.one_call and len(calls) > 1:
            raise ValueError("the form has one call in a turn")
        counts = {"never": "", "not empty": content, "not blank": content.strip()}[self.says]
        said = [("said", self.content("said", content))] if counts else []
        if not self.said_last:
            yield from said
        yield from (("call", self.call_text(call)) for call in calls)
        if self.said_last:
            yield from said


def written(text: str, way: str) -> str:
    """A content in one of WAYS."""
    if way.startswith("escaped"):
        return json.dumps(text, ensure_ascii=way == "escaped ascii")[1:-1]
    return text.strip() if way == "both" else text.lstrip("\n") if way == "newlines" else text
