"""A model that says what a test wants: a session whose likeliest token is scripted, behind a real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moec.assistant.assistant import Assistant
from moec.assistant.sampling import Sampling
from moec.assistant.template import ChatTemplate
from moec.compiler.session import SessionBase
from moec.compiler.target import MoeTrace
from moec.compiler.tokenizer import TextTokenizer
from tests.assistant.conversations import template

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|tool_call|>", "[TOOL_CALLS]", "<|channel|>",
           "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|constrain|>"]  # fmt: skip
BEHIND = ["<|tool_call_start|>", "<|tool_call_end|>"]  # behind the letters, which keep their ids
EOS = 4  # <|im_end|>


def tokenizer() -> Tokenizer:
    """Byte by byte, with special tokens: every text and every cut of a text into tokens is possible."""
    vocabulary = {name: i for i, name in enumerate(SPECIAL)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(letter, len(vocabulary))
    vocabulary |= {name: len(vocabulary) + i for i, name in enumerate(BEHIND)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*SPECIAL, *BEHIND)])
    return made


VOCABULARY = tokenizer().get_vocab_size()


class Speaking(SessionBase):
    """Says `answers` one after the other, each to the prompt after which it is asked for, then the end of a text.

    likes: instead, the logits of every token, as a model has them that is held to a format.
    """

    rewinds = True

    def __init__(
        self,
        answers: Sequence[str] = (),
        *,
        context: int = 512,
        likes: Callable[[int], np.ndarray] | None = None,
        slow: Callable[[], None] | None = None,
    ) -> None:
        super().__init__("speaking", vocab_size=VOCABULARY, context=context, max_tokens=64)
        words = tokenizer()
        self._answers = [words.encode(answer, add_special_tokens=False).ids for answer in answers]
        self._likes, self._slow = likes, slow
        self._left: list[int] | None = []
        self._decoding = False
        self.prompts: list[list[int]] = []
        self._closed = False
        self.calls = 0

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True

    def prefill(self, ids: Sequence[int] | np.ndarray, logits: str = "last") -> np.ndarray:
        """A part of a prompt; the answer to the whole is the next one once its first token is drawn."""
        if not self._decoding:
            if self._left is not None:
                self.prompts.append([])
                self._left = None
            self.prompts[-1] = [*self.tokens, *map(int, ids)]
        return super().prefill(ids, logits)

    def decode(self, token: int) -> np.ndarray:
        if self._left is None:
            self._left = list(self._answers.pop(0)) if self._answers else []
            self._left = self._left[1:]  # its first token came with the prompt
        self._decoding = True
        try:
            return super().decode(token)
        finally:
            self._decoding = False

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        self.calls += 1
        if self._slow is not None:
            self._slow()
        if rows is None:
            return []
        if self._likes is not None:
            rows[:] = self._likes(start + len(tokens))
            return []
        rows[:] = 0.0
        if self._left is None:
            said = self._answers[0] if self._answers else []
            rows[-1, said[0] if said else EOS] = 9.0
        else:
            rows[-1, self._left.pop(0) if self._left else EOS] = 9.0
        return []


def assistant(
    folder: Path, name: str = "chatml", *, sampling: Sampling | None = None, chat: ChatTemplate | None = None
) -> Assistant:
    """The assistant of such a model, with the template of a family's form."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(tokenizer().to_str())))
    words = TextTokenizer(file.read_bytes(), str(file))
    found = chat or template(name)
    special = words.special_tokens()
    return Assistant(words, found, sampling or Sampling(), frozenset([EOS]), "speaking", file, _special=special)
