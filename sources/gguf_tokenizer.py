"""tokenizer.json, its config, the chat template and the generation config, made from the metadata of a GGUF file.

Two kinds are known: byte-level BPE (`tokenizer.ggml.model` gpt2), whose way of splitting text into words is named by
`tokenizer.ggml.pre` and not stored; and SentencePiece's BPE (llama), whose merges follow from the scores. Where
a key is missing, llama.cpp's default holds. Other kinds are not carried, and a note says so: ids that differ from
those that a model was trained with are worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moec.checkpoints.gguf_file import GgufFile
from moec.checkpoints.safetensors_file import shown
from moec.compiler.errors import CheckpointError
from moec.compiler.source import CHAT_TEMPLATE, GENERATION, TOKENIZER, TOKENIZER_CONFIG

_GGML = "tokenizer.ggml."
_TEMPLATE_KEY = "tokenizer.chat_template"
_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # of tokenizer.ggml.token_type
_MOST_LETTERS = 1 << 22  # of all tokens of a SentencePiece vocabulary; the largest have two million
_LONGEST = 512  # letters of one of them
_SPACE = "\u2581"

# How text is split into words, one expression after the other, each on what those before left (llama.cpp's names).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"{_WORD}{_UPPER}*{_LOWER}+", rf"{_WORD}{_UPPER}+{_LOWER}*")
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = f"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _SLASHES
_TEKKEN = f"{_CASED[0]}|{_CASED[1]}" + r"|\p{N}" + _SLASHES
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_SPLITS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (_DIGIT, _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
    "default": _DEFAULT,
}  # fmt: skip
# Those that take a whole word that is a token without merging, and that begin a text where the file does not say.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}


def companions_of(file: GgufFile, vocabulary: int) -> dict[str, bytes]:
    """What the file brings beside its weights, by the names of `COMPANIONS`; CheckpointError for damaged ones."""
    found: dict[str, Any] = {GENERATION: _generation(file, vocabulary)}
    if _not_carried(file) is None:
        reader = _Tokenizer(file, vocabulary)
        found |= {TOKENIZER: reader.tokenizer(), TOKENIZER_CONFIG: reader.config()}
    files = {name: (json.dumps(value, ensure_ascii=False, indent=1) + "\n") for name, value in found.items() if value}
    template = file.metadata.get(_TEMPLATE_KEY)
    if isinstance(template, str):
        files[CHAT_TEMPLATE] = template
    try:
        return {name: text.encode("utf-8") for name, text in files.items()}
    except UnicodeEncodeError:
        raise CheckpointError("its tokenizer is not UTF-8", place=str(file.file), remedy="use another file") from None


def tokenizer_notes(file: GgufFile) -> Iterator[str]:
    """What a user should know of the tokenizer."""
    reason = _not_carried(file)
    if reason is not None:
        yield f"the tokenizer is not carried: {reason}; run the artifact with ids"
    elif file.metadata.get(f"{_GGML}model") == "gpt2" and _pre(file) == "default":
        yield "the file does not say how its tokenizer splits words; llama.cpp's default is taken"
    others = sorted(key for key in file.metadata if key.startswith(f"{_TEMPLATE_KEY}."))
    if others:
        yield f"chat templates beside the default one are not carried: {shown(', '.join(others))}"


def _pre(file: GgufFile) -> str:
    found = file.metadata.get(f"{_GGML}pre", "default")
    return found if isinstance(found, str) and found else "default"


def _not_carried(file: GgufFile) -> str | None:
    kind = file.metadata.get(f"{_GGML}model")
    if kind is None:
        return "the file has none"
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        return f"its kind is {shown(kind)}, known are gpt2 and llama"
    if kind == "gpt2" and _pre(file) not in _SPLITS:
        return f"it splits words as {shown(_pre(file))} does, which is not known here"
    return None


class _Tokenizer:
    """A tokenizer of a known kind, its lists checked against each other."""

    def __init__(self, file: GgufFile, vocabulary: int) -> None:
        self._file = file
        self._tokens = self._strings("tokens")
        if not self._tokens or len(self._tokens) > vocabulary:
            raise self._fault(f"{len(self._tokens)} tokens for a vocabulary of {vocabulary}")
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        if len(self._ids) != len(self._tokens):
            raise self._fault("a token occurs twice")
        self._is_bytes = file.metadata[f"{_GGML}model"] == "gpt2"
        self._types = (
            self._numbers("token_type", "iu") if self._has("token_type") else np.ones(len(self._tokens), np.int64)
        )

    def tokenizer(self) -> dict[str, Any]:
        """The keys of tokenizer.json as the tokenizers library reads it."""
        whole = self._byte_level() if self._is_bytes else self._sentence_piece()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added()),
            "post_processor": self._post_processor(),
            **whole,
        }

    def config(self) -> dict[str, Any]:
        """The keys of tokenizer_config.json: the special tokens, by name."""
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        tokens = {name: self._tokens[i] for key, name in names.items() if (i := self._special(key)) is not None}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}

    def _byte_level(self) -> dict[str, Any]:
        pre = _pre(self._file)
        merges = [tuple(text.split(" ", 1)) if " " in text[1:] else () for text in self._strings("merges")]
        for pair in merges:
            if len(pair) != 2 or not all(part in self._ids for part in (*pair, "".join(pair))):
                raise self._fault(f"the merge {shown(' '.join(pair))} is not of its tokens")
        splits = [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in _SPLITS[pre]
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
            "decoder": level,
            "model": self._model(merges, ignore_merges=pre in _WHOLE_WORDS),
        }

    def _sentence_piece(self) -> dict[str, Any]:
        prefix = self._flag("add_space_prefix", True)
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        steps = [{"type": "Prepend", "prepend": _SPACE}, replace] if prefix else [replace]
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = self._special("unknown")
        return {
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._model(
                self._merges_by_score(),
                byte_fallback=True,
                fuse_unk=True,
                unk_token=None if unknown is None else self._tokens[unknown],
            ),
        }

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Every way to make a token of two others, in the order in which SentencePiece would merge: the best first."""
        scores = self._numbers("scores", "f")
        if not np.isfinite(scores).all():
            raise self._fault("scores that are not finite")
        if sum(map(len, self._tokens)) > _MOST_LETTERS or max(map(len, self._tokens)) > _LONGEST:
            raise self._fault(f"tokens of more than {_LONGEST} letters, or {_MOST_LETTERS} in all")
        found: list[tuple[float, int, str, str]] = []
        for token, number in self._ids.items():
            for at in range(1, len(token)):
                left, right = token[:at], token[at:]
                if left in self._ids and right in self._ids:
                    found.append((-float(scores[number]), len(found), left, right))
        return [(left, right) for _, _, left, right in sorted(found)]

    def _model(self, merges: Sequence[Sequence[str]], **options: Any) -> dict[str, Any]:
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **options,
            "vocab": self._ids,
            "merges": [list(pair) for pair in merges],
        }

    def _added(self) -> Iterator[dict[str, Any]]:
        """Tokens that are found in a text before it is split into words."""
        for number, token in enumerate(self._tokens):
            kind = int(self._types[number])
            if kind not in (_CONTROL, _USER) and not (kind == _UNKNOWN and not self._is_bytes):
                continue
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            yield {"id": number, "content": token, **flags, "special": kind != _USER}

    def _post_processor(self) -> dict[str, Any] | None:
        """BOS and EOS around a text, where the file or llama.cpp's default for its kind puts them."""
        pre_begins = self._is_bytes and _pre(self._file) in _WHOLE_WORDS
        begins = self._flag("add_bos_token", not self._is_bytes or pre_begins)
        ends = self._flag("add_eos_token", False)
        bos, eos = self._special("bos"), self._special("eos")
        before, after = bos if begins else None, eos if ends else None
        if before is None and after is None:
            level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
            return level if self._is_bytes else None

        def around(name: str, number: int) -> list[dict[str, Any]]:
            marks = [
                [] if i is None else [{"SpecialToken": {"id": self._tokens[i], "type_id": number}}]
                for i in (before, after)
            ]
            return [*marks[0], {"Sequence": {"id": name, "type_id": number}}, *marks[1]]

        special = {
            self._tokens[i]: {"id": self._tokens[i], "ids": [i], "tokens": [self._tokens[i]]}
            for i in (before, after)
            if i is not None
        }
        pair = [*around("A", 0), *around("B", 1)]
        return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}

    # --- reading -------------------------------------------------------------------------------------------------

    def _has(self, key: str) -> bool:
        return f"{_GGML}{key}" in self._file.metadata

    def _strings(self, key: str) -> list[str]:
        found = self._file.metadata.get(f"{_GGML}{key}")
        if not isinstance(found, list):
            raise self._fault(f"no list {_GGML}{key}")
        return found

    def _numbers(self, key: str, kinds: str) -> np.ndarray:
        """`kinds`: of numpy's types, i, u and f."""
        found = self._file.metadata.get(f"{_GGML}{key}")
        if not isinstance(found, np.ndarray) or len(found) != len(self._tokens) or found.dtype.kind not in kinds:
            raise self._fault(f"{_GGML}{key} is not a number for each token")
        return found

    def _flag(self, key: str, default: bool) -> bool:
        found = self._file.metadata.get(f"{_GGML}{key}", default)
        if not isinstance(found, bool):
            raise self._fault(f"{_GGML}{key} is {shown(found)}, neither true nor false")
        return found

    def _special(self, key: str) -> int | None:
        found = _token_id(self._file, key)
        return found if found is not None and found < len(self._tokens) else None

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"its tokenizer is damaged: {what}", place=str(self._file.file), remedy="use another file"
        )


def _token_id(file: GgufFile, key: str) -> int | None:
    found = file.metadata.get(f"{_GGML}{key}_token_id")
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


def end_ids(file: GgufFile, vocabulary: int) -> tuple[int, ...]:
    """The ids that end a text or a turn of it: those that the file names as its end, end of turn and end of message."""
    found = (_token_id(file, key) for key in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(i for i in found if i is not None and i < vocabulary))


def _generation(file: GgufFile, vocabulary: int) -> dict[str, Any]:
    """The keys of generation_config.json."""
    ends = end_ids(file, vocabulary)
    ids = {"bos_token_id": _token_id(file, "bos"), "pad_token_id": _token_id(file, "padding")}
    known: dict[str, Any] = {key: i for key, i in ids.items() if i is not None and i < vocabulary}
    if ends:
        known["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    return known
