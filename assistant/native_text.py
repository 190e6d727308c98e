"""`text.moec` in an artifact: tokenizer, chat form and sampling defaults as tables that native apps read and check.

A native app has no JSON parser, no regular expressions and no Unicode tables. `tokenizer.json` is compiled into a
vocabulary, merges sorted for search, and programs that split a text (`assistant/split_program.py`). The file also holds
texts in many scripts with the ids that `tokenizers` gives for them; opening it compares them, so that a tokenizer that
is not exact is refused instead of giving wrong ids. `runtime/app/text_tables.h` reads it and describes the layout.
"""

from __future__ import annotations

import json
import random
import struct
import unicodedata
import zlib
from array import array
from functools import cache
from pathlib import Path
from typing import Any

from moec.assistant.role_form import FILE as ROLES
from moec.assistant.sampling import recommended
from moec.assistant.split_program import Program, Unknown, character_class
from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes
from moec.compiler.source import GENERATION, TOKENIZER
from moec.compiler.tokenizer import MAX_BYTES, TextTokenizer

FILE = "text.moec"
PROGRAM = "model.pte"  # the only program that the native runtime opens
MAGIC, VERSION = b"moectext", 1
# GPT-2's expression, by which `ByteLevel` splits
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CUT, _CUT_DROP, _PREFIX_SPACE = range(3)
_SPECIAL, _NORMALIZED = 1, 2
_TRIMS = {None: 0, "both": 1, "newlines": 2}

#: Texts in widely used scripts, and cases that tokenizers often get wrong.
TEXTS = (
    "Hello, world! It's 1234567 tests, isn't it? WE'LL see; they'Ve gone.",
    "Привет, мир! Ёлка стоит 25 рублей.",
    "Γειά σου Κόσμε, τι κάνεις;",
    "مرحبا بالعالم ١٢٣٤",
    "שלום עולם, מה שלומך?",
    "नमस्ते दुनिया १२३ कैसे हो",
    "வணக்கம் உலகம்",
    "สวัสดีชาวโลก ๑๒๓",
    "日本語のテキスト。漢字かな交じり文１２３",
    "你好，世界！今天是二〇二六年。",
    "한국어 텍스트입니다",
    "Xin chào thế giới",
    "Ǖ u\u0308\u0304 q\u0323\u0307 q\u0307\u0323 \u1112\u1161\u11ab 각 \u212b \u0958 \u2126 ﬁ \u0344",
    "Çok güzel bir gün, İstanbul!",
    "ქართული ენა",
    "አማርኛ ጽሑፍ",
    "🙂👩\u200d👩\u200d👧\u200d👦🇩🇪 e\u0301 café ½ ² Ⅷ ㊿",
    "  two  spaces\n\n\n\ttabs\t\t \r\n windows\r\n\r\n  ",
    "\u00a0\u2003x\u3000y\u200bz\ufeff",
    "def f(x):\n    return x ** 2  # ok\n",
    "a" * 70 + " " + "ab" * 40,
    " ",
    "\n",
    "'",
    "''s",
    "100000000000 1.5e-10 0x7fff",
    "https://example.org/a?b=c&d=%20#x",
    '{"key": [1, 2, null], "text": "\\u00e9"}',
    "\ufffd\ufffdA\ufffd",
    "\u0000\u0001\u007f\u0080",
    "ſ K 'ſ 'S",
    "",
)


