"""Byte-level BPE tokenizers: trained on a corpus or given, and how a conversation becomes tokens.

A trained tokenizer splits text as Llama 3 does, save that every digit is a token of its own (small models learn
arithmetic from digits far sooner). Its first ids are special:

    0 <|begin_of_text|>   1 <|end_of_text|>   2 <|start_header_id|>   3 <|end_header_id|>   4 <|eot_id|>

so a spec for it says `bos_id: 0, eos_ids: [1, 4]`. The chat form is Llama 3's:

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nPROMPT<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\nRESPONSE<|eot_id|>          (all on one line)

and so on for more turns, `system` among them.

A given tokenizer that has these markers is used in the same way; one without them gets the plain form

    PROMPT in `### Instruction:\\n...\\n\\n### Response:\\n`, then RESPONSE and EOS, for every response.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moec.training.data.document import ASSISTANT, ROLES, Turns
from moec.training.data.shards import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, START_HEADER, END_HEADER, END_OF_TURN = SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_BOS_NAMES = (BOS, "<s>", "<bos>", "<|startoftext|>")
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|endoftext|>", "<|im_end|>")
_MOST = 1 << 20  # several times the largest vocabularies in use
_LEAST = 256 + len(SPECIALS)  # every byte and the special tokens
# Llama 3's pattern with single digits: contractions, words with one leading mark or space, a digit, marks, line ends
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """The text of a `tokenizer.json` of at most `vocab_size` ids learned from `texts`; equal texts give equal files.

    DataError if the vocabulary has no room for every byte and the special tokens, or is beyond reason.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _LEAST:
        raise DataError(f"a vocabulary of {vocab_size} is too small", remedy=f"use at least {_LEAST}")
    if vocab_size > _MOST:
        raise DataError(f"a vocabulary of {vocab_size} is too large", remedy=f"use at most {_MOST}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


@dataclass(frozen=True)
class Coder:
    """Turns documents and conversations into ids. Markers that occur in a text are read as text, never as markers."""

    tokenizer: Tokenizer
    bos_id: int | None
    eos_id: int
    chat: bool  # whether the tokenizer has Llama 3's markers of turns

    @staticmethod
    def from_text(text: str, place: str = "tokenizer.json") -> Coder:
        """DataError if `text` is no tokenizer, or names no token that ends a text."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise DataError(f"not a tokenizer: {str(error).splitlines()[0]}", place=place) from None
        eos_id = _first(tokenizer, _EOS_NAMES)
        if eos_id is None:
            raise DataError(
                "has no token that ends a text", place=place, remedy=f"add one of {', '.join(_EOS_NAMES)} to it"
            )
        markers = (START_HEADER, END_HEADER, END_OF_TURN)
        chat = all(tokenizer.token_to_id(name) is not None for name in markers)
        return Coder(tokenizer, _first(tokenizer, _BOS_NAMES), eos_id, chat)

    @staticmethod
    def from_file(file: Path) -> Coder:
        """As `from_text`; DataError also if the file cannot be read."""
        try:
            return Coder.from_text(file.read_text("utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            fault = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise DataError(f"cannot be read: {fault}", place=str(file), remedy="name a tokenizer.json") from None

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text with BOS before it, if there is one, and EOS behind."""
        begin = [] if self.bos_id is None else [self.bos_id]
        return [[*begin, *ids, self.eos_id] for ids in self._plain(texts)]

    def encode_conversations(self, conversations: Sequence[Turns]) -> list[tuple[list[int], list[int]]]:
        """Conversations as ids, and per token whether it belongs to a turn of the assistant (its end included)."""
        if not self.chat:
            return self._plain_conversations(conversations)
        start, end, turn = self._id(START_HEADER), self._id(END_HEADER), self._id(END_OF_TURN)
        *names, line = self._plain([*ROLES, "\n\n"])
        roles = dict(zip(ROLES, names, strict=True))
        texts = (text if role == ASSISTANT else f"\n\n{text}" for turns in conversations for role, text in turns)
        bodies = iter(self._plain(list(texts)))
        found = []
        for turns in conversations:
            ids: list[int] = [] if self.bos_id is None else [self.bos_id]
            mask = [0] * len(ids)
            for role, _ in turns:
                answers = role == ASSISTANT
                head, body = [start, *roles[role], end, *(line if answers else ())], [*next(bodies), turn]
                ids += head + body
                mask += [0] * len(head) + [int(answers)] * len(body)
            found.append((ids, mask))
        return found

    def _plain_conversations(self, conversations: Sequence[Turns]) -> list[tuple[list[int], list[int]]]:
        """In the plain form what was said before a response, by whomever, is its instruction."""
        texts: list[list[str]] = []
        for turns in conversations:
            texts.append([])
            asked: list[str] = []
            for role, text in turns:
                if role == ASSISTANT:
                    texts[-1] += [_plain_form("\n\n".join(asked)), text]
                    asked = []
                else:
                    asked.append(text)
        bodies = iter(self._plain([text for parts in texts for text in parts]))
        found = []
        for parts in texts:
            ids: list[int] = [] if self.bos_id is None else [self.bos_id]
            mask = [0] * len(ids)
            for _ in range(len(parts) // 2):
                prompt, response = next(bodies), [*next(bodies), self.eos_id]
                ids += prompt + response
                mask += [0] * len(prompt) + [1] * len(response)
            found.append((ids, mask))
        return found

    def prompt_text(self, prompt: str) -> str:
        """The chat form as text, for programs that tokenize themselves; without BOS, which they add."""
        if not self.chat:
            return _plain_form(prompt)
        turn = f"{START_HEADER}user{END_HEADER}\n\n{prompt}{END_OF_TURN}"
        return f"{turn}{START_HEADER}assistant{END_HEADER}\n\n"

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        self.tokenizer.encode_special_tokens = True  # a marker in a text is text
        try:
            return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            self.tokenizer.encode_special_tokens = False

    def _id(self, name: str) -> int:
        found = self.tokenizer.token_to_id(name)
        assert found is not None
        return found


def _plain_form(prompt: str) -> str:
    return f"### Instruction:\n{prompt}\n\n### Response:\n"


def _first(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    return next((found for name in names if (found := tokenizer.token_to_id(name)) is not None), None)
