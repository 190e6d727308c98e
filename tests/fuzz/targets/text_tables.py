"""A `text.moec`, as applications read it. Most mutants have a valid digest, which an attacker can compute too."""

from __future__ import annotations

import itertools
import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fuzz.mutate import INTERESTING, flip

_HEAD = 24  # bytes before what the digest covers
_INDEX = 24 * 24  # of the parts; fewer in files of version 2


class TextTables:
    """The first byte of a mutant says whether its digest is recomputed."""

    name = "text_tables"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        from tokenizers import normalizers

        from moec.assistant.native_text import tables
        from moec.assistant.role_form import FILE, role_form
        from moec.compiler.tokenizer import load_tokenizer
        from tests.assistant.conversations import template
        from tests.assistant.sentencepiece import trained
        from tests.assistant.speaking import tokenizer
        from tests.assistant.word_tokenizers import trained as trained_words
        from tests.runtime.app import library

        found, names = [], itertools.cycle(("chatml", "hermes", "llama3", "lfm2"))
        bytes_ = tokenizer()
        bytes_.normalizer = normalizers.NFC()
        for made in (tokenizer(), bytes_, trained("llama2"), trained("xlm-r"), trained_words("bert")):
            made.save(str(folder / "tokenizer.json"))
            (folder / FILE).write_text(role_form(template(next(names))).json(), "utf-8")
            found.append(tables(folder, load_tokenizer(folder / "tokenizer.json")))
        (folder / "manifest.json").write_text("{}")
        library()  # built and loaded now: the mutants run in a process of their own
        return found

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = rng.choice(seeds)
        if rng.random() < 0.7:  # numbers, of the index more often
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                end = rng.choice((_HEAD + _INDEX, 6000, len(data)))
                struct.pack_into(
                    "<I", changed, rng.randrange(_HEAD, end - 4, 4), rng.choice((*INTERESTING, rng.randrange(400)))
                )
            data = bytes(changed)
        else:
            data = flip(rng, data)
        return bytes([rng.random() < 0.9]) + data

    def run(self, data: bytes, folder: Path) -> None:
        from tests.runtime import app

        fits, raw = data[:1] == b"\1", bytearray(data[1:])
        if fits and len(raw) >= _HEAD:
            raw[16:_HEAD] = struct.pack("<II", len(raw), zlib.crc32(raw[_HEAD:]))
        (folder / "text.moec").write_bytes(raw)
        # a folder with valid tables still has no program
        with pytest.raises(app.AppError, match=r"text\.moec: |model\.pte: No such file"):
            app.open_artifact(folder)


TARGET = TextTables()
