"""A chat template of regular form as prefixes and suffixes by role, for apps that have no jinja.

    text = (before_system + system + after_system   or   begin, without a system prompt)
         + before[role] + content + after[role]     for each turn; user and model alternate, the user begins and ends
         + answer

The form is derived from a few probe conversations and then checked on hundreds of generated ones, with contents that
are known to confuse templates. A template that renders one of them differently is not regular, and the reason is
reported; single texts that make a difference (such as `</think>`, at which some templates cut) are listed in
`unless_contains`. Conversations with tools have a form of their own (`assistant/tool_form.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moec.assistant.probing import Irregular, Reading, markers_to_avoid, plain, rendered
from moec.assistant.template import ChatTemplate
from moec.assistant.tool_form import ToolForm, written
from moec.assistant.tool_probes import tool_form
from moec.compiler.errors import UserError

FILE = "chat_roles.json"
_CONVERSATIONS = 200
_WAYS = ("", "both", "newlines")


@dataclass(frozen=True)
class RoleForm:
    """The parts of the module's equation. trims: what the template strips from contents of a role: `both`: white space
    at both ends; `newlines`: newlines at the beginning. tools: the form of conversations with tools, None where there
    is none; `no_tools` then says why."""

    begin: str
    before_system: str | None
    after_system: str | None
    before: dict[str, str]
    after: dict[str, str]
    answer: str
    trims: dict[str, str] = field(default_factory=dict)
    unless_contains: tuple[str, ...] = ()
    tools: ToolForm | None = None
    no_tools: str = ""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text of (role, content) pairs, the last the user's, up to where the model's answer begins; ValueError for
        a system prompt if the form has none."""
        text, turns = self.begin, list(messages)
        if turns and turns[0][0] == "system":
            if self.before_system is None or self.after_system is None:
                raise ValueError("the form has no system prompt")
            text = self.before_system + self._content(*turns.pop(0)) + self.after_system
        for role, content in turns:
            text += self.before[role] + self._content(role, content) + self.after[role]
        return text + self.answer

    def json(self) -> str:
        """The content of `chat_roles.json`."""
        return json.dumps({"format": 1, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    def _content(self, role: str, content: str) -> str:
        return written(content, self.trims.get(role, ""))


def role_form(template: ChatTemplate) -> RoleForm:
    """The form of a template, checked; Irregular if it has none."""
    if "strftime_now" in template.text:
        raise Irregular("it contains the date")
    form = _read(template)
    avoided = markers_to_avoid(lambda texts: _difference(template, form, texts))
    form = replace(form, unless_contains=avoided)
    try:
        return replace(form, tools=tool_form(template))
    except Irregular as reason:
        return replace(form, no_tools=str(reason))


def write_form(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the form of a model's template beside it. Returns the names of files written, and notes for the user."""
    try:
        template = ChatTemplate.of_folder(folder)
        if template is None:
            return (), ()
        form = role_form(template)
        reads_tools = "tools" in template.variables
    except Irregular as reason:
        return (), (f"chat template: no prefixes and suffixes for apps without jinja, since {reason}",)
    except UserError as error:
        return (), (f"chat template: {error.message}",)
    (folder / FILE).write_text(form.json(), "utf-8")
    if form.tools is None and reads_tools:
        return (FILE,), (f"chat template: no tools for apps without jinja, since {form.no_tools}",)
    return (FILE,), ()


def _read(template: ChatTemplate) -> RoleForm:
    """The form, derived from renderings of probes."""
    user, reply, again, system = "Qu1Q", "Qr1Q", "Qu2Q", "QsQ"
    reading = Reading()

    def read(*turns: tuple[str, str]) -> None:
        text = rendered(template, plain([({"reply": "assistant"}.get(kind, kind), content) for kind, content in turns]))
        for _, content in turns:
            if text.count(content) != 1:
                raise Irregular(f"it renders a content {text.count(content)} times")
        reading.read(text, turns)

    read(("user", user))
    read(("user", user), ("reply", reply), ("user", again))
    read(("user", user), ("reply", reply), ("user", again), ("reply", "Qr2Q"), ("user", "Qu3Q"))
    heads = ["start>user"]
    try:
        read(("system", system), ("user", user))
        heads.append("system>user")
    except UserError:  # it refuses a system prompt
        pass
    between = reading.between
    after_user = _hint(template, ("user", user))
    if not all(between[key].startswith(after_user) for key in ("user>reply", "user>end")):
        after_user = _beginning([between["user>reply"], between["user>end"]])
    before_user = between["reply>user"].removeprefix(_hint(template, ("user", user), ("assistant", reply)))
    if not all(between[key].endswith(before_user) for key in heads):
        ends = [between[key][::-1] for key in (*heads, "reply>user")]
        before_user = _beginning(ends)[::-1]
    form = RoleForm(
        begin=between["start>user"].removesuffix(before_user),
        before_system=between.get("start>system"),
        after_system=between["system>user"].removesuffix(before_user) if "system>user" in between else None,
        before={"user": before_user, "assistant": between["user>reply"].removeprefix(after_user)},
        after={"user": after_user, "assistant": between["reply>user"].removesuffix(before_user)},
        answer=between["user>end"].removeprefix(after_user),
    )
    probes = {"user": [("user", "\n x \n")], "assistant": [("user", user), ("assistant", "\n x \n"), ("user", again)]}
    if form.before_system is not None:
        probes["system"] = [("system", "\n x \n"), ("user", user)]
    for role, turns in probes.items():
        text = rendered(template, plain(turns))
        forms = (replace(form, trims={**form.trims, role: way}) for way in _WAYS)
        found = next((made for made in forms if made.render(turns) == text), form)
        form = found if found.trims.get(role) else form
    return form


def _beginning(texts: Sequence[str]) -> str:
    """The longest text that all of these begin with."""
    shortest = min(texts, key=len)
    same = (i for i in range(len(shortest), 0, -1) if all(text.startswith(shortest[:i]) for text in texts))
    return shortest[: next(same, 0)]


def _hint(template: ChatTemplate, *turns: tuple[str, str]) -> str:
    """What a template writes behind the last of some turns where no answer is to follow; empty if it refuses that."""
    messages: list[dict[str, Any]] = plain(turns)
    try:
        return template.render(messages).partition(turns[-1][1])[2]
    except UserError:
        return ""


def _difference(template: ChatTemplate, form: RoleForm, texts: Sequence[str]) -> str | None:
    """The contents of a conversation that template and form render differently; None if there is none."""
    for turns in _conversations(texts, system=form.before_system is not None):
        try:
            theirs = rendered(template, plain(turns))
        except UserError as error:
            raise Irregular(f"it refuses a conversation of turns: {error.message[:200]}") from None
        if theirs != form.render(turns):
            return " ".join(content for _, content in turns)
    return None


def _conversations(texts: Sequence[str], *, system: bool) -> Iterator[list[tuple[str, str]]]:
    """Turns, the last a question: each text in each role, then random conversations."""
    roles = ("user", "assistant")
    for text in texts:
        for place in range(3 + system):
            turns = [("user", "q"), ("assistant", "a"), ("user", "r")]
            if place == 3:
                turns.insert(0, ("system", text))
            else:
                turns[place] = (turns[place][0], text)
            yield turns
    drawn = random.Random(1)
    for _ in range(_CONVERSATIONS):
        turns = [(roles[i % 2], drawn.choice(texts)) for i in range(drawn.randrange(1, 9, 2))]
        if system and drawn.random() < 0.5:
            turns.insert(0, ("system", drawn.choice(texts)))
        yield turns
