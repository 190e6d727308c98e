"""What native apps need of a `tokenizer.json`: vocabulary, merges or scores, added tokens, changes and cuts of texts.

Three kinds of model are known: byte-level BPE; BPE of characters, as SentencePiece trains it (Llama 2, Mistral, Phi-3,
Gemma); Unigram. Everything else is `Unknown` with what it is. The kinds and their parts are those of the library
`tokenizers`, whose ids are the reference.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from moec.assistant.split_program import Program, Unknown, character_class

# GPT-2's expression, by which `ByteLevel` splits
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTE_LEVEL, CHARACTERS, UNIGRAM = range(3)
_WHOLE, _FALLBACK, _FUSE = 1, 2, 4
_SPECIAL, _NORMALIZED, _LEFT, _RIGHT = 1, 2, 4, 8
_MOST_TOKENS = 1 << 24
_LONGEST_WORD = 64  # bytes of a text that normalizers insert

CUT, CUT_DROP, PREFIX, CUT_BEFORE, CUT_AFTER, REPLACE, COMPOSE = range(7)
ALWAYS, UNLESS_THERE, AT_THE_START = range(3)


@dataclass
class Steps:
    """How a text is changed, then cut: rows of (kind, where its expression's program begins, word, when).

    words: texts that PREFIX and REPLACE insert. when, of PREFIX: ALWAYS, UNLESS_THERE (the piece begins with it), or
    AT_THE_START: unless there, and only where the whole text begins.
    """

    program: Program = field(default_factory=Program)
    words: list[str] = field(default_factory=list)
    normal: list[tuple[int, int, int, int]] = field(default_factory=list)
    cuts: list[tuple[int, int, int, int]] = field(default_factory=list)
    composed: bool = False  # whether texts are brought to normal form C
    _plain: list[tuple[str, str, str]] = field(default_factory=list)  # the normalizers, where they are plain texts

    @staticmethod
    def of(raw: dict[str, Any]) -> Steps:
        found = Steps()
        for part in _sequence(raw.get("normalizer"), "normalizers"):
            found._normalizer(part)
        parts = _sequence(raw.get("pre_tokenizer"), "pretokenizers")
        for index, part in enumerate(parts):
            found._cut(part, first=index == 0, last=index == len(parts) - 1)
        return found

    def normalized(self, text: str) -> str:
        """As the normalizers change it; Unknown where one has an expression."""
        for kind, pattern, content in self._plain:
            if kind == "NFC":
                text = unicodedata.normalize("NFC", text)
            elif kind == "Prepend":
                text = content + text if text else text
            elif kind == "Replace":
                text = text.replace(pattern, content)
            else:
                raise Unknown("added tokens that are normalized by an expression")
        return text

    def _word(self, text: str) -> int:
        if len(text.encode()) > _LONGEST_WORD:
            raise Unknown("a normalizer that inserts a long text")
        if text not in self.words:
            self.words.append(text)
        return self.words.index(text)

    def _normalizer(self, part: dict[str, Any]) -> None:
        kind = part.get("type")
        if kind == "NFC":
            self.composed = True
            self.normal.append((COMPOSE, 0, 0, 0))
            self._plain.append(("NFC", "", ""))
        elif kind == "Prepend":
            self.normal.append((PREFIX, 0, self._word(part["prepend"]), ALWAYS))
            self._plain.append(("Prepend", "", part["prepend"]))
        elif kind == "Replace":
            pattern = part.get("pattern") or {}
            self.normal.append((REPLACE, _pattern(self.program, pattern, "Replace"), self._word(part["content"]), 0))
            text = str(pattern.get("String") or "")
            self._plain.append(("Replace" if text else "Regex", text, part["content"]))
        else:
            raise Unknown(f"the normalizer {kind}")

    def _cut(self, part: dict[str, Any], *, first: bool, last: bool) -> None:
        kind = part.get("type")
        if kind == "ByteLevel":
            if not last:
                raise Unknown("ByteLevel before another pre-tokenizer")
            if part.get("add_prefix_space"):
                self.cuts.append((PREFIX, 0, self._word(" "), UNLESS_THERE))
            if part.get("use_regex", True):
                self.cuts.append((CUT, self.program.add(_GPT2), 0, 0))
        elif kind == "Digits":
            every = part.get("individual_digits", False)
            self.cuts.append((CUT, self.program.add_set(character_class("numeric"), repeated=not every), 0, 0))
        elif kind == "Split":
            self.cuts.append((_behavior(part), _pattern(self.program, part.get("pattern") or {}, "Split"), 0, 0))
        elif kind == "Metaspace":
            self._metaspace(part, first=first)
        else:
            raise Unknown(f"the pre-tokenizer {kind}")

    def _metaspace(self, part: dict[str, Any], *, first: bool) -> None:
        mark, scheme = part.get("replacement", "▁"), part.get("prepend_scheme", "always")
        self.cuts.append((REPLACE, self.program.add_text(" "), self._word(mark), 0))
        if scheme == "first" and not first:
            raise Unknown("Metaspace with the scheme first behind another pre-tokenizer")
        if scheme in ("always", "first"):
            self.cuts.append((PREFIX, 0, self._word(mark), UNLESS_THERE if scheme == "always" else AT_THE_START))
        elif scheme != "never":
            raise Unknown(f"Metaspace with the scheme {scheme}")
        if part.get("split", True):
            self.cuts.append((CUT_BEFORE, self.program.add_text(mark), 0, 0))


def _sequence(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]


def _behavior(part: dict[str, Any]) -> int:
    """What becomes of the matches of a `Split`, and of the text between them."""
    behavior, invert = part.get("behavior"), part.get("invert", False)
    if behavior == "Isolated":  # matches and the text between them are all pieces, inverted or not
        return CUT
    if behavior == "Removed" and invert:
        return CUT_DROP
    if behavior == "MergedWithPrevious" and not invert:
        return CUT_AFTER
    if behavior == "MergedWithNext" and not invert:
        return CUT_BEFORE
    raise Unknown(f"Split with the behavior {behavior}{', inverted' if invert else ''}")


def _pattern(program: Program, pattern: dict[str, Any], what: str) -> int:
    if pattern.get("String"):
        return program.add_text(pattern["String"])
    if pattern.get("Regex"):
        return program.add(pattern["Regex"])
    raise Unknown(f"{what} without a pattern")


@dataclass
class Decoder:
    """How tokens become text. byte_level: their bytes are the text. Otherwise `mark` in them becomes `space`.

    byte_fallback: tokens `<0x41>` are bytes. strip: at most so many spaces are taken off the beginning of a text. drop:
    the first token loses its marks.
    """

    byte_level: bool = False
    mark: str = ""
    space: str = ""
    byte_fallback: bool = False
    strip: int = 0
    drop: bool = False

    @staticmethod
    def of(raw: dict[str, Any]) -> Decoder:
        parts = _sequence(raw.get("decoder"), "decoders")
        kinds = [part.get("type") for part in parts]
        if kinds == ["ByteLevel"]:
            return Decoder(byte_level=True)
        if kinds == ["Metaspace"]:
            drop = parts[0].get("prepend_scheme", "always") != "never"
            return Decoder(mark=parts[0].get("replacement", "▁"), space=" ", drop=drop)
        if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
            raise Unknown(f"the decoder {' and '.join(map(str, kinds)) or None}")
        mark = (parts[0].get("pattern") or {}).get("String")
        if not mark:
            raise Unknown("the decoder Replace with an expression")
        found = Decoder(mark=mark, space=parts[0]["content"], byte_fallback=True)
        if len(parts) == 4:
            strip = parts[3]
            if strip.get("content") != " " or strip.get("stop"):
                raise Unknown("the decoder Strip of other texts than spaces at the beginning")
            found.strip = int(strip.get("start", 0))
        return found


def check_model(raw: dict[str, Any]) -> str:
    """`BPE` or `Unigram`; Unknown for others."""
    model = raw.get("model") or {}
    name = model.get("type") or ("BPE" if "merges" in model else None)
    if name not in ("BPE", "Unigram"):
        raise Unknown(f"the model {name}")
    return str(name)


class Vocabulary:
    """texts: the bytes of each id. sorted: ids of tokens that a piece can become, by their bytes. merges: (left, right,
    rank, result), sorted. scores: of Unigram, by id. added: (id, flags, the text that is looked for, the token's own)
    of the tokens that are found before a text is cut."""

    def __init__(self, raw: dict[str, Any], steps: Steps, decoder: Decoder) -> None:
        model, name = raw["model"], check_model(raw)
        self.merges: list[tuple[int, int, int, int]] = []
        self.scores: list[float] = []
        self.unknown, self.flags = -1, 0
        if name == "BPE":
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
                if model.get(key):
                    raise Unknown(f"{key} of BPE")
            vocabulary: dict[str, int] = model["vocab"]
            self.kind = BYTE_LEVEL if decoder.byte_level else CHARACTERS
            cuts = _sequence(raw.get("pre_tokenizer"), "pretokenizers")
            if decoder.byte_level != bool(cuts and cuts[-1].get("type") == "ByteLevel"):
                raise Unknown("a tokenizer that is byte-level in part")
            other = [key for key in ("unk_token", "byte_fallback") if model.get(key)]
            if decoder.byte_level and other:
                raise Unknown(f"{other[0]} of byte-level BPE")
            self.flags = _WHOLE * bool(model.get("ignore_merges"))
            self.flags |= _FALLBACK * bool(model.get("byte_fallback")) | _FUSE * bool(model.get("fuse_unk"))
            if model.get("unk_token"):
                self.unknown = vocabulary.get(model["unk_token"], -1)
                if self.unknown < 0:
                    raise Unknown("BPE whose unk_token is not in the vocabulary")
        else:
            if decoder.byte_level:
                raise Unknown("Unigram of bytes")
            vocabulary = {text: id_ for id_, (text, _) in enumerate(model["vocab"])}
            if len(vocabulary) < len(model["vocab"]):
                raise Unknown("Unigram with a token that occurs twice")
            self.kind = UNIGRAM
            self.flags = _FALLBACK * bool(model.get("byte_fallback"))
            self.unknown = -1 if model.get("unk_id") is None else int(model["unk_id"])
            self.scores = [float(score) for _, score in model["vocab"]]
            if not self.scores or not all(map(math.isfinite, self.scores)):
                raise Unknown("Unigram without scores")
        self._tokens(raw, vocabulary, steps)
        for rank, merge in enumerate(model["merges"] if name == "BPE" else []):
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            pair = [vocabulary.get(text) for text in (left, right, left + right)]
            if None in pair:
                raise Unknown(f"the merge {merge!r} of tokens that the vocabulary lacks")
            self.merges.append((pair[0], pair[1], rank, pair[2]))  # type: ignore[arg-type]
        self.merges.sort()

    def _tokens(self, raw: dict[str, Any], vocabulary: dict[str, int], steps: Steps) -> None:
        letters = _byte_letters() if self.kind == BYTE_LEVEL else {}
        placed: dict[bytes, int] = {}
        added = {t["id"]: t for t in raw.get("added_tokens") or []}
        count = 1 + max([*vocabulary.values(), *added, -1])
        if not 0 < count <= _MOST_TOKENS:
            raise Unknown(f"a vocabulary of {count}")
        self.texts = [b""] * count
        model_ids = set(vocabulary.values())
        for text, id_ in vocabulary.items():
            spelled = self.kind != BYTE_LEVEL or all(c in letters for c in text)
            content = bytes(letters[c] for c in text) if letters and spelled else text.encode()
            self.texts[id_] = content
            if spelled:
                placed[content] = id_
        self.added: list[tuple[int, int, str, str]] = []
        for id_, token in sorted(added.items()):
            content = token["content"]
            if token.get("single_word"):
                raise Unknown(f"single_word of the token {content}")
            before = self.texts[id_] if id_ in model_ids else None
            decoded = letters and all(c in letters for c in content)
            self.texts[id_] = bytes(letters[c] for c in content) if decoded else content.encode()
            if self.texts[id_] != content.encode() or (before is not None and self.kind and before != self.texts[id_]):
                raise Unknown(f"the token {content!r}, which stands for other bytes")
            wanted = steps.normalized(content) if token.get("normalized") else content
            flags = _SPECIAL * token["special"] | _NORMALIZED * bool(token.get("normalized"))
            flags |= _LEFT * bool(token.get("lstrip")) | _RIGHT * bool(token.get("rstrip"))
            self.texts[id_] = wanted.encode()  # what the library writes for it
            self.added.append((id_, flags, wanted, content))
        self.sorted = [placed[content] for content in sorted(placed)]


def _byte_letters() -> dict[str, int]:
    """Character -> byte of `ByteLevel`: printable bytes are themselves, the others are numbered from 256."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}
