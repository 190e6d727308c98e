"""A `tokenizer.json` in a process of its own, which may panic, abort or never end: this one then says so in one line.

Ids are those that transformers gives for the same folder: the tokenizer's own post-processor decides which special
tokens are added (BOS or none), and the truncation and padding that a training script left in the file are switched off.

The library is native code that holds Python's lock while it works and answers faults of the file with a panic; neither
a thread nor an exception handler bounds it. A call costs the pipe, some tens of microseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.files import read_bytes

MAX_BYTES = 256 << 20  # of the file; the largest vocabularies in use take 35 MB
SECONDS = 60.0  # for one call, of a file that big or a prompt of megabytes; usual ones take milliseconds
_MAX_REPLY = 1 << 30
_REMEDY = "take the model's tokenizer.json"


class TextTokenizer:
    """The tokenizer of a file's content, loaded when it is made; ArtifactError, which names `place`, if damaged."""

    def __init__(self, content: bytes, place: str) -> None:
        self._place = place
        # -P: the folder that the user stands in may be a model's, and its files are not modules to import
        command = [sys.executable, "-P", "-m", "moec.compiler.tokenizer_worker"]
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._end = weakref.finalize(self, _end, self._process)
        self.vocab_size = int(self._ask({"load": len(content)}, content))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the special tokens that the tokenizer itself adds, or without any."""
        return list(self._ask({"encode": text, "special": special_tokens}))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._ask({"decode": [int(i) for i in ids], "skip": skip_special_tokens}))

    def token_to_id(self, token: str) -> int | None:
        found = self._ask({"id": token})
        return None if found is None else int(found)

    def adds(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor puts before and behind every text."""
        plain, whole = self.encode("a", special_tokens=False), self.encode("a")
        start = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), len(whole))
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])

    def close(self) -> None:
        """End the process. Calls after this raise ArtifactError."""
        self._end()

    def _ask(self, message: dict[str, Any], data: bytes = b"") -> Any:
        with self._lock:
            if not self._end.alive:
                raise ArtifactError("its tokenizer is closed", place=self._place)
            try:
                send(self._process.stdin, message, data)
                reply = json.loads(_receive_within(self._process, time.monotonic() + SECONDS))
            except TimeoutError:
                self._end()
                what = f"the tokenizer does not end: {SECONDS:.0f} seconds have passed"
                raise ArtifactError(what, place=self._place, remedy=_REMEDY) from None
            except (EOFError, OSError):
                self._end()
                what = f"the tokenizer stopped (status {self._process.poll()})"
                raise ArtifactError(what, place=self._place, remedy=_REMEDY) from None
        if "fault" in reply:
            if "load" in message:
                self._end()
                raise ArtifactError(f"not a tokenizer: {reply['fault']}", place=self._place, remedy=_REMEDY)
            raise ArtifactError(f"the tokenizer fails: {reply['fault']}", place=self._place, remedy=_REMEDY)
        return reply["value"]


def load_tokenizer(file: Path) -> TextTokenizer:
    """A `tokenizer.json`; ArtifactError when it is missing, damaged, or does not end."""
    if not file.exists():
        remedy = "put tokenizer.json into the checkpoint folder"
        raise ArtifactError("no such tokenizer", place=str(file), remedy=remedy)
    return TextTokenizer(read_bytes(file, limit=MAX_BYTES, fault=ArtifactError, remedy=_REMEDY), str(file))


def check_unicode(text: str, place: str) -> None:
    """RunError for half characters: bytes that were no UTF-8, or a lone surrogate of a JSON file."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RunError("holds half a character", place=place, remedy="give it as UTF-8") from None


def encode_prompt(tokenizer: TextTokenizer, text: str, place: str = "--prompt") -> list[int]:
    """The ids of a prompt: what the model's own tokenizer gives, nothing added and nothing cut off."""
    check_unicode(text, place)
    return tokenizer.encode(text)


def send(stream: Any, message: dict[str, Any], data: bytes = b"") -> None:
    """A message as JSON with its length before it, then `data`."""
    text = json.dumps(message).encode()
    left = memoryview(struct.pack("<Q", len(text)) + text + data)
    while left:  # an unbuffered pipe may take less
        left = left[stream.write(left) :]


def _receive_within(process: subprocess.Popen[bytes], until: float) -> bytes:
    """The next reply. TimeoutError, EOFError."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)

        def take(count: int) -> bytes:
            found = bytearray()
            while len(found) < count:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError
                assert process.stdout is not None
                piece = os.read(process.stdout.fileno(), min(count - len(found), 1 << 20))
                if not piece:
                    raise EOFError
                found += piece
            return bytes(found)

        (length,) = struct.unpack("<Q", take(8))
        if length > _MAX_REPLY:
            raise EOFError
        return take(length)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()
