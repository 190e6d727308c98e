"""The tables of native apps: the parts of a tokenizer that they know, and what they say of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from moec.assistant.character_classes import FILE, classes
from moec.assistant.native_text import tables, write_text
from moec.assistant.split_program import Program, Unknown, complement, union
from moec.compiler.tokenizer import load_tokenizer
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
    "normalizer": (faulty(normalizer=normalizers.Lowercase()), "the normalizer Lowercase"),
    "sequence": (
        faulty(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])),
        "the normalizer NFKC",
    ),
    "cut": (faulty(pre_tokenizer=pre_tokenizers.Whitespace()), "the pre-tokenizer Whitespace"),
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
    "decoder": (faulty(decoder=decoders.WordPiece()), "the decoder WordPiece"),
    "model": (Tokenizer(models.WordLevel({"a": 0}, "a")), "the model WordLevel"),
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


def test_added_tokens_that_are_words_are_not_known(tmp_path: Path) -> None:
    made = tokenizer()
    made.add_special_tokens([AddedToken("<x>", single_word=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Unknown, match="single_word of the token <x>"):
        tables(tmp_path, load_tokenizer(tmp_path / "tokenizer.json"))


def test_no_tables_without_a_program_or_a_tokenizer(tmp_path: Path) -> None:
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert write_text(tmp_path, load_tokenizer(tmp_path / "tokenizer.json")) == ((), ())
    assert write_text(tmp_path, None) == ((), ())