def proof_texts(markers: list[str]) -> list[str]:
    """The texts to compare: TEXTS, random bytes and characters, and special tokens within text."""
    drawn = random.Random(7)
    found = list(TEXTS)
    for _ in range(24):
        found.append(bytes(drawn.randrange(256) for _ in range(drawn.randrange(1, 60))).decode("utf-8", "replace"))
        ranges = ((32, 127), (0x80, 0x250), (0x250, 0xD7FF), (0xE000, 0xFFFF), (0x1F000, 0x1FFFF), (9, 33))
        found.append("".join(chr(drawn.randrange(*drawn.choice(ranges))) for _ in range(drawn.randrange(1, 40))))
    for index in range(0, len(markers), max(1, len(markers) // 16)):
        found.append(f"a {markers[index]}{markers[index]} b{markers[index][:-1]}")
    return found


def write_text(folder: Path, words: TextTokenizer | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the tables beside a model's tokenizer.json. Returns the names of files written, and notes for the user."""
    if words is None or not (folder / PROGRAM).is_file():
        return (), ()
    try:
        (folder / FILE).write_bytes(tables(folder, words))
    except Unknown as reason:
        return (), (f"tokenizer: native apps tokenize with another library, since {FILE} does not know {reason}",)
    except UserError as error:
        return (), (f"tokenizer: no {FILE} for native apps: {error.message}",)
    return (FILE,), ()


def tables(folder: Path, words: TextTokenizer) -> bytes:
    """The content of the file. Unknown for a tokenizer that the tables cannot express."""
    raw = json.loads(read_bytes(folder / TOKENIZER, limit=MAX_BYTES))
    vocabulary = _Vocabulary(raw)
    splits, steps = _steps(raw)
    composed = _composed(raw.get("normalizer"))
    before, behind = words.adds()
    markers = [t["content"] for t in raw.get("added_tokens") or []]
    parts = {
        b"INFO": array("i", [len(vocabulary.texts), int(raw["model"].get("ignore_merges") or False)]).tobytes(),
        b"OFFS": _offsets(vocabulary.texts),
        b"TEXT": b"".join(vocabulary.texts),
        b"SORT": array("I", vocabulary.sorted).tobytes(),
        b"MERG": array("I", [n for merge in vocabulary.merges for n in merge]).tobytes(),
        b"RANG": array("I", [n for ranges in splits.sets for pair in ranges for n in pair]).tobytes(),
        b"SETS": array("I", _sums([len(ranges) for ranges in splits.sets])).tobytes(),
        b"CODE": array("i", [n for instruction in splits.code for n in instruction]).tobytes(),
        b"STEP": array("i", [n for step in steps for n in step]).tobytes(),
        b"ADDS": array("i", [n for pair in vocabulary.added for n in pair]).tobytes(),
        b"AROU": array("i", [len(before), len(behind), *before, *behind]).tobytes(),
        b"NORM": _normal_form() if composed else b"",
        b"PROV": b"".join(_proof(words, text) for text in proof_texts(markers)),
        b"ROLE": _roles(folder / ROLES),
        b"SAMP": _sampling(folder / GENERATION),
    }
    return _whole(parts)


def _whole(parts: dict[bytes, bytes]) -> bytes:
    at = 24 + 24 * len(parts)
    index, body = b"", b""
    for name, content in parts.items():
        index += struct.pack("<4sIQQ", name, 0, at + len(body), len(content))
        body += content + b"\0" * (-len(content) % 8)
    size = at + len(body)
    return MAGIC + struct.pack("<IIII", VERSION, len(parts), size, zlib.crc32(index + body)) + index + body


def _sums(counts: list[int]) -> list[int]:
    found = [0]
    for count in counts:
        found.append(found[-1] + count)
    return found


def _offsets(texts: list[bytes]) -> bytes:
    return array("I", _sums([len(text) for text in texts])).tobytes()


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw + b"\0" * (-len(raw) % 4)


def _proof(words: TextTokenizer, text: str) -> bytes:
    ids = words.encode(text, special_tokens=False)
    shown = words.decode(ids)
    return _string(text) + struct.pack("<I", len(ids)) + array("i", ids).tobytes() + _string(shown)


def _roles(file: Path) -> bytes:
    """Empty where the template has no form."""
    if not file.is_file():
        return b""
    form = json.loads(file.read_text("utf-8"))
    system = form["before_system"] is not None
    found = struct.pack(
        "<I4i", 1, int(system), *(_TRIMS[form["trims"].get(r)] for r in ("system", "user", "assistant"))
    )
    texts = [form["begin"], form["before_system"] or "", form["after_system"] or ""]
    texts += [form[key][role] for role in ("user", "assistant") for key in ("before", "after")]
    texts += [form["answer"], *form["unless_contains"]]
    return found + struct.pack("<I", len(texts)) + b"".join(map(_string, texts))


def _sampling(file: Path) -> bytes:
    given = recommended(file)
    return struct.pack("<5d", given.temperature, given.top_k, given.top_p, given.min_p, given.repeat_penalty)


class _Vocabulary:
    """texts: the bytes of each id. sorted: ids of tokens that merging can give, by their bytes. merges: (left, right,
    rank, result), sorted. added: (id, flags) of the tokens that are found before a text is split."""

    def __init__(self, raw: dict[str, Any]) -> None:
        model = raw.get("model") or {}
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise Unknown(f"the model {model.get('type')}")
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(key):
                raise Unknown(f"{key} of BPE")
        decoder = raw.get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise Unknown(f"the decoder {decoder.get('type')}")
        letters = _byte_letters()
        self.texts: list[bytes] = []
        placed: dict[bytes, int] = {}
        added = {t["id"]: t for t in raw.get("added_tokens") or []}
        count = 1 + max([*model["vocab"].values(), *added, -1])
        if not 0 < count <= 1 << 24:
            raise Unknown(f"a vocabulary of {count}")
        self.texts = [b""] * count
        for text, id_ in model["vocab"].items():
            content = bytes(letters[c] for c in text) if all(c in letters for c in text) else None
            self.texts[id_] = text.encode() if content is None else content
            if content is not None:
                placed[content] = id_
        self.added = []
        for id_, token in sorted(added.items()):
            for key in ("lstrip", "rstrip", "single_word"):
                if token.get(key):
                    raise Unknown(f"{key} of the token {token['content']}")
            content = token["content"]
            decoded = all(c in letters for c in content)
            self.texts[id_] = bytes(letters[c] for c in content) if decoded else content.encode()
            if self.texts[id_] != content.encode():
                raise Unknown(f"the token {content!r}, which stands for other bytes")
            if token.get("normalized") and unicodedata.normalize("NFC", content) != content:
                raise Unknown(f"the token {content!r}, which is not in normal form C")
            flags = (_SPECIAL if token["special"] else 0) | (_NORMALIZED if token.get("normalized") else 0)
            self.added.append((id_, flags))
        self.sorted = [placed[content] for content in sorted(placed)]
        self.merges = []
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            pair = [model["vocab"].get(text) for text in (left, right, left + right)]
            if None in pair:
                raise Unknown(f"the merge {merge!r} of tokens that the vocabulary lacks")
            self.merges.append((pair[0], pair[1], rank, pair[2]))
        self.merges.sort()


def _byte_letters() -> dict[str, int]:
    """Character -> byte of `ByteLevel`: printable bytes are themselves, the others are numbered from 256."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


def _steps(raw: dict[str, Any]) -> tuple[Program, list[tuple[int, int]]]:
    """How a text is split: steps (kind, where the program of its expression begins), each applied to every piece."""
    program, steps = Program(), []
    parts = [raw.get("pre_tokenizer") or {}]
    if parts[0].get("type") == "Sequence":
        parts = parts[0]["pretokenizers"]
    if not parts or parts[-1].get("type") != "ByteLevel":
        raise Unknown("a tokenizer that is not byte-level")
    for part in parts:
        kind = part.get("type")
        if kind == "ByteLevel":
            if part is not parts[-1]:
                raise Unknown("ByteLevel before another pre-tokenizer")
            if part.get("add_prefix_space"):
                steps.append((_PREFIX_SPACE, 0))
            if part.get("use_regex", True):
                steps.append((_CUT, program.add(_GPT2)))
        elif kind == "Digits":
            every = part.get("individual_digits", False)
            steps.append((_CUT, program.add_set(character_class("numeric"), repeated=not every)))
        elif kind == "Split":
            steps.append((_kept(part), _pattern(program, part.get("pattern") or {})))
        else:
            raise Unknown(f"the pre-tokenizer {kind}")
    return program, steps


def _composed(normalizer: dict[str, Any] | None) -> bool:
    """Whether texts are first normalized to NFC."""
    parts = [] if normalizer is None else [normalizer]
    if normalizer is not None and normalizer.get("type") == "Sequence":
        parts = normalizer["normalizers"]
    if other := [part.get("type") for part in parts if part.get("type") != "NFC"]:
        raise Unknown(f"the normalizer {other[0]}")
    return bool(parts)


@cache
def _normal_form() -> bytes:
    """Unicode's decompositions, combining classes and compositions, without Hangul's, which are computed by a rule.

    Only code points that `tokenizers` normalizes. u32 counts of the three, then their rows: a code point and its up to
    four parts; first, last and class; two code points and their composition.
    """
    classes: list[list[int]] = []
    for code in _codes("marks"):
        combining = unicodedata.combining(chr(code))
        if classes and classes[-1][1:] == [code - 1, combining]:
            classes[-1][1] = code
        else:
            classes.append([code, code, combining])
    whole = []
    for code in _codes("decomposed"):
        parts = [ord(c) for c in unicodedata.normalize("NFD", chr(code))]
        whole.append([code, *parts, *[0] * (4 - len(parts))])
    composed = [(code, unicodedata.decomposition(chr(code)).split()) for code in _codes("composed")]
    pairs = sorted([int(part, 16) for part in two] + [code] for code, two in composed if len(two) == 2)
    rows = [n for table in (whole, classes, pairs) for row in table for n in row]
    return struct.pack("<3I", len(whole), len(classes), len(pairs)) + array("I", rows).tobytes()


def _codes(name: str) -> list[int]:
    return [code for low, high in character_class(name) for code in range(low, high + 1)]


def _kept(part: dict[str, Any]) -> int:
    """The kind of a step: whether text that its expression does not match is a piece or dropped."""
    behavior, invert = part.get("behavior"), part.get("invert", False)
    if behavior == "Isolated":  # matches and the text between them are all pieces, inverted or not
        return _CUT
    if behavior == "Removed" and invert:
        return _CUT_DROP
    raise Unknown(f"Split with the behavior {behavior}")


def _pattern(program: Program, pattern: dict[str, Any]) -> int:
    if pattern.get("String"):
        return program.add_text(pattern["String"])
    if pattern.get("Regex"):
        return program.add(pattern["Regex"])
    raise Unknown("Split without a pattern")
