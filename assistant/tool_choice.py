"""Answers that must call a tool: a grammar of the model family's calls, with arguments by the tools' schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moec.assistant.python_calls import KEY
from moec.assistant.structured import JSON_SPACING, Format
from moec.assistant.tool_formats import ToolFormat
from moec.compiler.errors import RunError

PLACE = "tool_choice"
_MOST_CALLS = 16  # of one answer: a small model may otherwise call without end
_JSON_CALL = ('{"name": ', ', "arguments": ', "}")
#: name of a `ToolFormat` -> the texts before a name, between it and the arguments, and after them; then the texts
#: before a call, after one, and between two.
_CALLS: dict[str, tuple[tuple[str, str, str], str, str, str]] = {
    "hermes": (_JSON_CALL, "<tool_call>\n", "\n</tool_call>", "\n"),
    "granite": (_JSON_CALL, "", "", ", "),
    "mistral": (_JSON_CALL, "", "", ", "),
    "llama3": (('{"name": ', ', "parameters": ', "}"), "", "", ""),
}
#: the texts before and after all calls
_AROUND = {
    "granite": ("<|tool_call|>[", "]"),
    "mistral": ("[TOOL_CALLS][", "]"),
    "lfm2": ("<|tool_call_start|>[", "]<|tool_call_end|>"),
}
#: Keys of a tool's schema that its arguments satisfy if each of them satisfies its own schema, and those that are there
#: must be. What others say of the arguments together cannot be told of one behind the other.
_SINGLY = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "title",
           "description"}  # fmt: skip


def call_format(
    form: ToolFormat | None,
    template: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    only: str | None = None,
    several: bool = True,
    special: Mapping[int, str],
) -> Format:
    """The format of an answer that calls one of `tools`, or the one named `only`, and contains nothing else.

    tools: as `checked_tools` returns them. several: allow up to 16 calls, if the family can write more than one.
    special: texts of the special tokens by id. RunError if there is no grammar for the calls of this template, or no
    tool is named `only`.
    """
    if form is None or form.name not in (*_CALLS, "lfm2") or (form.name == "hermes" and "<function=" in template):
        what = f"the calls of this model's chat template ({'unknown' if form is None else form.name}) cannot be forced"
        raise RunError(what, place=PLACE, remedy="use auto or none")
    functions = [tool["function"] for tool in tools]
    chosen = [f for f in functions if only is None or f["name"] == only]
    if not chosen:
        raise RunError(f"no tool named {only}", place=PLACE, remedy=f"one of {', '.join(f['name'] for f in functions)}")
    ids = {text: id_ for id_, text in special.items() if text}
    (begin, middle, end), before, behind, between = _CALLS.get(form.name, (("", "", ""), "", "", ", "))
    rules = []
    for index, function in enumerate(chosen):
        if form.name == "lfm2":
            rules += _keyword_rules(index, function, ids)
            continue
        name = json.dumps(function["name"])
        rules.append(f"c{index}: {_terms(before + begin + name + middle, ids)} a{index} {_terms(end + behind, ids)}")
        schema = {**(function.get("parameters") or {}), "type": "object"}
        rules.append(f"a{index}: %json {json.dumps({**schema, 'x-guidance': JSON_SPACING})}")
    calls = "call" if not several or not between else f"call ({_terms(between, ids)} call){{0,{_MOST_CALLS - 1}}}"
    opening, closing = _AROUND.get(form.name, ("", ""))
    start = " ".join(part for part in (_terms(opening, ids), calls, _terms(closing, ids)) if part)
    rules = [f"start: {start}", f"call: {' | '.join(f'c{i}' for i in range(len(chosen)))}", *rules]
    return replace(Format("grammar", "\n".join(rules)), place=PLACE)


def _keyword_rules(index: int, function: Mapping[str, Any], ids: Mapping[str, int]) -> list[str]:
    """Rules of a call in Python's syntax: keywords in the order of the schema's properties, their values as JSON.

    `f{i}` are the keywords from the i-th on where none was written yet, `r{i}` those behind a written one.
    """
    schema = function.get("parameters") or {}
    properties, needed = schema.get("properties") or {}, schema.get("required") or []
    lists = isinstance(properties, Mapping) and isinstance(needed, list) and all(isinstance(key, str) for key in needed)
    keys = list(properties) if lists else []
    wrong = sorted(schema.keys() - _SINGLY) + [key for key in keys if not KEY.fullmatch(str(key))]
    if wrong or not lists or not all(key in properties for key in needed):
        what = f"the arguments of {function['name']} cannot be forced in this model's form of calls"
        raise RunError(f"{what}{f': {wrong[0]}' if wrong else ''}", place=PLACE, remedy="use auto or none")
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    last, name = len(properties), function["name"]
    rules = [f"c{index}: {_terms(name + '(', ids)} f{index}x0 {_terms(')', ids)}"]
    for at, (key, of) in enumerate(properties.items()):
        value = {**shared, **of} if isinstance(of, Mapping) else of
        if isinstance(value, dict):
            value["x-guidance"] = JSON_SPACING
        one = f"k{index}x{at} r{index}x{at + 1}"
        behind = f"{_terms(', ', ids)} {one}"
        rules += [
            f"k{index}x{at}: {_terms(key + '=', ids)} v{index}x{at}",
            f"v{index}x{at}: %json {json.dumps(value)}",
            f"f{index}x{at}: {one}" + ("" if key in needed else f" | f{index}x{at + 1}"),
            f"r{index}x{at}: {behind}" + ("" if key in needed else f" | r{index}x{at + 1}"),
        ]
    return [*rules, f'f{index}x{last}: ""', f'r{index}x{last}: ""']


def _terms(text: str, ids: Mapping[str, int]) -> str:
    """A text as terms of the grammar: special tokens by their ids, the text between them quoted."""
    if not text:
        return ""
    for marker in sorted(ids, key=len, reverse=True):
        before, found, behind = text.partition(marker)
        if found:
            return " ".join(part for part in (_terms(before, ids), f"<[{ids[marker]}]>", _terms(behind, ids)) if part)
    return json.dumps(text, ensure_ascii=False)
