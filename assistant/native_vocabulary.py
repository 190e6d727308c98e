"""What native apps need of a `tokenizer.json`: vocabulary, merges or scores, added tokens, changes and cuts of texts.

The kinds of model that are known: byte-level BPE; BPE of characters, as SentencePiece trains it (Llama 2, Mistral,
Phi-3, Gemma); Unigram (T5, XLM-R); WordPiece and WordLevel. Everything else is `Unknown` with what it is. The kinds and
their parts are those of the library `tokenizers`, whose ids are the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.assistant.character_map import Pairs, lower_case, precompiled
from moec.assistant.split_program import Program, Ranges, Unknown, character_class, complement, union

# GPT-2's expression, by which `ByteLevel` splits
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTE_LEVEL, CHARACTERS, UNIGRAM, WORD_PIECE, WORD_LEVEL = range(5)
_WHOLE, _FALLBACK, _FUSE = 1, 2, 4
_SPECIAL, _NORMALIZED, _LEFT, _RIGHT, _SINGLE_WORD = 1, 2, 4, 8, 16
_MOST_TOKENS = 1 << 24
_LONGEST_WORD = 64  # bytes of a text that normalizers insert
_MOST_MAPS = 4
_MOST_STEPS = 16

CUT, CUT_DROP, PREFIX, CUT_BEFORE, CUT_AFTER, REPLACE, COMPOSE, MAPPED, DECOMPOSE, SURROUND, STRIP, CUT_REMOVE = range(
    12
)
_LATER = (MAPPED, DECOMPOSE, SURROUND, STRIP, CUT_REMOVE)  # steps that files of version 2 do not have
JOINED, SPACED, WORDS = range(3)
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
    maps: list[Pairs] = field(default_factory=list)  # tables of characters, which MAPPED applies
    clusters: bool = False  # whether one is applied to clusters

    @staticmethod
    def of(raw: dict[str, Any]) -> Steps:
        found = Steps()
        for part in _sequence(raw.get("normalizer"), "normalizers"):
            found._normalizer(part)
        parts = _sequence(raw.get("pre_tokenizer"), "pretokenizers")
        for index, part in enumerate(parts):
            found._cut(part, first=index == 0, last=index == len(parts) - 1)
        if max(len(found.normal), len(found.cuts)) > _MOST_STEPS:
            raise Unknown(f"more than {_MOST_STEPS} normalizers or pre-tokenizers")
        return found

    @property
    def normal_form(self) -> bool:
        """Whether texts are decomposed or composed."""
        return any(step[0] in (COMPOSE, DECOMPOSE) for step in self.normal)

    @property
    def later(self) -> bool:
        """Whether files of version 2 cannot express them."""
        return any(step[0] in _LATER for step in (*self.normal, *self.cuts))

    def _word(self, text: str) -> int:
        if len(text.encode()) > _LONGEST_WORD:
            raise Unknown("a normalizer that inserts a long text")
        if text not in self.words:
            self.words.append(text)
        return self.words.index(text)

    def _normalizer(self, part: dict[str, Any]) -> None:
        kind = part.get("type")
        if kind in ("NFC", "NFD"):
            self.normal.append((COMPOSE if kind == "NFC" else DECOMPOSE, 0, 0, 0))
        elif kind == "Prepend":
            self.normal.append((PREFIX, 0, self._word(part["prepend"]), ALWAYS))
        elif kind == "Precompiled":
            self._map(precompiled(part["precompiled_charsmap"]))
            self.clusters = True
        elif kind == "Lowercase":
            self._map(lower_case(), clusters=False)
        elif kind == "StripAccents":
            self._replace(character_class("combining"), "")
        elif kind == "Strip":
            sides = bool(part.get("strip_left")) | bool(part.get("strip_right")) << 1
            self.normal.append((STRIP, 0, 0, sides))
        elif kind == "BertNormalizer":
            self._bert(part)
        elif kind == "Replace":
            pattern = part.get("pattern") or {}
            self.normal.append((REPLACE, _pattern(self.program, pattern, "Replace"), self._word(part["content"]), 0))
        else:
            raise Unknown(f"the normalizer {kind}")

    def _map(self, pairs: Pairs, *, clusters: bool = True) -> None:
        if pairs not in self.maps:
            self.maps.append(pairs)
        if len(self.maps) > _MOST_MAPS:
            raise Unknown(f"more than {_MOST_MAPS} tables of characters")
        self.normal.append((MAPPED, 0, self.maps.index(pairs), int(clusters)))

    def _replace(self, ranges: Ranges, text: str) -> None:
        self.normal.append((REPLACE, self.program.add_set(ranges, repeated=False), self._word(text), 0))

    def _bert(self, part: dict[str, Any]) -> None:
        lower, accents = part.get("lowercase", True), part.get("strip_accents")
        if part.get("clean_text", True):
            self._replace(union(character_class("control"), [(0, 0), (0xFFFD, 0xFFFD)]), "")
            self._replace(character_class("s"), " ")
        if part.get("handle_chinese_chars", True):
            begin = self.program.add_set(character_class("ideographs"), repeated=False)
            self.normal.append((SURROUND, begin, self._word(" "), 0))
        if lower if accents is None else accents:
            self.normal.append((DECOMPOSE, 0, 0, 0))
            self._replace(character_class("nonspacing"), "")
        if lower:
            self._map(lower_case(), clusters=False)

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
        elif kind in ("WhitespaceSplit", "BertPreTokenizer"):
            self.cuts.append((CUT_REMOVE, self.program.add_set(character_class("s"), repeated=True), 0, 0))
            if kind == "BertPreTokenizer":
                self._marks(CUT)
        elif kind == "Punctuation":
            self._marks(_behavior({"behavior": "Isolated", **part}))
        elif kind == "Whitespace":
            word = character_class("word")
            others = complement(union(word, character_class("s")))
            self.cuts.append((CUT_DROP, self.program.add_runs(word, others), 0, 0))
        else:
            raise Unknown(f"the pre-tokenizer {kind}")

    def _marks(self, behavior: int) -> None:
        self.cuts.append((behavior, self.program.add_set(character_class("punctuation"), repeated=False), 0, 0))

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
    if behavior == "Removed":
        return CUT_DROP if invert else CUT_REMOVE
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
    the first token loses its marks. between: whether tokens follow each other (JOINED), with a space between them
    (SPACED), or with one before those that do not begin with `prefix`, which they lose (WORDS). cleanup: the spaces of
    English, before a full stop and others, are left out.
    """

    byte_level: bool = False
    mark: str = ""
    space: str = ""
    byte_fallback: bool = False
    strip: int = 0
    drop: bool = False
    between: int = JOINED
    prefix: str = ""
    cleanup: bool = False

    @staticmethod
    def of(raw: dict[str, Any]) -> Decoder:
        parts = _sequence(raw.get("decoder"), "decoders")
        kinds = [part.get("type") for part in parts]
        if kinds == ["ByteLevel"]:
            return Decoder(byte_level=True)
        if not kinds:
            return Decoder(between=SPACED)
        if kinds == ["WordPiece"]:
            prefix = parts[0].get("prefix", "##")
            if len(prefix.encode()) > _LONGEST_WORD:
                raise Unknown("the decoder WordPiece with a long prefix")
            return Decoder(between=WORDS, prefix=prefix, cleanup=bool(parts[0].get("cleanup", True)))
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
    """`BPE`, `Unigram`, `WordPiece` or `WordLevel`; Unknown for others."""
    model = raw.get("model") or {}
    name = model.get("type") or ("BPE" if "merges" in model else None)
    if name not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise Unknown(f"the model {name}")
    return str(name)


