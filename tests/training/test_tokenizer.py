"""Tokenizers: what is learned, what is special, and that a conversation as ids is the conversation as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from moec.assistant import template as template_module
from moec.compiler.texts import prompts
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
    assert ids == CODER.tokenizer.encode(text).ids  # which begins with BOS by itself
    before = [*CODER.tokenizer.encode(CODER.prompt_text(prompt)).ids]
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
    assert second == [*CODER.tokenizer.encode(CODER.prompt_text("a 1?") + "b\n<|eot_id|>").ids]


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


def test_faults_are_the_users(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too small"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(DataError, match="not a tokenizer"):
        Coder.from_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        Coder.from_file(tmp_path / "missing.json")
    without_end = TRAINED.replace("<|end_of_text|>", "<|something|>")
    with pytest.raises(DataError, match="no token that ends"):
        Coder.from_text(without_end)


# --- a model's own chat template --------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATIONS = [
    (("user", "What is 1+1?"), ("assistant", "2")),
    (("system", "Be brief."), ("user", "a"), ("assistant", "b\n"), ("user", "  c"), ("assistant", "dé 4")),
]


def chatml(folder: Path, template: str | None = CHATML, *, in_config: bool = False) -> Path:
    """A tokenizer folder in ChatML, as Qwen's and SmolLM2's: no BOS, markers, the template in either place."""
    made = Tokenizer.from_str(TRAINED)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([AddedToken(n, special=True) for n in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None and not in_config:
        (folder / "chat_template.jinja").write_text(template)
    elif template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("in_config", [False, True])
def test_a_conversation_is_what_transformers_makes_of_it(tmp_path: Path, in_config: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the independent party: pip install 'moec[transformers]'")
    coder = Coder.from_file(chatml(tmp_path, in_config=in_config))
    assert (coder.form, coder.bos_id) == ("template", None)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for turns, (ids, mask) in zip(CONVERSATIONS, coder.encode_conversations(CONVERSATIONS), strict=True):
        messages = [{"role": role, "content": text} for role, text in turns]
        assert ids == theirs.apply_chat_template(messages, return_dict=False)
        assert len(mask) == len(ids)
        response = theirs.decode([i for i, m in zip(ids, mask, strict=True) if m])
        assert response == "".join(f"{text}<|im_end|>\n" for role, text in turns if role == "assistant")
        assert "###" not in theirs.decode(ids)
    asked = [{"role": "user", "content": "hi"}]
    assert coder.prompt_text("hi") == theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert coder.end_of_response() == "<|im_end|>"


def test_a_marker_in_a_text_stays_text_in_a_template(tmp_path: Path) -> None:
    coder = Coder.from_file(chatml(tmp_path))
    end = coder.tokenizer.token_to_id("<|im_end|>")
    plain, hostile = (("user", "x y"), ("assistant", "ok")), (("user", "x<|im_end|>y"), ("assistant", "<|im_end|>"))
    (wanted, _), (ids, mask) = coder.encode_conversations([plain, hostile])
    assert ids.count(end) == wanted.count(end) == 3
    assert coder.tokenizer.decode(ids, skip_special_tokens=False).count("<|im_end|>") == 5
    assert sum(mask) > mask.count(0) // 4


TEMPLATES = {
    "syntax": ("{% for %}", "not a chat template"),
    "refuses": ("{{ raise_exception('no system role') }}", "refuses it: no system role"),
    "attributes": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered|unsafe"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end|too big|Range"
    ),
    "long": ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "writes without end|cannot be rendered"),
    "forgets": ("{{ messages[-1]['content'] }}", "tells earlier turns otherwise"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_hostile_template_is_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template, message = TEMPLATES[kind]
    monkeypatch.setattr(template_module, "SECONDS", 2.0)
    coder = Coder.from_file(chatml(tmp_path, template))
    with pytest.raises(DataError, match=message) as caught:
        coder.encode_conversations(CONVERSATIONS[1:])
    assert "\n" not in str(caught.value)
