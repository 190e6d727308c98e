"""Stop tokens, what a session holds, and streamed text that equals the decoding of all ids at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moec.assistant.generate import Generation, Text, TextStream, bring
from moec.compiler.errors import RunError
from moec.compiler.session import SessionBase
from moec.compiler.target import MoeTrace

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


class Counting(SessionBase):
    """A session that says `last token + 1`, of a vocabulary of 16."""

    def __init__(self, context: int = 8, *, rewinds: bool = False) -> None:
        super().__init__("counting", vocab_size=16, context=context, max_tokens=2)
        self.rewinds = rewinds
        self.calls: list[list[int]] = []

    closed = False

    def close(self) -> None: ...

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        self.calls.append(tokens.tolist())
        if rows is not None:
            rows[:] = np.eye(16, dtype=np.float32)[(tokens[-len(rows) :] + 1) % 16]
        return []


def generate(prompt: list[int], count: int, stop: frozenset[int] = frozenset()) -> tuple[list[int], str, int]:
    generation = Generation(Counting(), prompt, count, stop=stop)
    ids = list(generation)
    return ids, generation.stats.stopped, generation.stats.new_tokens


def test_generation_stops() -> None:
    assert generate([3], 4) == ([4, 5, 6, 7], "length", 4)
    assert generate([3], 9, frozenset([6])) == ([4, 5], "stop token", 2)
    assert generate([3, 4, 5, 6, 7, 8], 9) == ([9, 10, 11], "context", 3)
    assert generate([3], 0) == ([], "length", 0)
    with pytest.raises(RunError, match="no tokens"):
        generate([], 4)


def test_the_caller_ends_it() -> None:
    generation = Generation(Counting(), [3], 9)
    taken = []
    for token in generation:
        taken.append(token)
        if len(taken) == 2:
            generation.cancelled.set()
    assert (taken, generation.stats.stopped) == ([4, 5], "cancelled")
    before = Generation(Counting(), [3], 9)
    before.cancelled.set()
    assert (list(before), before.stats.stopped, before.stats.new_tokens) == ([], "cancelled", 0)


def test_a_prompt_that_begins_like_what_is_held_is_computed_from_where_it_differs() -> None:
    session = Counting(16, rewinds=True)
    cancelled = threading.Event()
    assert bring(session, [1, 2, 3, 4, 5], cancelled)[1] == 0
    assert session.calls == [[1, 2], [3, 4], [5]]
    logits, reused = bring(session, [1, 2, 3, 9], cancelled)
    assert logits is not None
    assert (reused, session.calls[3:], int(logits.argmax()), session.tokens) == (3, [[9]], 10, [1, 2, 3, 9])
    # the very same prompt: its last token is computed again, since its logits are wanted
    assert bring(session, [1, 2, 3, 9], cancelled)[1] == 3
    session.reset()  # whoever else uses it
    assert bring(session, [1, 2], cancelled)[1] == 0
    for wrong, what in (([1, 16], "token id 16"), ([1, 2] * 9, "18 tokens do not fit: the context holds 16")):
        with pytest.raises(RunError, match=what):
            bring(session, wrong, cancelled)
    assert session.tokens == [1, 2]
    cancelled.set()
    assert bring(session, [1, 2, 3], cancelled) == (None, 2)
    assert session.tokens == [1, 2]


def test_a_session_that_does_not_go_back_begins_anew() -> None:
    session = Counting(16)
    bring(session, [1, 2, 3], threading.Event())
    assert bring(session, [1, 2, 3, 4], threading.Event())[1] == 3  # going on needs no going back
    assert bring(session, [1, 2, 5], threading.Event())[1] == 0
    assert session.tokens == [1, 2, 5]


def test_text_ends_at_a_stop_string_that_spans_tokens() -> None:
    def run(stops: list[str]) -> tuple[list[str], str, str]:
        generation = Generation(Counting(), [3], 4)
        text = Text(generation, lambda ids: "".join(chr(ord("a") + i) for i in ids), stops)
        return list(text), text.text, generation.stats.stopped

    assert run([]) == (["e", "f", "g", "h", ""], "efgh", "length")
    assert run(["fg"]) == (["e", "", ""], "e", "stop string")
    assert run(["hi"]) == (["e", "f", "g", "", "h"], "efgh", "length")  # held back, then the text was over
    assert run(["h"])[1:] == ("efg", "stop string")
