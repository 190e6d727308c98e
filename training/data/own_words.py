"""What a dense model writes itself, as text to heal a mixture of it on: `moec data write`.

Half of it is running text, begun with a random word, and half conversations of one question and its answer, where the
checkpoint has a chat template: the model is given all that stands before a question, and writes question and answer
(Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.compiler.replacing import replacing
from moec.compiler.source import TOKENIZER
from moec.sources.dense_decoder import open_dense_decoder
from moec.training.data.shards import DataError
from moec.training.data.writer import Writer
from moec.training.tokenizer import Coder

TEXTS, CHATS = "texts.jsonl", "chats.jsonl"
LENGTH = 256  # tokens of a row
ROWS = 64  # written at once
_LEAST = 80  # characters of a text that is kept
_LEAST_SAID = 8  # tokens of a question and its answer
_MARK = "\ue0000\ue001"
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


@dataclass(frozen=True)
class Written:
    """tokens: sampled; texts, chats: kept; no_chats: why none were written."""

    tokens: int
    texts: int
    chats: int
    no_chats: str = ""


@dataclass(frozen=True)
class _Chat:
    """A conversation of one question, as the template writes it: ids before the question, and between question and
    answer; `end` is the text that ends the answer."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    end: str


def write_own_words(
    folder: Path, out: Path, *, tokens: int, seed: int = 0, length: int = LENGTH, progress: Progress | None = None
) -> Written:
    """Write about `tokens` tokens of a dense model's own text to `out`/texts.jsonl and `out`/chats.jsonl, as `moec data
    build --add` reads them.

    folder: a dense checkpoint as `moec upcycle` takes it, with its tokenizer. length: tokens of a text, or of question
    and answer. CheckpointError for another model; UserError for a length beyond the model's context, or one that the
    chat template fills.
    """
    progress = progress or Progress(quiet=True)
    dense = open_dense_decoder(folder)
    if not 32 <= length <= dense.config.context:
        raise UserError(
            f"rows of {length} tokens, the model's context is {dense.config.context}",
            place="--length",
            remedy=f"choose 32 to {dense.config.context}",
        )
    if not (folder / TOKENIZER).is_file():
        raise DataError("has no tokenizer.json", place=str(folder), remedy="name a checkpoint with its tokenizer")
    coder = Coder.from_file(folder / TOKENIZER)
    chat = _chat(coder)
    if isinstance(chat, _Chat) and (least := len(chat.before) + len(chat.between)) + _LEAST_SAID > length:
        raise UserError(
            f"the chat template writes {least} tokens around a question, which leaves {max(length - least, 0)} to say",
            place="--length",
            remedy=f"choose {least + _LEAST_SAID} or more",
        )
    writer, generator = Writer(dense), torch.Generator().manual_seed(seed)
    rounds = max(1, round(tokens / (ROWS * length)))
    counts = {TEXTS: 0, CHATS: 0}
    with (
        replacing(out, kind="text of a model") as written,
        (written / TEXTS).open("w", encoding="utf-8") as texts,
        (written / CHATS).open("w", encoding="utf-8") as chats,
    ):
        for number in progress.each("writing", range(rounds)):
            if isinstance(chat, _Chat) and number % 2 == 1:
                name, file, found = CHATS, chats, _chats(writer, coder, chat, length, generator)
            else:
                name, file, found = TEXTS, texts, _texts(writer, coder, length, generator)
            for line in found:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                counts[name] += 1
    none = ""
    if not counts[CHATS]:
        few = f"so few tokens are one round of texts: {2 * ROWS * length:,} are one of each"
        none = chat if isinstance(chat, str) else few if rounds == 1 else "no question was followed by an answer"
    return Written(rounds * ROWS * length, counts[TEXTS], counts[CHATS], none)


def _texts(writer: Writer, coder: Coder, length: int, generator: torch.Generator) -> Iterator[dict[str, object]]:
    words = _words(coder)
    chosen = torch.randint(len(words), (ROWS,), generator=generator).tolist()
    begins = coder.begins or (coder.eos_id,)
    rows = torch.stack(list(writer.rows([[*begins, words[i]] for i in chosen], length, generator)), dim=1)
    for ids in rows[:, len(begins) :].tolist():
        for text in _decoded(coder, _cut(ids, coder.eos_id)):
            if len(text) >= _LEAST:
                yield {"text": text}


def _chats(
    writer: Writer, coder: Coder, chat: _Chat, length: int, generator: torch.Generator
) -> Iterator[dict[str, object]]:
    sampled = writer.rows([chat.before] * ROWS, length, generator, after=chat.between)
    between = coder.tokenizer.decode(list(chat.between), skip_special_tokens=False)
    for ids in torch.stack(list(sampled), dim=1)[:, len(chat.before) :].tolist():
        text = coder.tokenizer.decode(ids, skip_special_tokens=False)
        question, found, rest = text.partition(between)
        answer, ended, _ = rest.partition(chat.end)
        if not ended:  # the row's length cut it
            ends = list(_SENTENCE_END.finditer(answer))
            answer = answer[: ends[-1].end()] if ends else ""
        question, answer = question.strip(), answer.strip()
        if found and question and answer and not _marked(coder, question + answer):
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _chat(coder: Coder) -> _Chat | str:
    """How a checkpoint writes a conversation, or why none can be told apart from running text."""
    if coder.template is None:
        return "the checkpoint has no chat template"
    text, ((begin, _),) = coder.template.render_responses((("user", _MARK), ("assistant", "!")))
    before, found, after = text[:begin].partition(_MARK)

    def ids(part: str) -> tuple[int, ...]:
        return tuple(coder.tokenizer.encode(part, add_special_tokens=False).ids)

    if not found:
        return "the chat template does not write a question as it is"
    if not ids(before) or not after.strip():
        return "the chat template does not mark where a question begins and ends"
    return _Chat(ids(before), ids(after), coder.end_of_response())


def _words(coder: Coder) -> list[int]:
    """Ids of tokens that can begin a text: a word, or the beginning of one."""
    pieces = ((i, coder.tokenizer.decode([i], skip_special_tokens=False)) for i in range(coder.vocab_size))
    found = [i for i, text in pieces if len(text.strip()) > 1 and text.strip().isalpha() and text.strip()[0].isupper()]
    return found or list(range(coder.vocab_size))


def _cut(ids: Sequence[int], at: int) -> Iterator[list[int]]:
    part: list[int] = []
    for token in ids:
        if token == at:
            yield part
            part = []
        else:
            part.append(token)
    yield part


def _decoded(coder: Coder, parts: Iterator[list[int]]) -> Iterator[str]:
    for ids in parts:
        text = coder.tokenizer.decode(ids, skip_special_tokens=False)
        for marker in _markers(coder):
            text = text.partition(marker)[0]
        yield text.strip()


def _markers(coder: Coder) -> list[str]:
    return [token.content for token in coder.tokenizer.get_added_tokens_decoder().values() if token.special]


def _marked(coder: Coder, text: str) -> bool:
    return any(marker in text for marker in _markers(coder))
