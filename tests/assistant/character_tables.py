"""Tables of characters as `Precompiled` normalizers have them: built here, or SentencePiece's own."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Iterator, Mapping
from functools import cache

from tokenizers import normalizers


def double_array(texts: Mapping[bytes, str]) -> bytes:
    """A table with these keys: every node of the trie has a block of 256 units of its own."""
    units, blob = [0] * 256, b""

    def place(at: int, label: int, keys: dict[bytes, str]) -> None:
        nonlocal blob
        base = len(units)
        units.extend([0] * 256)
        units[at] = (base ^ at) << 10 | label | (b"" in keys) << 8
        for byte in sorted({key[0] for key in keys if key}):
            place(base + byte, byte, {key[1:]: text for key, text in keys.items() if key[:1] == bytes([byte])})
        if b"" in keys:
            units[base] = 1 << 31 | len(blob)
            blob += keys[b""].encode() + b"\0"

    place(0, 0, dict(texts))
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + blob


def precompiled(table: bytes) -> normalizers.Normalizer:
    """The normalizer with this table, by way of a file as checkpoints have it."""
    from tokenizers import Tokenizer, models

    plain = json.loads(Tokenizer(models.WordLevel({"a": 0}, "a")).to_str())
    plain["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    return Tokenizer.from_str(json.dumps(plain)).normalizer


@cache
def sentencepieces(rule: str) -> bytes:
    """SentencePiece's table of this name, `nmt_nfkc` or another, out of a model that it trains."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a text of some words"] * 20),
        model_writer=written,
        vocab_size=20,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        minloglevel=2,
    )
    model = dict(_fields(written.getvalue()))
    return dict(_fields(model[3]))[2]  # normalizer_spec, precompiled_charsmap


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protocol buffer that have a length."""
    at = 0

    def number() -> int:
        nonlocal at
        found = shift = 0
        while True:
            byte = message[at]
            at += 1
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found

    while at < len(message):
        key = number()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if size == 0:
            number()
            continue
        size = number() if size is None else size
        at += size
        if key & 7 == 2:
            yield key >> 3, message[at - size : at]
