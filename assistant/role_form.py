"""A chat template of regular form as prefixes and suffixes by role, for apps that have no jinja.

    text = (before_system + system + after_system   or   begin, without a system prompt)
         + before[role] + content + after[role]     for each turn; user and model alternate
         + answer                                   where the model's answer is to follow

The form is derived from a few probe conversations and then checked on hundreds of generated ones, with contents that
are known to confuse templates. A template that renders one of them differently is not regular, and the reason is
reported; single texts that make a difference (such as `</think>`, at which some templates cut) are listed in
`unless_contains`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moec.assistant.template import ChatTemplate
from moec.compiler.errors import UserError

FILE = "chat_roles.json"
_CONVERSATIONS = 200
_MARKERS = ("</think>", "<think>", "<tool_call>", "</tool_response>", "<|im_end|>", "[INST]")
_TEXTS = ("Hi", "What is it?", "a\nb", "  in spaces \n", "\n", "{{ x }}{% y %}", "\"quoted\" 'twice' \\n",
          "日本語 🙂 é", "<b>&amp;</b>", "x" * 300,
          "1. a\n2. b\n\n```py\nprint()\n```", "user", "assistant: yes")  # fmt: skip


@dataclass(frozen=True)
class RoleForm:
    """The parts of the module's equation. trims: what the template strips from contents of a role: `both`: white space
    at both ends; `newlines`: newlines at the beginning."""

    begin: str
    before_system: str | None
    after_system: str | None
    before: dict[str, str]
    after: dict[str, str]
    answer: str
    trims: dict[str, str] = field(default_factory=dict)
    unless_contains: tuple[str, ...] = ()

    def render(self, messages: Sequence[tuple[str, str]], *, generation_prompt: bool = False) -> str:
        """The text of (role, content) pairs; ValueError for a system prompt if the form has none."""
        text, turns = self.begin, list(messages)
        if turns and turns[0][0] == "system":
            if self.before_system is None or self.after_system is None:
                raise ValueError("the form has no system prompt")
            text = self.before_system + self._content(*turns.pop(0)) + self.after_system
        for role, content in turns:
            text += self.before[role] + self._content(role, content) + self.after[role]
        return text + self.answer if generation_prompt else text

    def json(self) -> str:
        """The content of `chat_roles.json`."""
        return json.dumps({"format": 1, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    def _content(self, role: str, content: str) -> str:
        trim = self.trims.get(role)
        return content.strip() if trim == "both" else content.lstrip("\n") if trim == "newlines" else content


class Irregular(Exception):
    """Why a template is not of this form, in one line."""


def role_form(template: ChatTemplate) -> RoleForm:
    """The form of a template, checked; Irregular if it has none."""
    if "strftime_now" in template.text:
        raise Irregular("it contains the date")
    form = _read(template)
    texts: tuple[str, ...] = (*_TEXTS, *_MARKERS)
    for _ in range(len(_MARKERS) + 1):
        differing = _difference(template, form, texts)
        if differing is None:
            return RoleForm(**{**asdict(form), "unless_contains": tuple(m for m in _MARKERS if m not in texts)})
        marker = next((m for m in _MARKERS if m in texts and m in differing), None)
        if marker is None:
            raise Irregular(f"it renders {differing[:80]!r} differently from other contents")
        texts = tuple(text for text in texts if text != marker)
    raise Irregular("its rendering depends on the contents")


def write_form(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the form of a model's template beside it. Returns the names of files written, and notes for the user."""
    try:
        template = ChatTemplate.of_folder(folder)
        if template is None:
            return (), ()
        form = role_form(template)
    except Irregular as reason:
        return (), (f"chat template: no prefixes and suffixes for apps without jinja, since {reason}",)
    except UserError as error:
        return (), (f"chat template: {error.message}",)
    (folder / FILE).write_text(form.json(), "utf-8")
    return (FILE,), ()


