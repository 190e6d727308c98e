"""The text that a dense model writes: the model's own distribution, forms that a corpus takes, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.compiler.errors import CheckpointError, UserError
from moec.sources.dense_decoder import open_dense_decoder
from moec.training.checkpoints import write_checkpoint
from moec.training.data.build import build
from moec.training.data.own_words import CHATS, TEXTS, write_own_words
from moec.training.data.shards import DataError
from moec.training.data.user import user_documents
from moec.training.data.writer import Writer
from moec.training.model import TrainingDecoder
from moec.training.tokenizer import END_OF_TURN, SPECIALS, train_tokenizer
from tests.conftest import Moec, refused
from tests.training.small import DENSE, config_of, model_of, random_weights

TEMPLATE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)
WINDOWED: dict[str, Any] = {"qk_norm": True, "attention_window": {"size": 5, "every_nth_global": 2}}


def dense_checkpoint(folder: Path, **changes: Any) -> Path:
    """A random dense model that ends turns often, with its tokenizer and template."""
    text = train_tokenizer(["some words of Text that Repeat and Repeat, with Names like Anna and Bert"] * 20, 300)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    config = config_of(DENSE, vocab_size=tokenizer.get_vocab_size(), context=128, **changes)
    weights = random_weights(config)
    for marker in SPECIALS:  # logits of 0 are not among the likeliest
        weights["lm_head.weight"][tokenizer.token_to_id(marker)] *= 2.0 if marker == END_OF_TURN else 0.0
    folder.mkdir()
    write_checkpoint(folder, config, weights, tokenizer=None)
    (folder / "tokenizer.json").write_text(text)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_checkpoint(tmp_path_factory.mktemp("dense") / "model")


def rows_of(writer: Writer, starts: list[list[int]], length: int, **given: Any) -> Tensor:
    return torch.stack(list(writer.rows(starts, length, torch.Generator().manual_seed(7), **given)), dim=1)


def trained(folder: Path) -> TrainingDecoder:
    found = open_dense_decoder(folder)
    return model_of(found.config, dict(found.weights())).eval()


@pytest.mark.parametrize("changes", [{}, WINDOWED, {"attention_window": None, "tied_embeddings": True}])
def test_the_likeliest_tokens_are_those_of_the_whole_forward(changes: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(DENSE, **changes)
    write_checkpoint(tmp_path / "dense", config, random_weights(config), tokenizer=None)
    starts = [[n, n + 1, n + 2] for n in range(0, 60, 5)]
    rows_BT = rows_of(Writer(open_dense_decoder(tmp_path / "dense"), top_k=1), starts, 40)
    with torch.no_grad():
        (logits_BTV,) = trained(tmp_path / "dense")(rows_BT)
    assert rows_BT[:, :3].tolist() == starts
    assert torch.equal(logits_BTV.argmax(-1)[:, 2:-1], rows_BT[:, 3:])
    assert len(set(rows_BT[:, 3:].flatten().tolist())) > 10  # fixed points would show little


def test_tokens_are_drawn_as_the_model_weighs_them(dense: Path) -> None:
    """4,000 draws of one token: a share p has a standard deviation of sqrt(p (1 - p) / 4000), at most 0.008."""
    rows_BT = rows_of(Writer(open_dense_decoder(dense), top_k=4), [[3, 4]] * 4000, 3)
    with torch.no_grad():
        (logits_BTV,) = trained(dense)(rows_BT[:1, :2])
    best = logits_BTV[0, -1].topk(4)
    shares = torch.bincount(rows_BT[:, 2], minlength=logits_BTV.shape[-1]) / 4000
    assert (shares[best.indices] - best.values.softmax(0)).abs().max() < 0.04
    assert shares[best.indices].sum() == 1.0


def test_what_follows_a_trigger_is_given_once(dense: Path) -> None:
    writer = Writer(open_dense_decoder(dense))
    plain = rows_of(writer, [[1, 2]] * 16, 60)
    trigger = int(plain[:, 2:].flatten().mode().values)
    given = [trigger, 20, 21, trigger, 22]
    met = 0
    for row in rows_of(writer, [[1, 2]] * 16, 60, after=given)[:, 2:].tolist():
        if trigger in row:
            at = row.index(trigger)
            assert row[at : at + 5] == given[: len(row) - at]
            again = [i for i in range(at + 5, len(row)) if row[i] == trigger]
            met += any(row[i : i + 5] != given[: len(row) - i] for i in again)
    assert met  # a second trigger is only a token


def test_both_files_make_domains_of_a_corpus(dense: Path, tmp_path: Path) -> None:
    found = write_own_words(dense, tmp_path / "own", tokens=64 * 120 * 8, length=120, seed=1)
    texts, chats = (list(user_documents(tmp_path / "own" / name)) for name in (TEXTS, CHATS))
    assert (len(texts), len(chats)) == (found.texts, found.chats)
    assert found.tokens == 64 * 120 * 8
    assert len(texts) > 20
    assert len(chats) > 20
    assert not found.no_chats
    assert not any("<|" in d.body for d in [*texts, *chats])  # markers are not text
    added = {"texts": tmp_path / "own" / TEXTS, "chats": tmp_path / "own" / CHATS}
    corpus = build(tmp_path / "corpus", [], cache=tmp_path, added=added, tokenizer=dense / "tokenizer.json")
    assert corpus.index["domains"]["chats"]["train"]["tokens"] > 500


def test_a_seed_gives_the_same_text_and_another_seed_another(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_own_words(dense, tmp_path / name, tokens=1, length=120, seed=seed)
    a, b, c = ((tmp_path / name / TEXTS).read_bytes() for name in "abc")
    assert a == b != c
    assert a


def test_without_a_template_there_are_texts_alone(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in dense.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    found = write_own_words(folder, tmp_path / "own", tokens=64 * 64 * 2, length=64)
    assert found.texts
    assert (found.chats, found.no_chats) == (0, "the checkpoint has no chat template")


@pytest.mark.parametrize(
    ("template", "rounds", "why"),
    [
        (TEMPLATE, 1, "so few tokens are one round of texts: 8,192 are one of each"),
        ("{% for m in messages %}{{ m.content + '<|eot_id|>' }}{% endfor %}", 2, "where a question begins"),
        ("{% for m in messages %}{{ '<|eot_id|>' ~ m.content | length }}{% endfor %}", 2, "a question as it is"),
    ],
    ids=["one round", "nothing before a question", "no question"],
)
def test_why_there_are_no_chats_is_said(template: str, rounds: int, why: str, tmp_path: Path) -> None:
    folder = dense_checkpoint(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    found = write_own_words(folder, tmp_path / "own", tokens=64 * 64 * rounds, length=64)
    assert not found.chats
    assert why in found.no_chats


def test_a_template_that_fills_a_row_is_refused(tmp_path: Path) -> None:
    folder = dense_checkpoint(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("Repeat and Repeat " * 9 + TEMPLATE)
    with pytest.raises(UserError, match=r"writes \d+ tokens around a question, which leaves 0 to say") as caught:
        write_own_words(folder, tmp_path / "own", tokens=1, length=32)
    assert not (tmp_path / "own").exists()
    least = int((caught.value.remedy or "").split()[1])
    assert write_own_words(folder, tmp_path / "own", tokens=64 * least * 2, length=least).tokens == 64 * least * 2


def test_what_cannot_write_is_refused_before_anything_is_written(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model's context is 128"):
        write_own_words(dense, tmp_path / "own", tokens=1, length=129)
    config = config_of()
    write_checkpoint(tmp_path / "mixture", config, random_weights(config), tokenizer=None)
    with pytest.raises(CheckpointError, match="is a mixture of experts already"):
        write_own_words(tmp_path / "mixture", tmp_path / "own", tokens=1)
    config = config_of(DENSE)
    write_checkpoint(tmp_path / "mute", config, random_weights(config), tokenizer=None)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        write_own_words(tmp_path / "mute", tmp_path / "own", tokens=1, length=40)
    assert not (tmp_path / "own").exists()


def test_the_command(moec: Moec, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "own"
    status, said, _ = moec(
        "data", "write", "--from", dense, "--out", out, "--tokens", 1, "--length", 40, "--json", "-q"
    )
    assert status == 0
    assert json.loads(said)["tokens"] == 64 * 40
    refused(moec("data", "write", "--from", tmp_path, "--out", out), "config.json")
