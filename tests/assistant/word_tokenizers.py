"""Tokenizers of whole words and of WordPiece, as BERT and its kin have them, trained on a few pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moec.assistant.native_text import TEXTS

PAGES = Path(__file__).parents[2] / "docs"
#: name -> (model, normalizer, pre-tokenizer, decoder)
KINDS: dict[str, tuple[str, Any, Any, Any]] = {
    "bert": ("WordPiece", normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()),
    "bert, cased": (
        "WordPiece",
        normalizers.BertNormalizer(lowercase=False, strip_accents=None),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(cleanup=False),
    ),
    "other marks": (
        "WordPiece",
        normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("merged_with_previous")]),
        decoders.WordPiece(prefix="@@"),
    ),
    "words": ("WordLevel", normalizers.Lowercase(), pre_tokenizers.Whitespace(), None),
    "words without commas": (
        "WordLevel",
        normalizers.Strip(left=True, right=False),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation("removed"), pre_tokenizers.Split(" ", "removed")]),
        None,
    ),
}


def trained(name: str) -> Tokenizer:
    """A small vocabulary: most words of other scripts are unknown to it."""
    model, normalizer, cut, decoder = KINDS[name]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer: Any
    if model == "WordPiece":
        prefix = "@@" if name == "other marks" else "##"
        made = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]", max_input_chars_per_word=24))
        made.model.continuing_subword_prefix = prefix
        trainer = trainers.WordPieceTrainer(
            vocab_size=900, show_progress=False, special_tokens=special, continuing_subword_prefix=prefix
        )
    else:
        made = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
        trainer = trainers.WordLevelTrainer(vocab_size=900, show_progress=False, special_tokens=special)
    made.normalizer, made.pre_tokenizer = normalizer, cut
    if decoder is not None:
        made.decoder = decoder
    pages = [page.read_text("utf-8") for page in sorted(PAGES.glob("*.md"))[::3]]
    made.train_from_iterator([*pages, *TEXTS[:14], "Don't ! I've, you're 's ' n't ."], trainer)
    made.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False, lstrip=True)])
    made.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<Tool>s", normalized=True, single_word=True)])
    made.add_tokens([AddedToken("Wort", single_word=True, normalized=False), AddedToken("né", single_word=True)])
    return made
