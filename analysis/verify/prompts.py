"""The prompts of `moec verify`: token ids of the shipped texts (compiler/texts.py), with or without a tokenizer."""

from __future__ import annotations

from typing import Protocol

from moec.compiler.texts import prompts
from moec.compiler.word_hash import WordHashEncoder as WordHashEncoder


class TextEncoder(Protocol):
    """Anything that turns text into token ids, without special tokens."""

    def encode(self, text: str) -> list[int]: ...


def prompt_ids(encoder: TextEncoder, *, tokens: int, text: str | None = None) -> dict[str, list[int]]:
    """About `tokens` ids in total, shared evenly between the domains; or of `text` alone when it is given.

    Each domain gives at most what its text holds. At least one token each.
    """
    texts = {"text": text} if text is not None else prompts()
    share = max(1, tokens // len(texts))
    return {name: encoder.encode(body)[:share] for name, body in texts.items()}
