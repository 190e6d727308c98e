"""A document as sources give it: running text, a prompt with its response, or a longer conversation."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

Turns = tuple[tuple[str, str], ...]  # (role, text)
ROLES = SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True)
class Document:
    """Either `text`, or `prompt` and `response`.

    turns: of a conversation that is more than one prompt and one response; its `prompt` is then the text of all turns
    before the last, and `response` the last, which is the assistant's.
    group: documents of one group are all held out or all trained on; empty stands for the document alone. A function
    that is the answer to a question has the group of the file it is in.
    """

    text: str = ""
    prompt: str = ""
    response: str = ""
    group: str = ""
    family: str = ""
    turns: Turns = ()

    @staticmethod
    def of_conversation(turns: Turns) -> Document:
        """A conversation that ends with the assistant's turn, grouped by all that precedes it."""
        before = "\n\n".join(text for _, text in turns[:-1])
        plain = [role for role, _ in turns] == [USER, ASSISTANT]
        return Document(prompt=before, response=turns[-1][1], group=before, turns=() if plain else turns)

    @property
    def conversation(self) -> Turns:
        """An example as turns."""
        return self.turns or ((USER, self.prompt), (ASSISTANT, self.response))

    @property
    def is_example(self) -> bool:
        return bool(self.prompt)

    @property
    def body(self) -> str:
        """All of its text."""
        return f"{self.prompt}\n{self.response}" if self.is_example else self.text

    def group_hash(self) -> float:
        """Evenly distributed in [0, 1), the same for all documents of a group, on every machine."""
        return hash64(self.group or self.body) / (1 << 64)


def hash64(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
