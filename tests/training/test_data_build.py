"""Building corpora: from a user's files and from the running Python, without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.cli.main import run
from moec.training.data import build as build_module
from moec.training.data import sources as sources_module
from moec.training.data.build import build
from moec.training.data.dedup import Deduplicator
from moec.training.data.document import Document
from moec.training.data.fetch import debian_package
from moec.training.data.functions import functions
from moec.training.data.shards import Corpus, DataError
from moec.training.data.user import parse_addition, user_documents
from moec.training.tokenizer import Coder

RANDOM = np.random.default_rng(5)
WORDS = ["".join(RANDOM.choice(list("abcdefghij"), 5)) for _ in range(400)]


def sentence(count: int) -> str:
    return " ".join(RANDOM.choice(WORDS, count))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of texts (one twice, one nearly twice) and a file of questions."""
    notes = tmp_path / "notes"
    (notes / "deep").mkdir(parents=True)
    texts = [sentence(80) for _ in range(30)]
    for i, text in enumerate(texts):
        (notes / f"{i:02}.txt").write_text(text)
    (notes / "deep" / "copy.md").write_text(texts[3].upper().replace(" ", "\n"))
    (notes / "deep" / "near.md").write_text(texts[4] + " one more word")
    (notes / "ignored.bin").write_bytes(b"\xff\xfe")
    rows = [{"prompt": f"What is {i} plus {i}?", "response": str(2 * i)} for i in range(40)]
    rows.append({"prompt": "What is 3 plus 3?", "response": "another answer"})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return tmp_path


def make(files: Path, name: str = "c", **more: object) -> Corpus:
    added = {"notes": files / "notes", "sums": files / "sums.jsonl"}
    return build(files / name, [], cache=files / "cache", added=added, vocab_size=400, **more)  # type: ignore[arg-type]


def decoded(corpus: Corpus, domain: str, split: str) -> list[str]:
    coder = Coder.from_file(corpus.tokenizer_file)
    shard = corpus.shard(domain, split)
    rows = [shard.tokens_N[a:b].tolist() for a, b in zip(shard.starts[:-1], shard.starts[1:], strict=True)]
    return [coder.tokenizer.decode(row, skip_special_tokens=False) for row in rows]


def test_a_users_files_become_a_corpus(files: Path) -> None:
    corpus = make(files)
    assert corpus.domains == ("notes", "sums")
    assert corpus.kind("notes") == "text"
    assert corpus.kind("sums") == "instruction"
    record = corpus.index["domains"]["notes"]
    assert (record["repeated_exactly"], record["repeated_nearly"]) == (1, 1)
    texts = decoded(corpus, "notes", "train") + decoded(corpus, "notes", "heldout")
    originals = {(files / "notes" / f"{i:02}.txt").read_text() for i in range(30)}
    # the copy that comes first in the order of names is kept
    kept = {text.removeprefix("<|begin_of_text|>").removesuffix("<|end_of_text|>") for text in texts}
    assert len(kept & originals) >= 28
    assert len(texts) == 30
    sums = decoded(corpus, "sums", "train") + decoded(corpus, "sums", "heldout")
    assert len(sums) == 40  # the second answer to one prompt is left out
    assert all(text.endswith("<|eot_id|>") for text in sums)


def test_chats_become_examples(tmp_path: Path) -> None:
    """A chat of one question is the same example in all three forms; a longer one has a loss on every answer."""
    said = {"user": "How much is it?", "assistant": "Seven."}
    turns = [{"role": role, "content": text} for role, text in said.items()]
    rows = [{"prompt": f"{i}? {said['user']}", "response": "Seven."} for i in range(40)]
    longer = [{"role": "system", "content": "Be brief."}, *turns, *turns]
    file = tmp_path / "chats.jsonl"
    forms = [{"messages": turns}, {"prompt": said["user"], "completion": said["assistant"]}, {"messages": longer}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*forms, *rows]))
    one, two, long, *_ = user_documents(file)
    assert one == two == Document(prompt=said["user"], response="Seven.", group=said["user"])
    assert [role for role, _ in long.conversation] == ["system", "user", "assistant", "user", "assistant"]
    corpus = build(tmp_path / "c", [], cache=tmp_path, added={"chats": file}, vocab_size=400)
    texts = decoded(corpus, "chats", "train") + decoded(corpus, "chats", "heldout")
    assert len(texts) == 42  # the same question twice is one
    (whole,) = [text for text in texts if "Be brief" in text]
    assert whole.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>")
    assert whole.count("Seven.<|eot_id|>") == 2
    tasks = (corpus.folder / "tasks" / "chats_exact.jsonl").read_text()
    assert "Be brief" not in tasks


