"""A conversation with a model: turns, a system prompt, and what happens when the context is full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moec.assistant.answer import Answer, Limits
from moec.assistant.assistant import Assistant, Prompt
from moec.assistant.messages import checked_messages
from moec.assistant.structured import Format
from moec.compiler.errors import RunError, UserError
from moec.compiler.files import read_text
from moec.compiler.target import Session

MAX_BYTES = 64 << 20  # of a saved conversation
_ROOM = 64  # tokens that dropping the oldest turns leaves for an answer, if it leaves any turn at all


class Conversation:
    """`messages` in OpenAI's form, the system prompt first. drop_oldest: when the context is full, drop the oldest
    turns.

    Without it a question that does not fit is a RunError, and the conversation is as it was.
    """

    def __init__(
        self, assistant: Assistant, session: Session, *, system: str | None = None, drop_oldest: bool = False
    ) -> None:
        self._assistant, self._session, self._drop_oldest = assistant, session, drop_oldest
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
        prompt, messages = self._fitting(messages)
        answer = self._assistant.answer(self._session, prompt, limits, format)
        self.dropped = len(self.messages) + 1 - len(messages)
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

    def _fitting(self, messages: list[dict[str, Any]]) -> tuple[Prompt, list[dict[str, Any]]]:
        context = self._session.context
        while True:
            prompt = self._assistant.chat_prompt(messages)
            room = context - len(prompt.ids)
            if room >= (min(_ROOM, context // 4) if self._drop_oldest else 1):
                return prompt, messages
            shorter = _without_oldest(messages) if self._drop_oldest else None
            if shorter is None:
                if room > 0:
                    return prompt, messages
                raise RunError(
                    f"no room for an answer: the conversation has {len(prompt.ids)} tokens, the context {context}",
                    place="messages",
                    remedy="begin a new one, or drop its oldest turns",
                )
            messages = shorter


def _without_oldest(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Without the oldest question and all that answers it; None where only the last question is left."""
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < 2:
        return None
    return [*messages[: questions[0]], *messages[questions[1] :]]
