"""A `tokenizer.json` loaded in a separate process: if that panics, aborts or hangs, the caller gets a one-line error.

Ids are those that transformers gives for the same folder: the tokenizer's own post-processor decides which special
tokens are added (BOS or none), and the truncation and padding that a training script left in the file are switched off.

The library is native code that holds the GIL while it works and panics on faulty files: neither a thread nor an
exception handler could contain it. A call costs some tens of microseconds for the pipe.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.files import read_bytes
from moec.compiler.worker import Fault, Worker

MAX_BYTES = 128 << 20  # of the file; the largest vocabularies in use take 35 MB
# Limits of one call, and what each character of a text adds. 262,144 tokens with as many merges load in
# 0.7 s of processor time and 0.25 GB; two million characters without a break take 1.4 s and 0.3 GB.
SECONDS = 4.0
MEMORY = 2 << 30
_SECONDS_PER_CHARACTER = 4e-6
_MEMORY_PER_CHARACTER = 512
_REMEDY = "take the model's tokenizer.json"


class TextTokenizer:
    """The tokenizer of a file's content, loaded at once; ArtifactError naming `place`, if damaged.

    A process that has ended, because a text was too much for it or the system ended it, is started anew by the next
    call.
    """

    def __init__(self, content: bytes, place: str) -> None:
        self._content, self._place = content, place
        self._starting, self._closed = threading.Lock(), False
        self._worker, self.vocab_size = self._started()

    def encode(self, text: str, *, special_tokens: bool = True, markers_as_text: bool = False) -> list[int]:
        """Ids of `text`, with the special tokens that the tokenizer itself adds, or without any.

        markers_as_text: special tokens that are spelled out in the text are encoded as ordinary text.
        """
        return list(self._ask({"encode": text, "special": special_tokens, "as_text": markers_as_text}))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._ask({"decode": [int(i) for i in ids], "skip": skip_special_tokens}))

    def token_to_id(self, token: str) -> int | None:
        found = self._ask({"id": token})
        return None if found is None else int(found)

    def special_tokens(self) -> dict[int, str]:
        """Texts of the special tokens by id; `decode` leaves them out by default."""
        return {int(i): str(text) for i, text in self._ask({"special": True}).items()}

    def token(self, id_: int) -> str | None:
        """A token as the vocabulary spells it; None for an id that it does not have."""
        found = self._ask({"token": int(id_)})
        return None if found is None else str(found)

    def adds(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor puts before and behind every text."""
        plain, whole = self.encode("a", special_tokens=False), self.encode("a")
        start = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), len(whole))
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])

    def normalized(self, texts: Sequence[str]) -> list[str]:
        """Texts as the tokenizer's normalizers change them."""
        return [str(text) for text in self._ask({"normalize": list(texts)})]

    def close(self) -> None:
        """End the process. Calls after this raise ArtifactError."""
        self._closed = True
        self._worker.close()

    def ready(self) -> Worker:
        """The process, started anew if it has ended; ArtifactError where that fails, or after `close`."""
        with self._starting:
            if not self._worker.alive and not self._closed:
                self._worker.close()
                self._worker, _ = self._started()
            return self._worker

    def _started(self) -> tuple[Worker, int]:
        """A process that has loaded the file, and the size of the vocabulary."""
        worker = Worker("moec.compiler.tokenizer_worker", "the tokenizer", self._place, _REMEDY)
        try:
            return worker, int(worker.ask({"load": True}, self._content, seconds=SECONDS, memory=MEMORY))
        except Fault as fault:
            worker.close()
            raise ArtifactError(f"not a tokenizer: {fault}", place=self._place, remedy=_REMEDY) from None

    def _ask(self, message: dict[str, Any]) -> Any:
        size = len(message.get("encode", "")) + sum(map(len, message.get("normalize", ())))
        seconds, memory = SECONDS + size * _SECONDS_PER_CHARACTER, MEMORY + size * _MEMORY_PER_CHARACTER
        try:
            return self.ready().ask(message, seconds=seconds, memory=memory)
        except Fault as fault:
            raise ArtifactError(f"the tokenizer fails: {fault}", place=self._place, remedy=_REMEDY) from None


def load_tokenizer(file: Path) -> TextTokenizer:
    """A `tokenizer.json`; ArtifactError when it is missing, damaged, or does not end."""
    if not file.exists():
        remedy = "put tokenizer.json into the checkpoint folder"
        raise ArtifactError("no such tokenizer", place=str(file), remedy=remedy)
    return TextTokenizer(read_bytes(file, limit=MAX_BYTES, fault=ArtifactError, remedy=_REMEDY), str(file))


def check_unicode(text: str, place: str) -> None:
    """RunError for lone surrogates, which come from arguments that are not UTF-8 and from escapes in JSON files."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RunError("holds half a character", place=place, remedy="give it as UTF-8") from None


def encode_prompt(tokenizer: TextTokenizer, text: str, place: str = "--prompt") -> list[int]:
    """The ids of a prompt: what the model's own tokenizer gives, nothing added and nothing cut off."""
    check_unicode(text, place)
    return tokenizer.encode(text)