def test_splits_share_no_document_and_neither_is_empty(files: Path) -> None:
    corpus = make(files, heldout_share=0.2)
    for domain in corpus.domains:
        train, held = set(decoded(corpus, domain, "train")), set(decoded(corpus, domain, "heldout"))
        assert train
        assert held
        assert not train & held


def test_the_same_files_give_the_same_bytes(files: Path) -> None:
    one, two = make(files, "one"), make(files, "two")
    for file in sorted(p for p in one.folder.rglob("*") if p.is_file()):
        assert file.read_bytes() == (two.folder / file.relative_to(one.folder)).read_bytes(), file.name


def test_groups_are_held_out_together(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(kind: str) -> Iterator[Document]:
        for i in range(200):
            group = f"g{i % 40}"
            body = f"{kind} {i} " + " ".join(WORDS[i : i + 5])
            yield Document(body, group=group) if kind == "text" else Document(prompt=body, response="r", group=group)

    template = sources_module.SOURCES[0]
    table = tuple(
        replace(template, name=k, domain=d, read=lambda _, k=k: read(k)) for k, d in (("text", "web"), ("pair", "math"))
    )
    monkeypatch.setattr(sources_module, "SOURCES", table)
    corpus = build(files / "c", ["web", "math"], cache=files, vocab_size=400, heldout_share=0.2)
    cut = corpus.index["heldout_share"]
    held = {f"g{i}" for i in range(40) if Document("x", group=f"g{i}").group_hash() <= cut}
    assert 0 < len(held) < 40
    for domain, kind in (("web", "text"), ("math", "pair")):
        for split in ("train", "heldout"):
            groups = {f"g{int(t.split(kind + ' ')[1].split()[0]) % 40}" for t in decoded(corpus, domain, split)}
            assert groups == (held if split == "heldout" else {f"g{i}" for i in range(40)} - held)


def test_a_source_that_cannot_be_had_is_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> Iterator[Document]:
        raise DataError("no apt-get on this machine", place="some-package")

    good, bad = sources_module.SOURCES[4], replace(sources_module.SOURCES[0], domain="code", name="bad", read=fails)
    monkeypatch.setattr(sources_module, "SOURCES", (bad, good))
    corpus = build(files / "c", ["code"], cache=files, limit_mb=0.3, vocab_size=400)
    assert corpus.index["left_out"] == ["bad: some-package: no apt-get on this machine"]
    assert [s["name"] for s in corpus.index["domains"]["code"]["sources"]] == ["python-library"]
    monkeypatch.setattr(sources_module, "SOURCES", (bad,))
    with pytest.raises(DataError, match="no source of domain 'code'"):
        build(files / "d", ["code"], cache=files, vocab_size=400)
    assert not (files / "d").exists()


def test_no_apt_is_a_users_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="no apt-get"):
        debian_package("wordnet-base", tmp_path)
    assert not list(tmp_path.rglob("*wordnet*"))


