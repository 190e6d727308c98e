"""A conversation with a model: turns, a system prompt, and what happens when the context is full."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.assistant.messages import checked_messages
from moec.compiler.errors import RunError, UserError
from moec.compiler.files import read_text

if TYPE_CHECKING:
    from moec.assistant.answer import Answer, Limits
    from moec.assistant.assistant import Assistant, Prompt
    from moec.assistant.structured import Format
    from moec.compiler.target import Session

Message = dict[str, Any]

MAX_BYTES = 64 << 20  # of a saved conversation
_ROOM = 64  # tokens that dropping the oldest turns leaves for an answer, if the last question does


class Conversation:
    """`messages` in OpenAI's form, the system prompt first. drop_oldest: when the context is full, drop the oldest
    turns. prefix: the name under which the prefix cache keeps the system prompt.

    Without it a question that does not fit is a RunError, and the conversation is as it was.
    """

    def __init__(
        self,
        assistant: Assistant,
        session: Session,
        *,
        system: str | None = None,
        drop_oldest: bool = False,
        prefix: str | None = None,
    ) -> None:
        self._assistant, self._session, self._drop_oldest, self._prefix = assistant, session, drop_oldest, prefix
        self.messages: list[dict[str, Any]] = []
        self.dropped = 0  # messages dropped for the last question
        if system is not None:
            self.set_system(system)

    def set_system(self, text: str) -> None:
        """Set the system prompt, or remove it with an empty text."""
        rest = self.messages[1:] if self._has_system() else self.messages
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def clear(self) -> None:
        """Forget every turn; the system prompt stays."""
        self.messages = self.messages[:1] if self._has_system() else []

    def undo(self) -> str | None:
        """Forget the last question with its answer, and give the question; None if there is none."""
        last = next((i for i in range(len(self.messages) - 1, -1, -1) if self.messages[i]["role"] == "user"), None)
        if last is None:
            return None
        question = str(self.messages[last]["content"])
        del self.messages[last:]
        return question

    def ask(self, text: str, limits: Limits, format: Format | None = None) -> Answer:
        """The answer to a question, which is computed as it is iterated; `keep` it afterwards."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, kept = fitting(
            lambda given: self._assistant.chat_prompt(given, shared=limits.drops),
            messages,
            self._session.context,
            drop_oldest=self._drop_oldest,
        )
        self.dropped = len(messages) - len(kept)
        prompt = replace(prompt, dropped=self.dropped)
        answer = self._assistant.answer(self._session, prompt, limits, format, prefix=self._prefix)
        messages = kept
        self.messages = messages
        return answer

    def keep(self, answer: Answer) -> None:
        """Add an answer, complete or stopped, to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.thinking.strip():
            message["reasoning_content"] = answer.thinking.strip("\n")
        self.messages.append(message)

    def save(self) -> str:
        """The conversation as JSON."""
        return json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n"

    def load(self, file: Path) -> None:
        """Continue a conversation that `save` wrote. UserError for anything else; the conversation is then
        unchanged."""
        try:
            raw = json.loads(read_text(file, limit=MAX_BYTES))
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON: {str(error).splitlines()[0]}", place=str(file)) from None
        try:
            self.messages = checked_messages(raw.get("messages") if isinstance(raw, dict) else raw)
        except RunError as error:
            raise UserError(f"no conversation: {error.line()}", place=str(file)) from None

    def _has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"


def fitting(
    render: Callable[[list[Message]], Prompt], messages: list[Message], context: int, *, drop_oldest: bool
) -> tuple[Prompt, list[Message]]:
    """The prompt of a conversation that leaves room for an answer, and the messages that it contains.

    drop_oldest: so many of the oldest questions are left out, each with what answers it, its calls and their results,
    that 64 tokens of an answer fit, or a quarter of a context below 256; never the system prompt, and never the last
    question. RunError where no token fits then.
    """
    prompt = render(messages)
    least = min(_ROOM, context // 4) if drop_oldest else 1
    if context - len(prompt.ids) >= least:
        return prompt, messages
    questions = _questions(messages) if drop_oldest else []
    few, all_but_last = 1, len(questions) - 1
    if all_but_last > 0:
        # the least number that suffices: a conversation of thousands of turns is rendered a dozen times
        while few < all_but_last:
            middle = (few + all_but_last) // 2
            if context - len(render(_without_oldest(messages, middle)).ids) >= least:
                all_but_last = middle
            else:
                few = middle + 1
        messages = _without_oldest(messages, few)
        prompt = render(messages)
    if len(prompt.ids) >= context:
        raise RunError(
            f"no room for an answer: the conversation has {len(prompt.ids)} tokens, the context {context}",
            place="messages",
            remedy="begin a new one, or drop its oldest turns",
        )
    return prompt, messages


def _questions(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "user"]


def _without_oldest(messages: list[Message], count: int = 1) -> list[Message]:
    """Without the oldest questions and all that answers them."""
    questions = _questions(messages)
    return [*messages[: questions[0]], *messages[questions[count] :]]
