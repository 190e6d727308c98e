"""Texts that are changed by tables of characters and cut into words, in the library of applications and in Python."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from moec.assistant import character_map
from moec.assistant.character_classes import LAST, SURROGATES
from moec.assistant.cluster_classes import letter_map
from moec.assistant.native_text import FILE
from moec.assistant.split_program import character_class
from tests.assistant.character_tables import double_array, precompiled, sentencepieces
from tests.assistant.word_tokenizers import KINDS, trained
from tests.runtime import app
from tests.runtime.app_text import compare_with, opened_with
from tests.tiny import TinyModels, tiny_text

CLUSTERS = (
    *("joins", "prepends", "breaks", "leads", "vowels", "trails", "pictographs", "extends"),
    *("consonants", "linkers", "conjuncts"),
)


@pytest.fixture(scope="module")
def folder(tiny: TinyModels) -> Path:
    return tiny(tiny_text()) / "artifact"


def of_bytes(normalizer: normalizers.Normalizer) -> Tokenizer:
    """Every byte of the changed text is a token, so that ids say just what the text became."""
    vocabulary = {text: id_ for id_, text in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizer
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def clustered_texts(seed: int, count: int) -> list[str]:
    """Characters of every class that clusters are made of, few of each, so that rules meet. Pairs of
    pictographs and of consonants, with a mark behind: a cluster short enough for a table, where it begins anew."""
    drawn = random.Random(seed)
    kinds = [[c for low, high in character_class(f"cluster_{name}") for c in range(low, high + 1)] for name in CLUSTERS]
    kinds += [[0x61, 0x20, 0xE9, 0x4E2D, 0xAC00, 0xAC01, 0xD7A3], [0x1F1E6, 0x1F1E7], [13, 10], [0x200D, 0x94D, 0x301]]
    found = []
    for _ in range(count):
        few = [drawn.choice(drawn.choice(kinds)) for _ in range(drawn.choice((2, 4, 8)))]
        codes = [drawn.choice(few) if drawn.random() < 0.8 else drawn.choice(drawn.choice(kinds)) for _ in range(24)]
        found.append("".join(map(chr, codes)))
    of = dict(zip(CLUSTERS, kinds, strict=False))
    for first, middle, last in (
        ("pictographs", ["extends", "joins"], "\u200d"),
        ("consonants", ["conjuncts", "linkers", "joins"], ""),
    ):
        short = [c for c in of[first] if c < 0x10000]
        for _ in range(count // 2):
            text = ""
            for _ in range(drawn.randrange(2, 5)):
                between = drawn.choices([of[name] for name in middle], k=drawn.randrange(3))
                text += chr(drawn.choice(short)) + "".join(chr(drawn.choice(codes)) for codes in between)
                text += last if drawn.random() < 0.8 else ""
            found.append(text + chr(drawn.choice(short)) + "\u0301")
    return found


def drawn_table(seed: int) -> bytes:
    """Keys of one to seven bytes: characters, clusters, parts of characters, beginnings of each other."""
    drawn = random.Random(seed)
    texts = {}
    for text in clustered_texts(seed, 30):
        at = drawn.randrange(len(text))
        key = text[at : at + drawn.choice((1, 1, 2, 3))].encode().replace(b"\0", b"")
        key = key[: drawn.choice((1, 2, 3, 7, 7, 7))]
        if key:
            texts[key] = drawn.choice(("", "x", "日本", "e\u0301", "\U0001f642 y", " "))
    return double_array(texts)


@pytest.mark.parametrize("seed", range(4))
def test_tables_of_characters_are_applied_to_clusters(seed: int, folder: Path, tmp_path: Path) -> None:
    """A table that turns each cluster into a letter counts them; drawn ones have keys of every kind."""
    table = letter_map("Y") if seed == 0 else drawn_table(seed)
    made = of_bytes(precompiled(table))
    assert seed or made.normalizer.normalize_str("e\u0301\r\nx가\u0301") == "YYYY"
    compare_with(made, folder, tmp_path / "copy", clustered_texts(seed, 400))


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf"])
def test_sentencepieces_tables(rule: str, folder: Path, tmp_path: Path) -> None:
    """Every character alone, and what random ones of many scripts become."""
    made = of_bytes(precompiled(sentencepieces(rule)))
    every = [chr(c) for c in range(1, LAST + 1) if c not in SURROGATES]
    drawn = random.Random(3)
    texts = clustered_texts(9, 150)
    for _ in range(150):
        letters = drawn.choices(
            ("e", "A", "ﬁ", "½", "Ａ", "カ", "ﾊ", "㌔", "ᄒ", "ᅡ", "ᆫ", "ї", "ا", "ç", "①", "™"), k=20
        )
        marks = drawn.choices(("", "", "\u0301", "\u0308", "\u3099", "ﾟ", "\u0327", "\u200d", " ", "\u0653"), k=20)
        texts.append("".join(letter + mark for letter, mark in zip(letters, marks, strict=True)))
    with opened_with(made, folder, tmp_path / "copy") as artifact:
        for text in (
            "\n".join(every[:0x3400]),
            "\n".join(every[0x9FA0:0xAC10]),
            "".join(every[0xD000:0x14000]),
            *texts,
        ):
            assert app.tokenize(artifact, text) == made.encode(text).ids


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Lowercase(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        normalizers.BertNormalizer(),
        normalizers.BertNormalizer(lowercase=False, strip_accents=True, handle_chinese_chars=False),
    ],
    ids=lambda given: type(given).__name__,
)
def test_each_character_changes_as_in_the_library(
    normalizer: normalizers.Normalizer, folder: Path, tmp_path: Path
) -> None:
    made = of_bytes(normalizer)
    every = [chr(c) for c in range(LAST + 1) if c not in SURROGATES]
    with opened_with(made, folder, tmp_path / "copy") as artifact:
        for begin in (
            *range(0, 0x3400, 0x400),
            0x9F00,
            *range(0xA000, 0xAC00, 0x400),
            0xD000,
            0xF000,
            0x10000,
            0x1E000,
        ):
            text = "a".join(every[begin : begin + 0x400])
            assert app.tokenize(artifact, text) == made.encode(text).ids


@pytest.mark.parametrize("name", KINDS)
def test_words(name: str, folder: Path, tmp_path: Path) -> None:
    made = trained(name)
    words = [
        "Don't ! I've you're .",
        "unaffable" * 4,
        "né né. née Wort Wort_ (Wort) Wort\u0301 中Wort",
        "<Tool>s <tool>s x",
    ]
    compare_with(made, folder, tmp_path / "copy", words)
    drawn, count = random.Random(2), made.get_vocab_size()
    with opened_with(made, folder, tmp_path / "again") as artifact:
        for _ in range(60):
            ids = [drawn.randrange(count) for _ in range(drawn.randrange(40))]
            assert app.detokenize(artifact, ids) == made.decode(ids)
            assert app.detokenize(artifact, ids, app.SPECIAL) == made.decode(ids, skip_special_tokens=False)


def test_tokens_that_are_single_words(folder: Path, tmp_path: Path) -> None:
    """Found only where no character of a word stands beside them; the longest that is no word hides a shorter one."""
    made = of_bytes(normalizers.Prepend("_"))
    made.add_tokens(
        [
            AddedToken("cat", single_word=True, normalized=False),
            AddedToken("cat s", single_word=True, normalized=False, lstrip=True, rstrip=True),
            AddedToken("hat", single_word=True, normalized=True),
            AddedToken("!", single_word=True, normalized=False),
        ]
    )
    made.add_special_tokens([AddedToken("<x>", single_word=True)])
    drawn = random.Random(1)
    parts = (
        "cat",
        "cat",
        " s",
        "hat",
        "_hat",
        "!",
        "<x>",
        " ",
        " ",
        "é",
        "\u0301",
        "字",
        "_",
        "-",
        "१",
        "\u200d",
        "²",
        "\U00010400",
    )
    texts = ["".join(drawn.choices(parts, k=drawn.randrange(1, 9))) for _ in range(400)]
    compare_with(made, folder, tmp_path / "copy", texts)
    with opened_with(made, folder, tmp_path / "again") as artifact:
        assert app.tokenize(artifact, "a cat, cats", app.PLAIN)[3] == made.token_to_id("cat")
        assert app.tokenize(artifact, "<x>", app.PLAIN) == [made.token_to_id("<x>")]
        assert app.tokenize(artifact, "<x>", app.PLAIN | app.AS_TEXT) == made_as_text(made, "<x>")


def test_tokens_that_begin_each_other(folder: Path, tmp_path: Path) -> None:
    """The longest is found, of each stage."""
    made = of_bytes(normalizers.Prepend("_"))
    texts = ["<", "<a", "<a>", "<a><b>", "<ab", "<b>", "é", "éé", "ééé<", "\n\n", "\n\n\n\n"]
    made.add_tokens([AddedToken(text, normalized=False) for text in texts[::2]])
    made.add_tokens([AddedToken(text, normalized=True) for text in texts[1::2]])
    drawn = random.Random(3)
    more = ["".join(drawn.choices("<ab>é\n", k=drawn.randrange(1, 30))) for _ in range(300)]
    compare_with(made, folder, tmp_path / "copy", more)


def test_added_tokens_that_take_too_long_are_an_error(folder: Path, tmp_path: Path) -> None:
    """One that is begun at every character and never found, and many that begin alike."""
    made = of_bytes(normalizers.Prepend("_"))
    made.add_tokens([AddedToken("a" * 400 + "b", normalized=False)])
    made.add_tokens([AddedToken(f"<unused {i}>", normalized=False) for i in range(6000)])
    with opened_with(made, folder, tmp_path / "copy") as artifact:
        assert len(app.tokenize(artifact, "a" * 200, app.PLAIN)) == 201
        assert len(app.tokenize(artifact, "<unused 7" * 1000, app.PLAIN)) == 9001
        with pytest.raises(app.AppError, match="take too long"):
            app.tokenize(artifact, "a" * 19_000)


def made_as_text(made: Tokenizer, text: str) -> list[int]:
    made.encode_special_tokens = True
    return list(made.encode(text).ids)


def part_of(raw: bytes, name: bytes) -> int:
    """Where a part of a `text.moec` begins."""
    at = next(at for at in range(24, len(raw), 24) if raw[at : at + 4] == name)
    return int(struct.unpack_from("<Q", raw, at + 8)[0])


#: part, offset in it, format, what is written there. MAPS: u32 maps, u32 entries, u32 codes, rows of 16 bytes, codes
DAMAGE = {
    "more tables than any tokenizer has": (b"MAPS", 0, "<I", 5),
    "rows beyond the part": (b"MAPS", 4, "<I", 1 << 28),
    "keys out of order": (b"MAPS", 12, "<Q", 0x7A << 56),
    "a key that begins another": (b"MAPS", 28, "<Q", 0x6162 << 48),
    "a key of six bytes": (b"MAPS", 28, "<Q", 0x626262626262 << 16),
    "a key with a gap": (b"MAPS", 28, "<Q", 0x620062 << 40),
    "no key": (b"MAPS", 12, "<Q", 0),
    "a text outside": (b"MAPS", 20, "<I", 4),
    "a text that ends outside": (b"MAPS", 24, "<I", 4),
    "half a pair of surrogates": (b"MAPS", 44, "<I", 0xD800),
    "no code point": (b"MAPS", 44, "<I", 0x110000),
    "classes out of order": (b"CLUS", 12, "<I", 0),
    "a class that ends before it begins": (b"CLUS", 4, "<i", -1),
    "a table that is not there": (b"CHNG", 8, "<i", 1),
    "a way that is not known": (b"CHNG", 12, "<i", 3),
    "a step that is not known": (b"CHNG", 0, "<i", 12),
    "words of no set": (b"INFO", 16, "<i", 1000),
    "a long prefix": (b"PIEC", 4, "<I", 65),
    "a way between tokens": (b"DECO", 32, "<i", 3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_parts_are_refused(damage: str, folder: Path, tmp_path: Path) -> None:
    """With a digest that is right; what is said is one line."""
    copy = tmp_path / "copy"
    made = of_bytes(precompiled(double_array({b"a": "x", b"b": "yz"})))
    made.add_tokens([AddedToken("cat", single_word=True)])
    with opened_with(made, folder, copy):
        pass
    raw = bytearray((copy / FILE).read_bytes())
    assert raw[8] == 3
    part, offset, form, value = DAMAGE[damage]
    struct.pack_into(form, raw, part_of(raw, part) + offset, value)
    raw[20:24] = zlib.crc32(raw[24:]).to_bytes(4, "little")
    (copy / FILE).write_bytes(raw)
    with pytest.raises(app.AppError, match=r"text\.moec: damaged: (an )?impossible [a-z ]+$"):
        app.open_artifact(copy)


def test_a_long_text_for_a_character_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Python does not write: a short text would become one that fills the memory."""
    monkeypatch.setattr(character_map, "_LONGEST_TEXT", 1000)
    with opened_with(of_bytes(precompiled(double_array({b"a": "x" * 64}))), folder, tmp_path / "longest") as artifact:
        assert len(app.tokenize(artifact, "aa", app.PLAIN)) == 128
    with pytest.raises(app.AppError, match="an impossible table of characters"):  # noqa: SIM117
        with opened_with(of_bytes(precompiled(double_array({b"a": "x" * 65}))), folder, tmp_path / "longer"):
            pass


def test_a_word_that_takes_too_long_is_an_error(folder: Path, tmp_path: Path) -> None:
    """A vocabulary whose longest token is begun at every character and never found: an error, not minutes."""
    vocabulary = {"[UNK]": 0, "a": 1, "##a": 2, "##" + "a" * 20_000 + "b": 3}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=1 << 20))
    with opened_with(made, folder, tmp_path / "copy") as artifact:
        assert len(app.tokenize(artifact, "a" * 200, app.PLAIN)) == 200
        with pytest.raises(app.AppError, match="too many steps"):
            app.tokenize(artifact, "a" * 19_000)
