"""How models write calls of tools: the markers around them, and what stands between, by family.

A format is chosen by the markers that the model's own chat template writes. What is between its markers is parsed into
calls; what is no call stays text, so that nothing that a model said is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moec.assistant.python_calls import python_calls


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is JSON text of an object, as OpenAI's interface gives it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """begin, end: what stands around calls; no end: all that follows. parse: calls, None where it is none.

    opens: other texts at which calls begin, if they are the first of the answer. marks: texts of the template, each of
    which tells the format; markers that are special tokens are kept when ids are decoded.
    """

    name: str
    marks: tuple[str, ...]
    begin: str
    end: str | None
    parse: Callable[[str], list[ToolCall] | None]
    opens: str | None = None


def call_of(value: Any) -> ToolCall | None:
    """A call written as an object with a name and its arguments, by whichever key.

    A name with a zero byte is none: an application in C would read another.
    """
    if not isinstance(value, dict):
        return None
    value = value["function"] if isinstance(value.get("function"), dict) else value
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the text of an object
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not name or "\0" in name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _json_calls(text: str) -> list[ToolCall] | None:
    """An object, a list of them, or several one behind the other, with white space, commas or semicolons between."""
    decoder, at, found = json.JSONDecoder(), 0, []
    while at < len(text):
        if text[at] in " \t\r\n,;":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        for item in value if isinstance(value, list) else [value]:
            call = call_of(item)
            if call is None:
                return None
            found.append(call)
    return found or None


def _hermes(text: str) -> list[ToolCall] | None:
    if "<function=" not in text:
        return _json_calls(text)
    found = []  # Qwen3-Coder's form
    for name, body in re.findall(r"<function=([^>\n\0]+)>(.*?)</function>", text, re.S):
        pairs = re.findall(r"<parameter=([^>\n\0]+)>\n?(.*?)\n?</parameter>", body, re.S)
        arguments = {key: _value(value) for key, value in pairs}
        found.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False)))
    return found or None


def _value(text: str) -> Any:
    """What a parameter's text stands for: JSON where it is some, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _mistral(text: str) -> list[ToolCall] | None:
    """A list of calls, or `name[ARGS]{...}` for each, with the marker between them."""
    if text.lstrip().startswith(("[", "{")):
        return _json_calls(text)
    found = []
    for part in text.split("[TOOL_CALLS]"):
        name, marker, arguments = part.partition("[ARGS]")
        if not marker:
            name, brace, rest = part.partition("{")
            arguments = brace + rest
        call = call_of({"name": re.sub(r"\[CALL_ID\].*", "", name, flags=re.S).strip(), "arguments": arguments.strip()})
        if call is None:
            return None
        found.append(call)
    return found


_DEEPSEEK = re.compile(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<old>[^\n]+)\n```json\n(?P<block>.*?)\n```"
    r"|(?P<name>[^<\n]+)<｜tool▁sep｜>(?P<arguments>.*?))<｜tool▁call▁end｜>\s*",
    re.S,
)


def _deepseek(text: str) -> list[ToolCall] | None:
    at, found = 0, []
    while at < len(text):
        match = _DEEPSEEK.match(text, at)
        if match is None:
            return None
        name, arguments = match["old"] or match["name"], match["block"] if match["old"] else match["arguments"]
        call = call_of({"name": name.strip(), "arguments": arguments})
        if call is None:
            return None
        found.append(call)
        at = match.end()
    return found or None


def _lfm2(text: str) -> list[ToolCall] | None:
    """Calls in Python's syntax (`assistant/python_calls.py`); else as JSON, which a system prompt may ask for."""
    calls = python_calls(text)
    if calls is None:
        return _json_calls(text)
    return [ToolCall(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]


#: LFM2's templates write the list of tools between markers, LFM2.5's behind the last of these alone.
_LFM2_MARKS = ("<|tool_call_start|>", "<|tool_list_start|>", "List of tools: ")
#: The first of which the template has a mark. Artifacts store indexes: a new one comes last.
FORMATS = (
    ToolFormat("deepseek", ("<｜tool▁calls▁begin｜>",), "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _deepseek),
    ToolFormat("mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]", None, _mistral),
    ToolFormat("granite", ("<|tool_call|>",), "<|tool_call|>", None, _json_calls),
    ToolFormat("hermes", ("<tool_call>",), "<tool_call>", "</tool_call>", _hermes),
    ToolFormat("llama3", ("ipython",), "<|python_tag|>", None, _json_calls, opens="{"),
    ToolFormat("lfm2", _LFM2_MARKS, "<|tool_call_start|>", "<|tool_call_end|>", _lfm2),
)


def tool_format(template: str) -> ToolFormat | None:
    """The format of a chat template's text; None where it writes no calls (or GPT-OSS's channels, see `segments`)."""
    return next((found for found in FORMATS if any(mark in template for mark in found.marks)), None)


def call_markers(form: ToolFormat | None) -> tuple[str, ...]:
    """Texts around and within the calls of a format, which are kept when ids are decoded."""
    if form is None:
        return ()
    inner = {
        "deepseek": ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
        "mistral": ("[ARGS]", "[CALL_ID]"),
    }
    return (form.begin, *([form.end] if form.end else []), *inner.get(form.name, ()))
