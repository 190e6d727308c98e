"""Derives a `ToolForm` from a chat template's renderings of probes, and compares the two on generated conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moec.assistant.json_spelling import Spelling, spelling_in
from moec.assistant.probing import Irregular, Reading, markers_to_avoid, plain, rendered
from moec.assistant.template import ChatTemplate
from moec.assistant.tool_form import SAYS, WAYS, Pattern, ToolForm
from moec.compiler.errors import UserError

_CONVERSATIONS = 200
_USER, _AGAIN, _REPLY, _SYSTEM, _SAID, _RESULTS = "Qu1Q", "Qu2Q", "Qr1Q", "QsQ", "QcQ", ("Qt1Q", "Qt2Q")
_BLANKS = ("\n", " ", "\n x \n", "\nx", '"é"')  # contents that tell apart how contents are written

Messages = list[dict[str, Any]]


def tool_form(template: ChatTemplate) -> ToolForm:
    """The form of conversations with tools, proved; Irregular if the template has none."""
    if "tools" not in template.variables:
        raise Irregular("it renders no tools")
    try:
        form = _contents(template, _read(template))
    except UserError as error:
        raise Irregular(f"it does not render a conversation with tools: {error.message[:200]}") from None
    avoided = markers_to_avoid(lambda texts: _difference(template, form, texts))
    return replace(form, unless_contains=avoided)


# --- derivation -------------------------------------------------------------------------------------------------------


def _tool(name: str, description: str) -> dict[str, Any]:
    sizes = {"type": "array", "items": {"type": "string", "enum": [name + "1", "é", ""]}}
    parameters = {"type": "object", "properties": {"to": {}, "sizes": sizes}, "required": ["to"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_TOOLS = (_tool("Qf1Q", "Qd1Q"), _tool("Qf2Q", "Qd2Q"))


def _call(index: int) -> dict[str, Any]:
    arguments = {"to": f"é{index}", "at": [{"n": index, "a": None}, True]}
    return {"type": "function", "function": {"name": f"Qf{index + 1}Q", "arguments": arguments}}


_CALLS = (_call(0), _call(1))


def _calls(*calls: Mapping[str, Any], said: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": said, "tool_calls": list(calls)}


def _read(template: ChatTemplate) -> ToolForm:
    """The form, with contents as they are."""

    def shown(messages: Messages) -> str:
        return rendered(template, messages, _TOOLS)

    user, reply, again = plain([("user", _USER), ("assistant", _REPLY), ("user", _AGAIN)])
    first, second = plain([("tool", text) for text in _RESULTS])
    tool, tool_spelling = _pattern(shown([user]), [_tool_values(t) for t in _TOOLS], "tools")
    one = shown([user, _calls(_CALLS[0]), first])
    call, call_spelling = _pattern(one.partition(_USER)[2], [_call_values(_CALLS[0])], "calls")
    form = ToolForm({}, False, tool, tool_spelling, call, call_spelling, {}, "never", False, False)
    tools = [("tool", form.tool_text(t)) for t in _TOOLS]
    calls = [("call", form.call_text(c)) for c in _CALLS]
    said, results = ("said", _SAID), [("result", text) for text in _RESULTS]
    asked, told, more = ("user", _USER), ("reply", _REPLY), ("user", _AGAIN)

    reading = Reading()
    reading.read(one, [*tools, asked, calls[0], results[0]])
    try:
        two = shown([user, _calls(*_CALLS), first, second])
    except UserError:  # it takes one call in a turn
        form = replace(form, one_call=True)
        two = shown([user, _calls(_CALLS[0]), first, second])
    reading.read(two, [*tools, asked, *(calls[:1] if form.one_call else calls), *results])
    reading.read(shown([user, reply, again]), [*tools, asked, told, more])
    rest = [calls[0], results[0], calls[1], results[1], told, more]
    turns = [user, _calls(_CALLS[0]), first, _calls(_CALLS[1]), second, reply, again]
    reading.read(shown(turns), [*tools, asked, *rest])
    spoken = [user, _calls(_CALLS[0], said=_SAID), first, _calls(_CALLS[1], said=_SAID), second]
    text = shown(spoken)
    if _SAID in text:
        form = replace(form, says=SAYS[1], said_last=text.index(_SAID) > text.index(calls[0][1], text.index(_USER)))
        pairs = [[calls[i], said] if form.said_last else [said, calls[i]] for i in range(2)]
        reading.read(text, [*tools, asked, *pairs[0], results[0], *pairs[1], results[1]])
    try:
        text = shown([*plain([("system", _SYSTEM)]), user])
    except UserError:  # it refuses a system prompt
        return replace(form, between=reading.between)
    if _SYSTEM not in text:
        raise Irregular("it leaves out the system prompt where there are tools")
    form = replace(form, tools_first=text.index(_SYSTEM) > text.index(tools[0][1]))
    reading.read(
        text, [*tools, ("system", _SYSTEM), asked] if form.tools_first else [("system", _SYSTEM), *tools, asked]
    )
    return replace(form, between=reading.between)


def _tool_values(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    return {"tool": tool, "function": function, **{k: function[k] for k in ("parameters", "description", "name")}}


def _call_values(call: Mapping[str, Any]) -> dict[str, Any]:
    return dict(call["function"])


@dataclass(frozen=True)
class _Piece:
    """A part of a rendering: whose it is (-1: the template's), and what."""

    owner: int
    text: str


def _pattern(text: str, given: Sequence[Mapping[str, Any]], what: str) -> tuple[Pattern, Spelling]:
    """How a rendering writes items that have these values: the parts, and the spelling of the JSON among them."""
    wholes = [part for part in ("tool", "function", "parameters", "arguments") if part in given[0]]
    found = next(((part, s) for part in wholes if (s := spelling_in(text, given[0][part])) is not None), None)
    if found is None:
        raise Irregular(f"it does not write {what} as JSON")
    json_part, spelling = found
    pieces = [_Piece(-1, text)]
    for part in (json_part, "name", "description"):
        for owner, values in enumerate(given):
            if part in values:
                value = spelling.of(values[part]) if part == json_part else values[part]
                pieces = _cut(pieces, value, _Piece(owner, part))
    patterns = {_pattern_of(pieces, owner) for owner in range(len(given))}
    if len(patterns) > 1:
        raise Irregular(f"it writes one of the {what} differently from the next")
    return patterns.pop(), spelling


def _cut(pieces: Sequence[_Piece], value: str, piece: _Piece) -> list[_Piece]:
    found: list[_Piece] = []
    for given in pieces:
        parts = given.text.split(value) if given.owner < 0 else [given.text]
        for index, part in enumerate(parts):
            found += [piece] if index else []
            found.append(replace(given, text=part))
    return found


def _pattern_of(pieces: Sequence[_Piece], owner: int) -> Pattern:
    """The parts of an item from its first to its last; texts between them are the template's."""
    places = [i for i, piece in enumerate(pieces) if piece.owner == owner]
    inner = pieces[places[0] : places[-1] + 1] if places else []
    if not inner or any(piece.owner not in (-1, owner) for piece in inner):
        raise Irregular("it does not write tools one after the other")
    texts, parts = [""], []
    for piece in inner:
        if piece.owner < 0:
            texts[-1] += piece.text
        else:
            parts.append(piece.text)
            texts.append("")
    return Pattern(tuple(parts), tuple(texts[1:-1]))


def _contents(template: ChatTemplate, form: ToolForm) -> ToolForm:
    """The form with the ways in which it writes contents."""

    def equal(form: ToolForm, probes: Sequence[Messages]) -> bool:
        return all(_same(template, form, probe, _TOOLS[:1]) for probe in probes)

    user, again = plain([("user", _USER), ("user", _AGAIN)])
    result = {"role": "tool", "content": _RESULTS[0]}
    for kind in ("system", "user", "reply", "result"):
        probes = []
        for text in _BLANKS:
            turn = {"role": {"reply": "assistant", "result": "tool"}.get(kind, kind), "content": text}
            probe = {"system": [turn, user], "user": [turn], "reply": [user, turn, again]}
            probes.append(probe.get(kind, [user, _calls(_CALLS[0]), turn]))
        if kind == "system" and not any("system" in key for key in form.between):
            continue
        forms = [replace(form, ways={**form.ways, kind: way}) for way in WAYS]
        form = next((made for made in forms if equal(made, probes)), form)
    if form.says == "never":
        return form
    probes = [[user, _calls(_CALLS[0], said=text), result] for text in _BLANKS]
    forms = [replace(form, ways={**form.ways, "said": way}, says=says) for says in SAYS[1:] for way in WAYS]
    return next((made for made in forms if equal(made, probes)), form)


# --- proof ------------------------------------------------------------------------------------------------------------


def _same(template: ChatTemplate, form: ToolForm, messages: Messages, tools: Sequence[Mapping[str, Any]]) -> bool:
    try:
        wanted = rendered(template, messages, tools)
    except UserError as error:
        raise Irregular(f"it refuses a conversation with tools: {error.message[:200]}") from None
    try:
        return form.render(messages, tools) == wanted
    except ValueError as error:
        raise Irregular(str(error)) from None


def _difference(template: ChatTemplate, form: ToolForm, texts: Sequence[str]) -> str | None:
    """The contents of a conversation that template and form render differently; None if there is none."""
    for messages, tools in _conversations(form, texts):
        if not _same(template, form, messages, tools):
            if _same(template, form, messages, _TOOLS):
                raise Irregular("it renders definitions of some tools differently")
            if not _same(template, form, [{**m, "content": m["content"] and "c"} for m in messages], _TOOLS):
                raise Irregular("its rendering of calls or turns depends on their arguments, number or place")
            return " ".join(str(message["content"]) for message in messages)
    return None


def _conversations(form: ToolForm, texts: Sequence[str]) -> Iterator[tuple[Messages, list[dict[str, Any]]]]:
    """Conversations with tools: each text in each place, then random ones."""
    drawn = random.Random(2)
    system = any("system" in key for key in form.between)
    for text in texts:
        for place in range(6):
            contents = [text if i == place else f"c{i}" for i in range(6)]
            head = plain([("system", contents[5])]) if system else []
            turns = [
                *plain([("user", contents[0])]), _calls(_CALLS[0], said=contents[1]), *plain([("tool", contents[2])]),
                *plain([("assistant", contents[3]), ("user", contents[4])]),
            ]  # fmt: skip
            yield [*head, *turns], definitions(drawn, form, 1)
    for _ in range(_CONVERSATIONS):
        tools = definitions(drawn, form, drawn.randint(1, 5))
        yield conversation(drawn, form, tools, texts, system=system), tools


def conversation(
    drawn: random.Random,
    form: ToolForm,
    tools: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    *,
    system: bool,
) -> Messages:
    """Questions that are answered with and without calls; the last is not answered, or its tools have just spoken."""
    found = plain([("system", drawn.choice(texts))]) if system and drawn.random() < 0.5 else []
    for turn in range(turns := drawn.randint(1, 3)):
        found += plain([("user", drawn.choice(texts))])
        for _ in range(drawn.choice((0, 0, 1, 2))):
            calls = [_random_call(drawn, tools) for _ in range(1 if form.one_call else drawn.randint(1, 3))]
            found.append(_calls(*calls, said=drawn.choice(("", *texts))))
            found += plain([("tool", drawn.choice((*texts, '{"a": [1]}', ""))) for _ in calls])
        if turn + 1 < turns:
            found += plain([("assistant", drawn.choice(texts))])
    return found


def definitions(drawn: random.Random, form: ToolForm, count: int) -> list[dict[str, Any]]:
    """Tools of any kind that the form can write."""
    found = []
    for index in range(count):
        function: dict[str, Any] = {"name": drawn.choice(("get", "add-2", "a.b", "X", "n" * 100)) + f"_{index}"}
        keys = {
            "description": random_text(drawn),
            "parameters": {"type": "object", "properties": random_json(drawn, 3)},
        }
        for key in drawn.sample(tuple(keys), 2):
            if key in form.tool.parts or drawn.random() < 0.8:
                function[key] = keys[key]
        if drawn.random() < 0.3:
            function[drawn.choice(("strict", "returns", "é"))] = random_json(drawn, 2)
        found.append({"type": "function", "function": function})
    return found


def _random_call(drawn: random.Random, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    arguments = {random_text(drawn): random_json(drawn, 2) for _ in range(drawn.randint(0, 3))}
    return {"type": "function", "function": {"name": drawn.choice(tools)["function"]["name"], "arguments": arguments}}


def random_text(drawn: random.Random) -> str:
    """What JSON writes in several ways."""
    return "".join(drawn.choice(_SYLLABLES) for _ in range(drawn.randint(0, 6)))


_SYLLABLES = ("a", "the ", 'a "b" ', "\\", "\n", "<b>", "&", "'", "é", "日本", "🙂", "\x7f", "\x01", "\t", "/",
              "{{ x }}", "</think>", "<tool_call>", "\u2028", "0")  # fmt: skip


def random_json(drawn: random.Random, depth: int) -> Any:
    """Any value, an object where `depth` allows for one more often than anything else."""
    if depth > 0 and drawn.random() < 0.7:
        if drawn.random() < 0.3:
            return [random_json(drawn, depth - 1) for _ in range(drawn.randint(0, 3))]
        return {random_text(drawn): random_json(drawn, depth - 1) for _ in range(drawn.randint(0, 3))}
    numbers = (0, -7, 10**20, 0.5, -1.5e-7, 1e22, 123456.789)
    return drawn.choice((None, True, False, random_text(drawn), random_text(drawn), drawn.choice(numbers)))
