"""The chat template that a model brings, for training: which parts of a conversation's text are responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moec.assistant import template
from moec.compiler.errors import ArtifactError, RunError
from moec.training.data.document import ASSISTANT, Turns
from moec.training.data.shards import DataError

TEMPLATE = template.CHAT_TEMPLATE


@dataclass(frozen=True)
class ChatTemplate:
    """A model's own template (`moec.assistant.template`), whose faults are of the data."""

    inner: template.ChatTemplate

    @property
    def text(self) -> str:
        return self.inner.text

    @staticmethod
    def beside(tokenizer: Path) -> ChatTemplate | None:
        """The template in a tokenizer's folder; None if there is none. DataError for one that cannot be read."""
        found = template.ChatTemplate.of_folder(tokenizer.parent, fault=DataError)
        return None if found is None else ChatTemplate(found)

    def render(self, turns: Sequence[tuple[str, str]], *, generation_prompt: bool = False) -> str:
        """The text of a conversation. DataError where the template refuses it or fails."""
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            return self.inner.render(messages, generation_prompt=generation_prompt)
        except (ArtifactError, RunError) as error:
            raise DataError(error.message, place=error.place) from None

    def render_responses(self, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
        """(text, [begin, end) in it of every response, with what ends its turn).

        A response begins where generating it would. DataError where the template tells a conversation otherwise as it
        goes on, so that no part of the text is the response.
        """
        whole = self.render(turns)
        spans = []
        for index, (role, _) in enumerate(turns):
            if role != ASSISTANT:
                continue
            before = self.render(turns[:index], generation_prompt=True)
            after = whole if index + 1 == len(turns) else self.render(turns[: index + 1])
            if not after.startswith(before) or not whole.startswith(after):
                raise DataError(
                    "the chat template tells earlier turns otherwise as a conversation goes on: which tokens are the "
                    "response is not known",
                    place=self.inner.place,
                    remedy="give conversations of one response, or another template",
                )
            spans.append((len(before), len(after)))
        return whole, spans
