"""Token ids for a model without a tokenizer: words, numbers and marks, hashed into the vocabulary."""

from __future__ import annotations

import re
import zlib


class WordHashEncoder:
    """Hashes each word, number and punctuation mark into the vocabulary.

    Not a tokenizer (it cannot decode), but it keeps what matters to routing: equal words are equal ids, and the ids are
    distributed as words are in the text. `vocab_size` is the number of ids; id 0 is never used when there is another.
    """

    _pieces = re.compile(r"\s*(?:[^\W\d_]+|\d|_|[^\w\s])|\s+$")

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocabulary of {vocab_size}")
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        usable = max(1, self._vocab_size - 1)
        first = self._vocab_size - usable
        return [first + zlib.crc32(piece.encode()) % usable for piece in self._pieces.findall(text)]
