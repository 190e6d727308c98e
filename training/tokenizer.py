"""Byte-level BPE tokenizers: trained on a corpus or given, and how a conversation becomes tokens.

A trained tokenizer splits text as Llama 3 does, except that every digit is a token of its own (small models learn
arithmetic from digits far sooner). Its first ids are special:

    0 <|begin_of_text|>   1 <|end_of_text|>   2 <|start_header_id|>   3 <|end_header_id|>   4 <|eot_id|>

so a spec for it says `bos_id: 0, eos_ids: [1, 4]`. The chat form is Llama 3's:

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nPROMPT<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\nRESPONSE<|eot_id|>          (all on one line)

and so on for more turns, `system` among them.

A given tokenizer is used with the chat template that lies beside it (see `chat_template`): ids and responses are those
of the model's own form. Without a template one that has these markers is used in the same way, and any other gets the
plain form

    PROMPT in `### Instruction:\\n...\\n\\n### Response:\\n`, then RESPONSE and EOS, for every response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.files import read_text
from moec.compiler.tokenizer import MAX_BYTES
from moec.training.chat_template import ChatTemplate
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
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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
    begins = f"{BOS} $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=begins, pair=f"{begins} $B", special_tokens=[(BOS, SPECIALS.index(BOS))]
    )
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
    """Turns documents and conversations into ids. Markers that occur in a text are read as text, never as markers.

    A document begins as every prompt will: with what the tokenizer's own post-processor adds.
    """

    tokenizer: Tokenizer
    begins: tuple[int, ...]
    eos_id: int
    chat: bool  # whether the tokenizer has Llama 3's markers of turns
    template: ChatTemplate | None = None

    @property
    def bos_id(self) -> int | None:
        return self.begins[0] if self.begins else None

    @property
    def form(self) -> str:
        """How conversations are written: "template", "llama3" or "plain"."""
        return "template" if self.template is not None else "llama3" if self.chat else "plain"

    @staticmethod
    def from_text(text: str, place: str = "tokenizer.json", template: ChatTemplate | None = None) -> Coder:
        """DataError if `text` is no tokenizer, or names no token that ends a text."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(text)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            whole, plain = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
        except BaseException as error:  # the library raises bare Exception for a fault of the file, or panics
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise DataError(f"not a tokenizer: {(str(error).splitlines() or ['?'])[0]}", place=place) from None
        at = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), 0)
        eos_id = _first(tokenizer, _EOS_NAMES)
        if eos_id is None:
            raise DataError(
                "has no token that ends a text", place=place, remedy=f"add one of {', '.join(_EOS_NAMES)} to it"
            )
        markers = (START_HEADER, END_HEADER, END_OF_TURN)
        chat = all(tokenizer.token_to_id(name) is not None for name in markers)
        return Coder(tokenizer, tuple(whole[:at]), eos_id, chat, template)

    @staticmethod
    def from_file(file: Path) -> Coder:
        """As `from_text`, with the chat template that lies beside it; DataError also if a file cannot be read."""
        text = read_text(file, limit=MAX_BYTES, fault=DataError, remedy="name a tokenizer.json")
        return Coder.from_text(text, str(file), ChatTemplate.beside(file))

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text with BOS before it, if prompts begin with it, and EOS behind."""
        return [[*self.begins, *ids, self.eos_id] for ids in self._plain(texts)]

    def encode_conversations(self, conversations: Sequence[Turns]) -> list[tuple[list[int], list[int]]]:
        """Conversations as ids, and per token whether it belongs to a turn of the assistant (its end included)."""
        if self.template is not None:
            return [self._templated(self.template, turns) for turns in conversations]
        if not self.chat:
            return self._plain_conversations(conversations)
        start, end, turn = self._id(START_HEADER), self._id(END_HEADER), self._id(END_OF_TURN)
        *names, line = self._plain([*ROLES, "\n\n"])
        roles = dict(zip(ROLES, names, strict=True))
        texts = (text if role == ASSISTANT else f"\n\n{text}" for turns in conversations for role, text in turns)
        bodies = iter(self._plain(list(texts)))
        found = []
        for turns in conversations:
            ids: list[int] = list(self.begins)
            mask = [0] * len(ids)
            for role, _ in turns:
                answers = role == ASSISTANT
                head, body = [start, *roles[role], end, *(line if answers else ())], [*next(bodies), turn]
                ids += head + body
                mask += [0] * len(head) + [int(answers)] * len(body)
            found.append((ids, mask))
        return found

    def _templated(self, template: ChatTemplate, turns: Turns) -> tuple[list[int], list[int]]:
        """In the form of the model's own template: what transformers' `apply_chat_template` gives.

        A conversation that has a marker in a turn's text is encoded in parts, so that the marker stays text.
        """
        known = self.tokenizer.get_added_tokens_decoder().values()
        if not any(token.content in text for token in known if token.special for _, text in turns):
            text, spans = template.render_responses(turns)
            return self._masked(text, 0, spans)
        stand_ins = tuple((role, f"\ue000{index}\ue001") for index, (role, _) in enumerate(turns))
        text, spans = template.render_responses(stand_ins)
        ids, mask, at = [], [], 0
        for piece in re.split("(\ue000[0-9]+\ue001)", text):
            if piece.startswith("\ue000"):
                (found,) = self._plain([turns[int(piece[1:-1])][1]])
                ids += found
                mask += [int(any(begin <= at < end for begin, end in spans))] * len(found)
            elif piece:
                found, flags = self._masked(piece, at, spans)
                ids += found
                mask += flags
            at += len(piece)
        return ids, mask

    def _masked(self, text: str, at: int, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Ids of `text`, which stands at character `at`, and which of them begin in one of the spans."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        flags = [int(any(begin <= at + start < end for begin, end in spans)) for start, _ in found.offsets]
        return list(found.ids), flags

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
            ids: list[int] = list(self.begins)
            mask = [0] * len(ids)
            for _ in range(len(parts) // 2):
                prompt, response = next(bodies), [*next(bodies), self.eos_id]
                ids += prompt + response
                mask += [0] * len(prompt) + [1] * len(response)
            found.append((ids, mask))
        return found

    def prompt_text(self, prompt: str) -> str:
        """The chat form as text, for programs that tokenize themselves; without BOS where they add it."""
        if self.template is not None:
            text = self.template.render([("user", prompt)], generation_prompt=True)
            return text.removeprefix(self.tokenizer.decode(list(self.begins), skip_special_tokens=False))
        if not self.chat:
            return _plain_form(prompt)
        turn = f"{START_HEADER}user{END_HEADER}\n\n{prompt}{END_OF_TURN}"
        return f"{turn}{START_HEADER}assistant{END_HEADER}\n\n"

    def end_of_response(self) -> str:
        """The text at which a response has ended."""
        if self.template is not None:
            asked = (("user", "?"), (ASSISTANT, "!"))
            text, ((begin, end),) = self.template.render_responses(asked)
            return text[begin:end].strip().removeprefix("!").strip() or self._name(self.eos_id)
        return END_OF_TURN if self.chat else "\n###"

    def _name(self, id_: int) -> str:
        return str(self.tokenizer.id_to_token(id_))

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
