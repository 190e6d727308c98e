"""A document as sources give it: running text, or a prompt with its response."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class Document:
    """Either `text`, or `prompt` and `response`.

    group: documents of one group are all held out or all trained on; empty stands for the document alone. A function
    that is the answer to a question has the group of the file it is in.
    """

    text: str = ""
    prompt: str = ""
    response: str = ""
    group: str = ""
    family: str = ""

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