class Vocabulary:
    """texts: the bytes of each id. sorted: ids of tokens that a piece can become, by their bytes. merges: (left, right,
    rank, result), sorted. scores: of Unigram, by id. added: (id, flags, the text that is looked for, the token's own)
    of the tokens that are found before a text is cut. longest_word, within_word: of WordPiece, in characters, and what
    tokens within words begin with. words: which of the sets has the characters of words, -1 where no token asks.
    normalized: texts as the normalizers change them."""

    def __init__(
        self,
        raw: dict[str, Any],
        steps: Steps,
        decoder: Decoder,
        normalized: Callable[[Sequence[str]], list[str]],
    ) -> None:
        model, name = raw["model"], check_model(raw)
        self.longest_word, self.within_word, self.words = 0, "", -1
        self.merges: list[tuple[int, int, int, int]] = []
        self.scores: list[float] = []
        self.unknown, self.flags = -1, 0
        cuts = _sequence(raw.get("pre_tokenizer"), "pretokenizers")
        if decoder.byte_level != bool(cuts and cuts[-1].get("type") == "ByteLevel"):
            raise Unknown("a tokenizer that is byte-level in part")
        if name == "BPE":
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
                if model.get(key):
                    raise Unknown(f"{key} of BPE")
            vocabulary: dict[str, int] = model["vocab"]
            self.kind = BYTE_LEVEL if decoder.byte_level else CHARACTERS
            other = [key for key in ("unk_token", "byte_fallback") if model.get(key)]
            if decoder.byte_level and other:
                raise Unknown(f"{other[0]} of byte-level BPE")
            self.flags = _WHOLE * bool(model.get("ignore_merges"))
            self.flags |= _FALLBACK * bool(model.get("byte_fallback")) | _FUSE * bool(model.get("fuse_unk"))
            if model.get("unk_token"):
                self.unknown = vocabulary.get(model["unk_token"], -1)
                if self.unknown < 0:
                    raise Unknown("BPE whose unk_token is not in the vocabulary")
        elif decoder.byte_level:
            raise Unknown(f"{name} of bytes")
        elif name == "Unigram":
            vocabulary = {text: id_ for id_, (text, _) in enumerate(model["vocab"])}
            if len(vocabulary) < len(model["vocab"]):
                raise Unknown("Unigram with a token that occurs twice")
            self.kind = UNIGRAM
            self.flags = _FALLBACK * bool(model.get("byte_fallback"))
            self.unknown = -1 if model.get("unk_id") is None else int(model["unk_id"])
            self.scores = [float(score) for _, score in model["vocab"]]
            if not self.scores or not all(map(math.isfinite, self.scores)):
                raise Unknown("Unigram without scores")
        else:
            vocabulary = model["vocab"]
            self.kind = WORD_PIECE if name == "WordPiece" else WORD_LEVEL
            self.unknown = vocabulary.get(model["unk_token"], -1)
            if self.unknown < 0:
                raise Unknown(f"{name} whose unk_token is not in the vocabulary")
            if name == "WordPiece":
                self.longest_word = min(int(model["max_input_chars_per_word"]), (1 << 31) - 1)
                self.within_word = model["continuing_subword_prefix"]
                if len(self.within_word.encode()) > _LONGEST_WORD:
                    raise Unknown("WordPiece with a long prefix")
        self._tokens(raw, vocabulary, steps, normalized)
        for rank, merge in enumerate(model["merges"] if name == "BPE" else []):
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            pair = [vocabulary.get(text) for text in (left, right, left + right)]
            if None in pair:
                raise Unknown(f"the merge {merge!r} of tokens that the vocabulary lacks")
            self.merges.append((pair[0], pair[1], rank, pair[2]))  # type: ignore[arg-type]
        self.merges.sort()

    def _tokens(
        self,
        raw: dict[str, Any],
        vocabulary: dict[str, int],
        steps: Steps,
        normalized: Callable[[Sequence[str]], list[str]],
    ) -> None:
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
        changing = [id_ for id_, token in added.items() if token.get("normalized")]
        changed = dict(zip(changing, normalized([added[id_]["content"] for id_ in changing]), strict=True))
        for id_, token in sorted(added.items()):
            content = token["content"]
            before = self.texts[id_] if id_ in model_ids else None
            decoded = letters and all(c in letters for c in content)
            self.texts[id_] = bytes(letters[c] for c in content) if decoded else content.encode()
            if self.texts[id_] != content.encode() or (before is not None and self.kind and before != self.texts[id_]):
                raise Unknown(f"the token {content!r}, which stands for other bytes")
            wanted = changed.get(id_, content)
            flags = _SPECIAL * token["special"] | _NORMALIZED * bool(token.get("normalized"))
            flags |= _LEFT * bool(token.get("lstrip")) | _RIGHT * bool(token.get("rstrip"))
            if token.get("single_word"):
                flags |= _SINGLE_WORD
                self.words = steps.program.use(character_class("word"))
            self.texts[id_] = wanted.encode()  # what the library writes for it
            self.added.append((id_, flags, wanted, content))
        self.sorted = [placed[content] for content in sorted(placed)]


def _byte_letters() -> dict[str, int]:
    """Character -> byte of `ByteLevel`: printable bytes are themselves, the others are numbered from 256."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}
