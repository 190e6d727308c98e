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

from moec.assistant.character_map import clusters_bytes, maps_bytes
from moec.assistant.native_vocabulary import JOINED, UNIGRAM, Decoder, Steps, Vocabulary, check_model
from moec.assistant.role_form import FILE as ROLES
from moec.assistant.sampling import recommended
from moec.assistant.segments import CHANNEL_MARKERS, THINK_MARKERS, has_channels, has_thinking
from moec.assistant.split_program import Unknown, character_class
from moec.assistant.template import ChatTemplate
from moec.assistant.tool_form import KINDS, PARTS, SAYS, WAYS
from moec.assistant.tool_formats import FORMATS, call_markers, tool_format
from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes
from moec.compiler.source import GENERATION, TOKENIZER
from moec.compiler.tokenizer import MAX_BYTES, TextTokenizer

FILE = "text.moec"
PROGRAM = "model.pte"  # the only program that the native runtime opens
MAGIC = b"moectext"
VERSION, EARLIER = 3, 2  # EARLIER where it suffices, so that applications of older versions read it
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
    check_model(raw)
    steps, decoder = Steps.of(raw), Decoder.of(raw)
    vocabulary = Vocabulary(raw, steps, decoder, words.normalized)
    later = steps.later or vocabulary.kind > UNIGRAM or vocabulary.words >= 0 or decoder.between != JOINED
    sets = steps.program.sets
    before, behind = words.adds()
    markers = [t["content"] for t in raw.get("added_tokens") or []]
    parts = {
        b"INFO": struct.pack(
            "<5i", len(vocabulary.texts), vocabulary.kind, vocabulary.unknown, vocabulary.flags, vocabulary.words
        ),
        b"OFFS": _offsets(vocabulary.texts),
        b"TEXT": b"".join(vocabulary.texts),
        b"SORT": array("I", vocabulary.sorted).tobytes(),
        b"MERG": array("I", [n for merge in vocabulary.merges for n in merge]).tobytes(),
        b"SCOR": array("d", vocabulary.scores).tobytes(),
        b"RANG": array("I", [n for ranges in sets for pair in ranges for n in pair]).tobytes(),
        b"SETS": array("I", _sums([len(ranges) for ranges in sets])).tobytes(),
        b"CODE": array("i", [n for instruction in steps.program.code for n in instruction]).tobytes(),
        b"WORD": b"".join(map(_string, steps.words)),
        b"CHNG": array("i", [n for step in steps.normal for n in step]).tobytes(),
        b"STEP": array("i", [n for step in steps.cuts for n in step]).tobytes(),
        b"ADDS": b"".join(
            struct.pack("<2i", *token[:2]) + _string(token[2]) + _string(token[3]) for token in vocabulary.added
        ),
        b"DECO": _decoder(decoder),
        b"AROU": array("i", [len(before), len(behind), *before, *behind]).tobytes(),
        b"SEGM": _segments(folder, words),
        b"NORM": _normal_form() if steps.normal_form else b"",
        b"PROV": b"".join(_proof(words, text) for text in proof_texts(markers)),
        b"ROLE": _roles(folder / ROLES),
        b"SAMP": _sampling(folder / GENERATION),
        b"TOOL": _tools(folder / ROLES),
    }
    if later:
        parts |= {
            b"PIEC": struct.pack("<i", vocabulary.longest_word) + _string(vocabulary.within_word),
            b"MAPS": maps_bytes(steps.maps),
            b"CLUS": clusters_bytes() if steps.clusters else b"",
        }
    return _whole(parts, VERSION if later else EARLIER)


def _whole(parts: dict[bytes, bytes], version: int) -> bytes:
    at = 24 + 24 * len(parts)
    index, body = b"", b""
    for name, content in parts.items():
        index += struct.pack("<4sIQQ", name, 0, at + len(body), len(content))
        body += content + b"\0" * (-len(content) % 8)
    size = at + len(body)
    return MAGIC + struct.pack("<IIII", version, len(parts), size, zlib.crc32(index + body)) + index + body


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


def _decoder(given: Decoder) -> bytes:
    numbers = (given.byte_level, given.byte_fallback, given.strip, given.drop)
    return (
        struct.pack("<4i", *map(int, numbers))
        + _string(given.mark)
        + _string(given.space)
        + (struct.pack("<2i", given.between, given.cleanup) + _string(given.prefix))
    )


def _segments(folder: Path, words: TextTokenizer) -> bytes:
    """How answers are taken apart: by the marks of the chat template (`assistant/segments.py`)."""
    template = ChatTemplate.of_folder(folder)
    text = "" if template is None else template.text
    form, channels = tool_format(text), has_channels(text)
    of_text = CHANNEL_MARKERS if channels else THINK_MARKERS
    of_calls = () if channels else call_markers(form)
    special = words.special_tokens().items()
    found = struct.pack("<3i", channels, has_thinking(text), -1 if form is None else FORMATS.index(form))
    for markers in (of_text, of_calls):
        ids = [id_ for id_, marker in special if marker in markers]
        found += struct.pack("<I", len(ids)) + array("i", ids).tobytes()
    return found


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


def _tools(file: Path) -> bytes:
    """Empty where the template has no form at all."""
    if not file.is_file():
        return b""
    whole = json.loads(file.read_text("utf-8"))
    form, missing = whole.get("tools"), whole.get("no_tools") or ""
    found = struct.pack("<I", 1) + _string(missing)
    if form is None:
        return found if missing else b""
    found += struct.pack("<4i", form["tools_first"], form["said_last"], form["one_call"], SAYS.index(form["says"]))
    found += array("i", [WAYS.index(form["ways"].get(kind, "")) for kind in KINDS]).tobytes()
    for pattern in (form["tool"], form["call"]):
        found += struct.pack("<I", len(pattern["parts"]))
        found += array("i", [PARTS.index(part) for part in pattern["parts"]]).tobytes()
        found += b"".join(map(_string, pattern["texts"]))
    for spelling in (form["tool_spelling"], form["call_spelling"]):
        found += struct.pack("<3i", spelling["ascii"], spelling["indent"], spelling["sorted"])
        found += _string(spelling["item"]) + _string(spelling["key"])
    found += struct.pack("<I", len(form["between"]))
    for key, text in form["between"].items():
        found += struct.pack("<2i", *(KINDS.index(kind) for kind in key.split(">"))) + _string(text)
    return found + struct.pack("<I", len(form["unless_contains"])) + b"".join(map(_string, form["unless_contains"]))


def _sampling(file: Path) -> bytes:
    given = recommended(file)
    return struct.pack("<5d", given.temperature, given.top_k, given.top_p, given.min_p, given.repeat_penalty)


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