def test_what_fails_midway_leaves_nothing(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make(files)
    before = (old.folder / "corpus.json").read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "write_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(files)
    assert (old.folder / "corpus.json").read_bytes() == before
    assert not [p for p in files.iterdir() if p.name.startswith(".c.")]


FAKE_LIBRARY = """
def create_dataset(family, size, seed, **level):
    return [{"question": f"{family} {n} {sorted(level.items())}", "answer": str(n)} for n in range(size)]
"""


def test_no_puzzle_is_both_text_and_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a library of its own: a family belongs to one domain, and what is asked is set at a level."""
    (tmp_path / "reasoning_gym.py").write_text(FAKE_LIBRARY)
    fetched = []
    monkeypatch.setattr(sources_module, "python_packages", lambda *_: fetched.append(1) or tmp_path)
    monkeypatch.setattr(sources_module, "_QUESTIONS", 3)
    cache = tmp_path / "cache"
    cache.mkdir()
    texts, asked = (list(sources_module.questions(domain, cache)) for domain in ("math", "instructions"))
    assert len(fetched) == 1  # the second reads what the first has kept
    assert len(texts) == 3 * len({family for family, _, _ in texts})
    assert len(asked) == 3 * len({family for family, _, _ in asked})
    assert {family for family, _, _ in texts}.isdisjoint(family for family, _, _ in asked)
    assert ("gcd", "gcd 2 []", "2") in texts
    assert ("spell_backward", "spell_backward 0 [('max_word_len', 5)]", "0") in asked


def test_the_command_builds_and_inspects(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(files / "c")
    arguments = ["data", "build", "--out", out, "--domains", "code", "--limit-mb", "0.4", "--vocab-size", "600", "-q"]
    assert run([*arguments, "--cache", str(files / "cache")]) == 0
    assert "PSF-2.0" in capsys.readouterr().out
    assert run(["data", "inspect", out, "--json"]) == 0
    index = json.loads(capsys.readouterr().out)
    assert 0.3e6 < index["domains"]["code"]["bytes"] < 1.2e6  # documents are whole: the last may pass the limit
    assert {"heldout_code.yaml", "heldout_code.jsonl"} == {p.name for p in (files / "c" / "tasks").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--domains", "prose"], "no domain 'prose'"),
        (["--add", "x"], "NAME=PATH"),
        (["--add", "x={tmp}/missing"], "no such file"),
        (["--add", "../x=/"], "cannot name a domain"),
        (["--add", "tasks=/"], "cannot name a domain"),
        (["--add", "corpus.json=/"], "cannot name a domain"),
        (["--domains", "code", "--limit-mb", "0"], "a limit of"),
        (["--domains", "code", "--limit-mb", "0.1", "--vocab-size", "99999999999999999999"], "too large"),
        (["--domains", "code", "--limit-mb", "0.1", "--vocab-size", "9"], "too small"),
        (["--domains", "code", "--tokenizer", "{tmp}/missing"], "cannot be read"),
        (["--domains", ","], "no domain was asked for"),
    ],
)
def test_faults_are_one_line_and_leave_nothing(
    arguments: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(tmp=tmp_path) for a in arguments]
    assert run(["data", "build", "--out", str(tmp_path / "c"), "-q", *filled]) == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, index: index["domains"]["notes"].pop("kind"),
        lambda folder, index: index["domains"]["notes"].update(kind=["text"]),
        lambda folder, index: index["domains"]["notes"].pop("sources"),
        lambda folder, index: index["domains"]["notes"].update(sources=[3]),
        lambda folder, index: index["domains"]["notes"]["sources"][0].pop("licence"),
        lambda folder, index: index["domains"]["notes"].update(train=[]),
        lambda folder, index: index["domains"]["notes"].update(bytes="many"),
        lambda folder, index: index["domains"].update(notes=1),
        lambda folder, index: index.update(left_out=5),
        lambda folder, index: index.pop("eos_id"),
        lambda folder, index: (folder / "tokenizer.json").unlink(),
        lambda folder, index: (folder / "tokenizer.json").write_text("{}"),
    ],
)
def test_inspect_names_what_is_damaged(
    damage: Callable[[Path, dict[str, Any]], object], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(files).folder
    assert run(["data", "inspect", str(folder)]) == 0
    index = json.loads((folder / "corpus.json").read_text())
    damage(folder, index)
    (folder / "corpus.json").write_text(json.dumps(index))
    capsys.readouterr()
    assert run(["data", "inspect", str(folder)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert str(folder) in output.err
    assert "moec data build" in output.err


def test_inspect_of_a_file_is_one_line_with_a_remedy(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "inspect", str(files / "sums.jsonl")]) == 2
    assert "no corpus here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b'{"text": 1}', "no text under 'text'"),
        (b'{"prompt": "a"}', "no text under 'response'"),
        (b'{"prompt": " ", "completion": "a"}', "an empty prompt or response"),
        (b'{"messages": "hello"}', "messages is no list of objects"),
        (b'{"messages": []}', "messages of nobody"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "messages of user; after a system message, if any"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "a message of role 'tool'; roles are system, user"),
        (b'{"messages": [{"role": "user", "content": [1]}]}', "no text under 'content'"),
        (b'{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}', "an empty message"),
        (b'{"prompt": "a", "response": " "}', "empty"),
        (b"\xff", "not JSON"),
        (b'{"text": "\\ud800"}', "half a character"),
        (b"[" * 100_000, "not"),
    ],
)
def test_damaged_lines_are_named(line: bytes, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"x\.jsonl:2") as caught:
        list(user_documents(file))
    assert fault in str(caught.value) or "nested" in str(caught.value)


def test_no_text_is_read_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.training.data.user._MAX_FILE", 100)
    monkeypatch.setattr("moec.training.data.user._MAX_LINE", 100)
    (tmp_path / "a.txt").write_text("x" * 101)
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": "' + "x" * 101)
    with pytest.raises(DataError, match=r"a\.txt: is 101 bytes long; at most 100"):
        list(user_documents(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"b\.jsonl:2: a line of more than 100 bytes"):
        list(user_documents(tmp_path / "b.jsonl"))


def test_a_folder_without_text_and_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of text"):
        list(user_documents(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8 text: byte 3"):
        list(user_documents(tmp_path))
    assert parse_addition(f"a={tmp_path}") == ("a", tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_a_domain_of_few_documents_does_not_hold_out_the_others(files: Path, seed: int) -> None:
    """Its only document must not be held out, nor draw the cut that holds for all domains up to its own hash."""
    book = files / "book.txt"
    book.write_text(f"{seed} {sentence(200)}")
    with pytest.raises(DataError, match="'book' has too few documents") as caught:
        build(files / "few", [], cache=files / "cache", added={"notes": files / "notes", "book": book}, vocab_size=400)
    assert "documents" in caught.value.remedy
    assert not (files / "few").exists()


# --- repetitions ------------------------------------------------------------------------------------------------------


def test_near_repetitions_are_found_and_others_kept() -> None:
    """Texts at 95% of common shingles are found, at 45% kept: far from the threshold of 80% on both sides."""
    new = Deduplicator()
    found = kept = 0
    for _ in range(60):
        words = list(RANDOM.choice(WORDS, 300))
        assert new.is_new(" ".join(words))
        close = [*words]
        close[150] = "changed"  # 5 of 296 shingles differ on either side: Jaccard 291 / 301
        found += not new.is_new(" ".join(close))
        far = [*words]
        for place in range(0, 300, 13):  # 23 words, 115 shingles: Jaccard 181 / 411
            far[place] = "other"
        kept += new.is_new(" ".join(far))
    assert found == 60  # each is missed with less than 1e-9
    assert kept >= 59  # the estimate of 128 bins is 8 standard deviations off at 0.8


def test_exact_repetitions_ignore_case_and_space_only() -> None:
    new = Deduplicator()
    assert new.is_new("One  two\nthree")
    assert not new.is_new("one two three")
    assert new.is_new("one two, three")
    assert (new.exact, new.near) == (1, 0)


def test_functions_lose_their_docstring_and_keep_their_code() -> None:
    text = 'def add(a, b):\n    """Return the sum of two numbers.\n\n    More."""\n    # why\n    return a + b\n'
    assert list(functions(text)) == [("add: Return the sum of two numbers.", "def add(a, b):\n    return a + b")]
    assert list(functions("def broken(:")) == []
    assert list(functions("def f():\n    '''only words here, twenty of them'''")) == []
