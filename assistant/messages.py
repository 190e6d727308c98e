"""Checks messages and tools in OpenAI's form, and gives them as chat templates read them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moec.assistant.python_calls import written_calls
from moec.assistant.template import THINKING_KEYS
from moec.compiler.errors import ArtifactError, RunError

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 10_000
MAX_TOOLS = 1000
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
#: Keys of a message that templates may read beside role and content.
_TEXTS = ("name", "tool_call_id", *THINKING_KEYS)

Message = Mapping[str, Any]


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as templates read them; RunError, naming message and key, for anything that is no message.

    A content of text parts becomes one text; arguments of tool calls, which OpenAI gives as JSON text, become objects.
    A message that calls tools and says nothing has the content None.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RunError(
            "no messages", place="messages", remedy='give a list such as [{"role": "user", "content": "Hi"}]'
        )
    if len(messages) > MAX_MESSAGES:
        raise RunError(f"{len(messages)} messages", place="messages", remedy=f"give at most {MAX_MESSAGES}")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RunError("is no object", place=place, remedy='write {"role": ..., "content": ...}')
    role = message.get("role")
    if role not in ROLES:
        raise RunError(f"unknown role {_short(role)}", place=f"{place}.role", remedy=f"use one of {', '.join(ROLES)}")
    known = {"role", "content", "tool_calls", *_TEXTS}
    if unknown := [key for key, value in message.items() if key not in known and value not in (None, [], {}, "")]:
        raise RunError("is not known here", place=f"{place}.{_short(unknown[0])}", remedy="leave it out")
    found: dict[str, Any] = {"role": role, "content": _content(message.get("content"), f"{place}.content")}
    for key in _TEXTS:
        if (value := message.get(key)) is not None:
            found[key] = _text(value, f"{place}.{key}")
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant":
            raise RunError(f"a {role} message calls no tools", place=f"{place}.tool_calls", remedy="leave it out")
        if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
            raise RunError("is no list", place=f"{place}.tool_calls")
        found["tool_calls"] = [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
    elif found["content"] is None:
        raise RunError("has no content", place=place, remedy="give it a text")
    return found


def _content(content: Any, place: str) -> str | None:
    if content is None:
        return None
    if isinstance(content, str):
        return _text(content, place)
    if not isinstance(content, Sequence):
        raise RunError("is no text", place=place)
    texts = []
    for index, part in enumerate(content):
        where = f"{place}[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise RunError(f"a part of type {_short(kind)}", place=where, remedy="the model reads text parts only")
        texts.append(_text(part.get("text"), where))
    return "".join(texts)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RunError("is no text", place=place)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RunError("holds half a character", place=place, remedy="give it as UTF-8") from None
    return value


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RunError("has no function", place=place)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RunError(f"no name of a function: {_short(name)}", place=f"{place}.function.name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise RunError("is not JSON", place=f"{place}.function.arguments") from None
    if not isinstance(arguments, Mapping):
        raise RunError("is no object", place=f"{place}.function.arguments")
    found: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    if (id_ := call.get("id")) is not None:
        found["id"] = _text(id_, f"{place}.id")
    return found


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """Tool definitions in OpenAI's form; RunError, naming tool and key, for anything that is no definition."""
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise RunError("is no list", place="tools")
    if len(tools) > MAX_TOOLS:
        raise RunError(f"{len(tools)} tools", place="tools", remedy=f"give at most {MAX_TOOLS}")
    found, names = [], set()
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise RunError(
                "is no function", place=place, remedy='write {"type": "function", "function": {"name": ...}}'
            )
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            remedy = "use letters, digits, _, - and ."
            raise RunError(f"no name of a function: {_short(name)}", place=f"{place}.function.name", remedy=remedy)
        if name in names:
            raise RunError(f"a second tool {name}", place=f"{place}.function.name")
        names.add(name)
        if not isinstance(function.get("parameters", {}), Mapping):
            raise RunError("is no object", place=f"{place}.function.parameters", remedy="give a JSON Schema")
        found.append({"type": "function", "function": dict(function)})
    return found


def first_rendered(
    render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """The text of a conversation, and the form of it that the template takes.

    Templates differ in what they read of a message that calls tools: its content None or empty, its arguments as an
    object or (DeepSeek's) as the text of one. The first form that renders is taken.
    """
    fault: ArtifactError | None = None
    for given in _forms(messages):
        try:
            return render(given), given
        except ArtifactError as error:
            fault = fault or error
    assert fault is not None
    raise fault


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    yield messages
    if not any(message.get("tool_calls") for message in messages):
        return
    for empty, as_text in ((True, False), (False, True), (True, True)):
        found = []
        for message in messages:
            if calls := message.get("tool_calls"):
                content = "" if empty and message["content"] is None else message["content"]
                message = {
                    **message,
                    "content": content,
                    "tool_calls": [_arguments_as_text(c) if as_text else c for c in calls],
                }
            found.append(message)
        yield found


def calls_as_content(messages: list[dict[str, Any]], begin: str, end: str) -> list[dict[str, Any]]:
    """Messages whose calls stand in front of their contents, in Python's syntax between two markers: LFM2's templates
    write contents alone, and their models saw calls there."""
    found = []
    for message in messages:
        if calls := message.get("tool_calls"):
            written = written_calls([_name_and_arguments(call["function"]) for call in calls])
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["content"] = f"{begin}{written}{end}{message['content'] or ''}"
        found.append(message)
    return found


def _name_and_arguments(function: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    given = function["arguments"]
    return function["name"], json.loads(given) if isinstance(given, str) else given


def _arguments_as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return "".join(c if c.isprintable() else "?" for c in text[:40])
