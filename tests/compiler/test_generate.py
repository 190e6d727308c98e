"""Sampling, stop tokens, and streamed text that equals the decoding of all ids at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.generate import Generation, Sampler, Sampling, TextStream

VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE with a few merges, so that one character may span ids and one id several characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, naïve café — 日本語 日本 🙂🙃"] * 4, trainer)
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(lambda tokens: tokenizer.decode(tokens))
    return [*map(stream.push, ids), stream.finish()]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    pieces = streamed(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(2, VOCAB - 1), max_size=30))
def test_streamed_ids_decode_as_a_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Ids of an untrained model: bytes that are no UTF-8 must come out as in one decoding, none lost or doubled."""
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_is_never_shown_in_part(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a𝄞b").ids  # the clef has no merge: four ids
    assert len(ids) == 6
    assert streamed(tokenizer, ids) == ["a", "", "", "", "𝄞", "b", ""]
    assert streamed(tokenizer, ids[:3]) == ["a", "", "", "�"]


def test_leading_spaces_of_words_survive() -> None:
    """A decoder that strips the space of the first word, as SentencePiece's does, must not glue words together."""
    tokenizer = Tokenizer(models.WordLevel({"▁Hello": 0, "▁world": 1, "!": 2, "?": 3}, unk_token="?"))
    tokenizer.decoder = decoders.Metaspace()
    assert (
        "".join(streamed(tokenizer, [0, 1, 1, 2, 0])) == "Hello world world! Hello" == tokenizer.decode([0, 1, 1, 2, 0])
    )


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20))
def test_bytes_of_a_sentencepiece_tokenizer(text: str) -> None:
    """Characters without an id are bytes <0xE2> <0x82> <0xAC>, one U+FFFD each until the last has come."""
    text = "w" + text.encode("utf-8", "replace").decode().replace("�", "")
    vocabulary = {"<unk>": 0, "w": 1, "▁": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = streamed(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text.replace("▁", " ")
    assert not any("�" in piece for piece in pieces)


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(Sampling())(np.array([0.0, 3.0, 3.0, -np.inf], np.float32)) == 1


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    sampler = Sampler(Sampling(temperature=1.0, seed=5))
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4) / 4000
    # 4 standard deviations of a share of 4000 draws are at most 4 * sqrt(0.25 / 4000) = 0.032
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.032)


@pytest.mark.parametrize(("top_p", "count"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.9, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, count: int) -> None:
    # exact in binary, so that "reaches 0.5" is not a matter of rounding
    logits = np.log(np.array([0.5, 0.25, 0.1875, 0.0625]))
    sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=1))
    assert {sampler(logits) for _ in range(400)} == set(range(count))


def test_the_seed_repeats() -> None:
    logits = np.random.default_rng(0).normal(size=50)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.5, top_p=0.95, seed=seed))
        return [sampler(logits) for _ in range(20)]

    assert draws(3) == draws(3) != draws(4)


def test_extreme_logits_do_not_overflow() -> None:
    logits = np.array([1e30, -1e30, -np.inf], np.float32)
    assert Sampler(Sampling(temperature=1e-3, seed=0))(logits) == 0
    for bad in ([np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf], []):
        with pytest.raises(ArtifactError, match=r"^build/a: the logits are not finite"):
            Sampler(Sampling(), "build/a")(np.array(bad))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("seed", -1),
    ],
)
def test_options_are_checked(name: str, value: float) -> None:
    with pytest.raises(RunError):
        Sampling(**{name: value})  # type: ignore[arg-type]


class Counting:
    """A session that says `last token + 1`, of context 8."""

    vocab_size, context = 16, 8

    def __init__(self) -> None:
        self.position = 0

    def _next(self, token: int) -> np.ndarray:
        return np.eye(self.vocab_size, dtype=np.float32)[(token + 1) % self.vocab_size]

    def prefill(self, ids: list[int], logits: str = "last") -> np.ndarray:
        assert logits == "last"
        self.position += len(ids)
        return self._next(ids[-1])[None]

    def decode(self, token: int) -> np.ndarray:
        self.position += 1
        return self._next(token)


def generate(prompt: list[int], count: int, stop: frozenset[int] = frozenset()) -> tuple[list[int], str, int]:
    generation = Generation(Counting(), prompt, count, stop=stop)  # type: ignore[arg-type]
    ids = list(generation)
    return ids, generation.stats.stopped, generation.stats.new_tokens


def test_generation_stops() -> None:
    assert generate([3], 4) == ([4, 5, 6, 7], "length", 4)
    assert generate([3], 9, frozenset([6])) == ([4, 5], "stop token", 2)
    assert generate([3, 4, 5, 6, 7, 8], 9) == ([9, 10, 11], "context", 3)
    assert generate([3], 0) == ([], "length", 0)
    with pytest.raises(RunError, match="no tokens"):
        generate([], 4)
