"""Tokenizers of SentencePiece's kinds as checkpoints have them, trained on a few pages: BPE of characters, Unigram."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moec.assistant.native_text import TEXTS
from tests.assistant.character_tables import precompiled, sentencepieces

PAGES = Path(__file__).parents[2] / "docs"
MARK = "▁"
#: name -> (model, normalizer, pre-tokenizer, decoder, whether bytes are tokens)
_LLAMA = decoders.Sequence(
    [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
_PREPEND = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
KINDS: dict[str, tuple[str, Any, Any, Any, bool]] = {
    "llama2": ("BPE", _PREPEND, None, _LLAMA, True),
    "mistral": ("BPE", None, pre_tokenizers.Metaspace(MARK, "first", False), _LLAMA, True),
    "always": ("BPE", None, pre_tokenizers.Metaspace(MARK, "always", True), decoders.Metaspace(MARK, "always"), False),
    "gemma": (
        "BPE",
        normalizers.Replace(" ", MARK),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]),
        True,
    ),
    "next": (
        "BPE",
        normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(" {2,}"), " ")]),
        pre_tokenizers.Split(Regex(r"\s"), "merged_with_next"),
        _LLAMA,
        True,
    ),
    "unigram": ("Unigram", _PREPEND, None, _LLAMA, True),
    "t5": (
        "Unigram",
        normalizers.Replace(Regex(" {2,}"), " "),
        pre_tokenizers.Metaspace(MARK, "always", True),
        decoders.Metaspace(MARK, "always"),
        False,
    ),
    "t5, with its table": (
        "Unigram",
        normalizers.Sequence(
            [
                precompiled(sentencepieces("nmt_nfkc")),
                normalizers.Strip(left=False, right=True),
                normalizers.Replace(Regex(" {2,}"), MARK),
            ]
        ),
        pre_tokenizers.Metaspace(MARK, "always", True),
        decoders.Metaspace(MARK, "always"),
        False,
    ),
    "xlm-r": (
        "Unigram",
        normalizers.Sequence([precompiled(sentencepieces("nmt_nfkc_cf")), normalizers.Replace(Regex(" {2,}"), " ")]),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(MARK, "always", True)]),
        decoders.Metaspace(MARK, "always"),
        False,
    ),
}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _pages() -> Iterator[str]:
    for page in [*(page.read_text("utf-8") for page in sorted(PAGES.glob("*.md"))[::3]), *TEXTS[:14]]:
        yield from page.splitlines()


def trained(name: str) -> Tokenizer:
    """A small vocabulary of this kind: characters of some scripts are unknown to it, or bytes."""
    model, normalizer, cut, decoder, fallback = KINDS[name]
    made = Tokenizer(models.BPE() if model == "BPE" else models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(MARK, "always", True)
    options: dict[str, Any] = {"show_progress": False, "vocab_size": 1200}
    trainer = trainers.BpeTrainer(**options) if model == "BPE" else trainers.UnigramTrainer(**options)
    made.train_from_iterator(_pages(), trainer)
    raw = json.loads(made.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(_BYTES if fallback else [])]
    if model == "BPE":
        ids = {text: id_ for id_, text in enumerate(_merged(first, raw["vocab"]))}
        merges = [tuple(merge) for merge in raw["merges"]]
        made.model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=name != "always", byte_fallback=fallback)
    else:
        vocabulary = [(text, 0.0) for text in first] + [(t, s) for t, s in raw["vocab"] if t not in first]
        made.model = models.Unigram(vocabulary, 0, byte_fallback=fallback)
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, cut, decoder
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in first[:3]])
    made.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False, rstrip=name == "llama2")])
    made.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<tool>s", normalized=False)])
    made.add_tokens(
        [
            AddedToken("<wide>", normalized=False, lstrip=True, rstrip=True),
            AddedToken(MARK * 2, normalized="table" not in name),  # which makes nothing of it
        ]
    )
    made.add_tokens([AddedToken("word", normalized=False, single_word=True), AddedToken("Ⅷ  b", single_word=True)])
    return made


def _merged(first: Sequence[str], given: dict[str, int]) -> list[str]:
    return [*first, *sorted((text for text in given if text not in first), key=given.__getitem__)]
