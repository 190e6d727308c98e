"""Tokenizers: what is learned, what is special, and that a conversation as ids is the conversation as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from moec.analysis.verify.prompts import prompts
from moec.training.data.shards import DataError
from moec.training.tokenizer import SPECIALS, Coder, train_tokenizer

TEXTS = list(prompts().values())
TRAINED = train_tokenizer(TEXTS, 700)
CODER = Coder.from_text(TRAINED)


def test_special_tokens_have_the_first_ids() -> None:
    assert [CODER.tokenizer.token_to_id(name) for name in SPECIALS] == [0, 1, 2, 3, 4]
    assert (CODER.bos_id, CODER.eos_id, CODER.chat) == (0, 1, True)
    assert CODER.vocab_size <= 700


def test_equal_texts_give_equal_tokenizers() -> None:
    assert train_tokenizer(TEXTS, 700) == TRAINED


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example("naïve 日本語 🙂\r\n\t  x")
@example("<|eot_id|> and <|begin_of_text|>")
def test_any_text_comes_back_and_markers_in_it_are_text(text: str) -> None:
    (ids,) = CODER.encode_documents([text])
    assert ids[0] == 0
    assert ids[-1] == 1
    assert min(ids[1:-1], default=5) >= 5  # no special token inside
    assert CODER.tokenizer.decode(ids[1:-1], skip_special_tokens=False) == text


@settings(max_examples=50, deadline=None)
@given(st.text("abc 019.\n?", min_size=1, max_size=40), st.text("xyz 7\n!", min_size=1, max_size=40))
def test_a_conversation_as_ids_is_its_text(prompt: str, response: str) -> None:
    prompt, response = prompt.strip() or "a", response.strip() or "b"
    ((ids, mask),) = CODER.encode_conversations([(("user", prompt), ("assistant", response))])
    text = CODER.prompt_text(prompt) + response + "<|eot_id|>"
    assert ids == [0, *CODER.tokenizer.encode(text).ids]
    before = [0, *CODER.tokenizer.encode(CODER.prompt_text(prompt)).ids]
    assert ids[: len(before)] == before
    assert mask == [0] * len(before) + [1] * (len(ids) - len(before))
    assert CODER.tokenizer.decode(ids[len(before) :], skip_special_tokens=True) == response


LONG = (("system", "Be brief."), ("user", "a 1?"), ("assistant", "b\n"), ("user", "c <|eot_id|>"), ("assistant", "d 2"))


def test_every_answer_of_a_conversation_has_a_loss_and_nothing_else() -> None:
    """Several at once, each as Llama 3 writes it; a marker in a text stays text."""
    (first, mask), (second, _) = CODER.encode_conversations([LONG, LONG[1:3]])
    text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}<|eot_id|>" for role, said in LONG)
    assert CODER.tokenizer.decode(first[1:], skip_special_tokens=False) == text
    assert first.count(4) == len(LONG)  # the one in the text is not the marker
    learned = [
        CODER.tokenizer.decode([i], skip_special_tokens=False) for i, flag in zip(first, mask, strict=True) if flag
    ]
    assert "".join(learned) == "b\n<|eot_id|>d 2<|eot_id|>"
    assert second == [0, *CODER.tokenizer.encode(CODER.prompt_text("a 1?") + "b\n<|eot_id|>").ids]


def test_every_digit_is_a_token() -> None:
    ids = CODER.tokenizer.encode("2026", add_special_tokens=False).ids
    assert len(ids) == 4


def test_the_runtime_of_executorch_gives_the_same_ids(tmp_path: Path) -> None:
    cpp = pytest.importorskip("pytorch_tokenizers", reason="executorch's tokenizers are not installed").CppHFTokenizer()
    file = tmp_path / "tokenizer.json"
    file.write_text(TRAINED)
    cpp.load(str(file))
    for text in [*TEXTS, CODER.prompt_text("What is 12 + 30?") + "42<|eot_id|>", "tabs\t and  spaces \n\n end "]:
        assert list(cpp.encode(text, 0, 0)) == CODER.tokenizer.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_without_markers_gets_the_plain_form() -> None:

    plain = Tokenizer(
        models.BPE(
            vocab={"</s>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]
        )
    )
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder = Coder.from_text(plain.to_str())
    assert (coder.bos_id, coder.eos_id, coder.chat) == (None, 0, False)
    ((ids, mask),) = coder.encode_conversations([(("user", "ab"), ("assistant", "cd"))])
    assert ids[-3:] == [*coder.encode_documents(["cd"])[0][:-1], 0]
    assert mask[-3:] == [1, 1, 1]
    assert sum(mask) == 3
    ((ids, mask),) = coder.encode_conversations([LONG])
    form = "### Instruction:\n{}\n\n### Response:\n{}"
    parts = form.format("Be brief.\n\na 1?", "b\n"), form.format("c <|eot_id|>", "d 2")
    assert ids == [i for part in coder.encode_documents(parts) for i in part]
    assert sum(mask) == len("b\n") + len("d 2") + 2


def test_faults_are_the_users() -> None:
    with pytest.raises(DataError, match="too small"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(DataError, match="not a tokenizer"):
        Coder.from_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        Coder.from_file(Path("/nowhere/tokenizer.json"))
    without_end = TRAINED.replace("<|end_of_text|>", "<|something|>")
    with pytest.raises(DataError, match="no token that ends"):
        Coder.from_text(without_end)
