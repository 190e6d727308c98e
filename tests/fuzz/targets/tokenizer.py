"""tokenizer.json, read and used as `moec run` does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moec.compiler import tokenizer as limits
from moec.compiler.errors import UserError
from moec.compiler.tokenizer import TextTokenizer, encode_prompt
from tests.fuzz.mutate import flip


class TokenizerFile:
    """With a second of processor time a call, of which a mutant's text needs milliseconds: what takes longer is refused
    well before the harness calls it a hang, on a busy machine, too."""

    name = "tokenizer"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE({**alphabet, "ab": 256, "abc": 257}, [("a", "b"), ("ab", "c")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        return [tokenizer.to_str().encode()]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        return flip(rng, rng.choice(seeds))

    def run(self, data: bytes, folder: Path) -> None:
        limits.SECONDS = 1.0  # this process runs mutants and ends
        try:
            tokenizer = TextTokenizer(data, "tokenizer.json")
        except UserError:
            return
        try:
            tokenizer.decode(encode_prompt(tokenizer, "abc, <s> d\u00e9j\u00e0 vu"))
        except UserError:
            return
        finally:
            tokenizer.close()


TARGET = TokenizerFile()