def _read(template: ChatTemplate) -> RoleForm:
    """The form, derived from renderings of probes."""
    user, reply, again, system = "Qu1Q", "Qa1Q", "Qu2Q", "QsQ"
    one = _rendered(template, [("user", user)])
    head, after_user = _around(one, user)
    two = _rendered(template, [("user", user), ("assistant", reply)])
    middle, after_reply = _around(two.removeprefix(head + user), reply)
    if not two.startswith(head + user) or not middle.startswith(after_user):
        raise Irregular("it renders a question differently once it is answered")
    three = _rendered(template, [("user", user), ("assistant", reply), ("user", again)])
    rest, after_again = _around(three.removeprefix(two.removesuffix(after_reply)), again)
    if not three.startswith(two.removesuffix(after_reply)) or not rest.startswith(after_reply):
        raise Irregular("it renders an answer differently once the conversation goes on")
    before_user = rest[len(after_reply) :]
    if after_again != after_user or not head.endswith(before_user):
        raise Irregular("it renders the first question differently from the next")
    prompted = _rendered(template, [("user", user)], prompt=True)
    if not prompted.startswith(one):
        raise Irregular("it renders the conversation differently where an answer is to follow")
    before_system = after_system = None
    try:
        with_system = _rendered(template, [("system", system), ("user", user)])
        before_system, behind = _around(with_system, system)
        if not behind.endswith(before_user + user + after_user):
            raise Irregular("it renders a question differently after a system prompt")
        after_system = behind.removesuffix(before_user + user + after_user)
    except UserError:  # it refuses a system prompt
        pass
    form = RoleForm(
        begin=head.removesuffix(before_user),
        before_system=before_system,
        after_system=after_system,
        before={"user": before_user, "assistant": middle.removeprefix(after_user)},
        after={"user": after_user, "assistant": after_reply},
        answer=prompted.removeprefix(one),
    )
    probes = {"user": [("user", "\n x \n")], "assistant": [("user", user), ("assistant", "\n x \n")]}
    if before_system is not None:
        probes["system"] = [("system", "\n x \n"), ("user", user)]
    for role, turns in probes.items():
        text = _rendered(template, turns)
        forms = (replace(form, trims={**form.trims, role: trim}) for trim in ("", "both", "newlines"))
        found = next((made for made in forms if made.render(turns) == text), form)
        form = found if found.trims.get(role) else form
    return form


def _around(text: str, content: str) -> tuple[str, str]:
    if text.count(content) != 1:
        raise Irregular(f"it renders a content {text.count(content)} times")
    before, _, after = text.partition(content)
    return before, after


def _rendered(template: ChatTemplate, turns: Sequence[tuple[str, str]], *, prompt: bool = False) -> str:
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    return template.render(messages, generation_prompt=prompt)


def _difference(template: ChatTemplate, form: RoleForm, texts: Sequence[str]) -> str | None:
    """The contents of a conversation that template and form render differently; None if there is none."""
    for turns, prompt in _conversations(texts, system=form.before_system is not None):
        try:
            theirs = _rendered(template, turns, prompt=prompt)
        except UserError as error:
            raise Irregular(f"it refuses a conversation of turns: {error.message[:200]}") from None
        if theirs != form.render(turns, generation_prompt=prompt):
            return " ".join(content for _, content in turns)
    return None


def _conversations(texts: Sequence[str], *, system: bool) -> Iterator[tuple[list[tuple[str, str]], bool]]:
    """(Turns, whether an answer is to follow): each text in each role, then random conversations."""
    roles = ("user", "assistant")
    for index, text in enumerate(texts):
        for place in range(3 + system):
            turns = [("user", "q"), ("assistant", "a"), ("user", "r")]
            if place == 3:
                turns.insert(0, ("system", text))
            else:
                turns[place] = (turns[place][0], text)
            yield turns, index % 2 == 0
    drawn = random.Random(1)
    for _ in range(_CONVERSATIONS):
        turns = [(roles[i % 2], drawn.choice(texts)) for i in range(drawn.randint(1, 7))]
        if system and drawn.random() < 0.5:
            turns.insert(0, ("system", drawn.choice(texts)))
        yield turns, drawn.random() < 0.5
