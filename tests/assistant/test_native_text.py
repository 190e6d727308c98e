"""The tables of native apps: the parts of a tokenizer that they know, and what they say of others."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from moec.assistant.character_classes import FILE, classes
from moec.assistant.character_map import precompiled as precompiled_keys
from moec.assistant.native_text import tables, write_text
from moec.assistant.split_program import Program, Unknown, complement, union
from moec.compiler.tokenizer import load_tokenizer
from tests.assistant.character_tables import double_array, precompiled
from tests.assistant.speaking import tokenizer


@pytest.mark.slow
def test_the_classes_are_the_librarys() -> None:
    """Written again with the `tokenizers` that is installed."""
    assert json.loads(FILE.read_text("ascii")) == classes()


def test_sets() -> None:
    assert union([(5, 9)], [(10, 12), (1, 2)]) == ((1, 2), (5, 12))
    assert complement(complement(((3, 4), (9, 0x10FFFF)))) == ((3, 4), (9, 0x10FFFF))
    assert complement(()) == ((0, 0x10FFFF),)


@pytest.mark.parametrize(
    "expression",
    ["^a", "a$", "(a*)*", "a{2}+", "[[:alpha:]]", "[a&&b]", r"\bx", "(?<=a)b", "(?<name>a)", "a**", "(a", "[a",
     r"\p{Foo}", "a{3,1}", "(?i:é)", "[z-a]", "a)", "\\", "x" * 30_000],
)  # fmt: skip
def test_expressions_that_are_not_known(expression: str) -> None:
    with pytest.raises(Unknown):
        Program().add(expression)


def faulty(**changes: Any) -> Tokenizer:
    made = tokenizer()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


UNKNOWN: dict[str, tuple[Tokenizer, str]] = {
    "normalizer": (faulty(normalizer=normalizers.Nmt()), "the normalizer Nmt"),
    "sequence": (
        faulty(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])),
        "the normalizer NFKC",
    ),
    "cut": (faulty(pre_tokenizer=pre_tokenizers.CharDelimiterSplit("-")), "the pre-tokenizer CharDelimiterSplit"),
    "parts": (faulty(pre_tokenizer=pre_tokenizers.Digits()), "byte-level in part"),
    "scheme": (
        faulty(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(), pre_tokenizers.Metaspace("▁", "first", False)]
            )
        ),
        "the scheme first behind another",
    ),
    "behavior": (
        faulty(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex("a"), "contiguous"), pre_tokenizers.ByteLevel()]
            )
        ),
        "Contiguous",
    ),
    "decoder": (faulty(decoder=decoders.CTC()), "the decoder CTC"),
    "bytes of words": (faulty(model=models.WordLevel({"a": 0}, "a")), "WordLevel of bytes"),
    "unknown word": (Tokenizer(models.WordLevel({"a": 0}, "b")), "whose unk_token is not in the vocabulary"),
    "prefix": (
        Tokenizer(models.WordPiece({"a": 0}, unk_token="a", continuing_subword_prefix="#" * 65)),
        "a long prefix",
    ),
    "many": (faulty(normalizer=normalizers.Sequence([normalizers.NFC()] * 17)), "more than 16 normalizers"),
    "tables": (
        faulty(normalizer=normalizers.Sequence([precompiled(double_array({b"a": t})) for t in "bcdef"])),
        "more than 4 tables",
    ),
    "fallback": (faulty(model=models.BPE({"a": 0}, [], byte_fallback=True)), "byte_fallback of byte-level BPE"),
    "strip": (
        faulty(
            decoder=decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("x", 1, 0)]
            )
        ),
        "the decoder Strip",
    ),
    "long": (faulty(normalizer=normalizers.Prepend("x" * 100)), "a long text"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_a_note(tmp_path: Path, name: str) -> None:
    made, words = UNKNOWN[name]
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "model.pte").write_bytes(b"")
    files, (note,) = write_text(tmp_path, load_tokenizer(tmp_path / "tokenizer.json"))
    assert files == ()
    assert words in note
    assert not (tmp_path / "text.moec").exists()


def test_what_older_applications_know_is_written_as_they_read_it(tmp_path: Path) -> None:
    """Version 3 only where a tokenizer needs it."""
    for given, version in ((None, 2), (AddedToken("<y>"), 2), (AddedToken("<x>", single_word=True), 3)):
        made = tokenizer()
        made.add_special_tokens([] if given is None else [given])
        made.save(str(tmp_path / "tokenizer.json"))
        assert tables(tmp_path, load_tokenizer(tmp_path / "tokenizer.json"))[8:12] == bytes([version, 0, 0, 0])


def test_the_keys_of_a_table_are_the_shortest() -> None:
    texts = {b"a": "x", b"ab": "y", "é".encode(): "", b"bcdef": "5", b"bcdegh": "6", b"\xe4\xb8": "z"}
    keys = [(b"a", "x"), (b"bcdef", "5"), ("é".encode(), ""), (b"\xe4\xb8", "z")]
    assert precompiled_keys(encoded(double_array(texts))) == keys


def encoded(table: bytes) -> str:
    return base64.b64encode(table).decode()


def damaged_tables() -> dict[str, str]:
    whole = double_array({b"a": "x", b"ab": "y", b"b": "é"})
    units = list(struct.unpack_from(f"<{(len(whole) - 9) // 4}I", whole, 4))
    size = struct.unpack_from("<I", whole)[0]

    def changed(place: int, unit: int) -> str:
        return encoded(whole[: 4 + 4 * place] + struct.pack("<I", unit) + whole[8 + 4 * place :])

    leaf = next(place for place, unit in enumerate(units) if unit >> 31)
    begin = units[0] >> 10
    return {
        "no base64": "x$",
        "empty": "",
        "no units": encoded(bytes(4)),
        "cut off": encoded(whole[:1000]),
        "a length beyond the end": encoded(struct.pack("<I", size + 1024) + whole[4:]),
        "a part of a block": encoded(struct.pack("<I", size - 8) + whole[4:]),
        "a node outside": changed(begin + ord("a"), ord("a") | 0x100 | 1 << 30),
        "a text outside": changed(leaf, 1 << 31 | 1000),
        "half a character": changed(leaf, 1 << 31 | (len(whole) - 4 - size - 2)),
        "a circle": changed(begin + ord("a"), ord("a") | ((begin + ord("a")) ^ begin) << 10),
    }


@pytest.mark.parametrize("damage", damaged_tables())
def test_damaged_tables_are_refused_or_end(damage: str) -> None:
    if damage == "a circle":  # keys of as many bytes as count, and no more
        assert max(len(key) for key, _ in precompiled_keys(damaged_tables()[damage])) <= 5
        return
    with pytest.raises(Unknown, match="damaged"):
        precompiled_keys(damaged_tables()[damage])


def test_a_large_table_is_refused() -> None:
    with pytest.raises(Unknown, match="a text of 65 characters"):
        precompiled_keys(encoded(double_array({b"a": "x" * 65})))
    with pytest.raises(Unknown, match="2,097,152 units"):
        precompiled_keys(encoded(struct.pack("<I", 4 << 21) + bytes(4 << 21)))


def test_no_tables_without_a_program_or_a_tokenizer(tmp_path: Path) -> None:
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert write_text(tmp_path, load_tokenizer(tmp_path / "tokenizer.json")) == ((), ())
    assert write_text(tmp_path, None) == ((), ())
