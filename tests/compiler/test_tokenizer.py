"""Ids are transformers'; a tokenizer that panics, aborts or never ends is one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from moec.compiler import tokenizer as module
from moec.compiler import worker
from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.tokenizer import TextTokenizer, encode_prompt, load_tokenizer

TEXTS = ("the quick brown fox, and more of it than four tokens.", "a", "", " <s>hello</s> x", "<s><s>", "é\n\n!")


def base() -> Tokenizer:
    """A byte-level tokenizer with special tokens and no post-processor, as Qwen's and Granite's are."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(character, len(vocabulary))
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<s>", "</s>")])
    return made


def without_bos(made: Tokenizer) -> None:
    pass


def truncating(made: Tokenizer) -> None:
    made.enable_truncation(4)


def padding(made: Tokenizer) -> None:
    made.enable_padding(length=24, pad_id=0, pad_token="<pad>")


def adding_bos(made: Tokenizer) -> None:
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])


def adding_both(made: Tokenizer) -> None:
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def everything(made: Tokenizer) -> None:
    adding_bos(made)
    truncating(made)
    padding(made)


KINDS = [without_bos, truncating, padding, adding_bos, adding_both, everything]


def saved(folder: Path, made: Tokenizer) -> Path:
    made.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: Any, tmp_path: Path) -> None:
    """The configuration names a BOS and even says to add it: the file's post-processor is what decides."""
    transformers = pytest.importorskip("transformers", reason="the independent party: pip install 'moec[transformers]'")
    made = base()
    kind(made)
    theirs = transformers.AutoTokenizer.from_pretrained(str(saved(tmp_path, made).parent))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    for text in TEXTS:
        assert encode_prompt(ours, text) == theirs(text)["input_ids"], text
        assert ours.encode(text, special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ours.close()


def test_what_the_post_processor_adds_is_known(tmp_path: Path) -> None:
    wanted = {without_bos: ((), ()), adding_bos: ((1,), ()), adding_both: ((1,), (2,)), everything: ((1,), ())}
    for kind, adds in wanted.items():
        made = base()
        kind(made)
        opened = load_tokenizer(saved(tmp_path, made))
        assert opened.adds() == adds
        assert opened.token_to_id("</s>") == 2
        assert opened.token_to_id("nothing") is None
        assert opened.vocab_size == made.get_vocab_size()
        opened.close()


def test_a_text_of_megabytes(tmp_path: Path) -> None:
    opened = load_tokenizer(saved(tmp_path, base()))
    ids = opened.encode("word " * 300_000)
    assert len(ids) == 1_500_000
    assert opened.decode(ids[:5]) == "word "
    opened.close()


DAMAGED = {
    "not JSON": b"\xff\xfe",
    "empty": b"",
    "a number": b'{"model": 5}',
    "deep": b"[" * 200_000,
    "without a model": b'{"version": "1.0"}',
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(DAMAGED[kind])
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: ") as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_panic_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Regular expressions beyond the library's limit make it panic: no Exception, and a backtrace on stderr."""
    made = base()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"(x+x+)+y"), behavior="isolated")
    opened = load_tokenizer(saved(tmp_path, made))
    with pytest.raises(ArtifactError, match=r"the tokenizer fails: .*limit") as caught:
        opened.encode("x" * 60)
    assert "\n" not in str(caught.value)
    assert opened.encode("x", special_tokens=False)  # the next text is another matter
    assert capfd.readouterr().err == ""
    opened.close()


ENDS = {
    "sleeps": ("import time; time.sleep(600)", "does not end: 2 seconds have passed"),
    "aborts": ("import os; os.abort()", r"stopped: it aborted, or needs more than 2\.0 GB"),
    "ends": ("print('no reply')", r"stopped \(status 0\)"),
}


@pytest.mark.parametrize(("does", "what"), ENDS.values(), ids=ENDS)
def test_one_that_never_ends_or_dies_is_one_line(
    does: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path, base())
    import sys

    real = worker.subprocess.Popen
    monkeypatch.setattr(module, "SECONDS", 2.0)
    monkeypatch.setattr(worker, "PATIENCE", 1)
    monkeypatch.setattr(worker.subprocess, "Popen", lambda _, **o: real([sys.executable, "-c", does], **o))
    started = time.monotonic()
    with pytest.raises(ArtifactError, match=what) as caught:
        TextTokenizer(file.read_bytes(), str(file))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 10


def test_one_that_computes_without_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement that doubles the text, sixty times over: memory or time, whichever is out first."""
    made = base()
    monkeypatch.setattr(module, "SECONDS", 2.0)
    made.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 60)
    opened = load_tokenizer(saved(tmp_path, made))
    with pytest.raises(
        ArtifactError, match=r"does not end: 2 seconds of processor time|needs more than 2\.0 GB"
    ) as caught:
        opened.encode("a")
    assert "\n" not in str(caught.value)


def test_limits_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs more than the limits of a short prompt is read where the prompt is long."""
    monkeypatch.setattr(module, "MEMORY", 256 << 20)
    opened = load_tokenizer(saved(tmp_path, base()))
    assert len(opened.encode("ab " * 700_000)) > 700_000
    opened.close()


def test_a_closed_one_says_so(tmp_path: Path) -> None:
    opened = load_tokenizer(saved(tmp_path, base()))
    opened.close()
    opened.close()
    with pytest.raises(ArtifactError, match="closed"):
        opened.encode("x")


def test_one_that_has_ended_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load_tokenizer(saved(tmp_path, base()))
    wanted = opened.encode("a word")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")  # another file meanwhile: ids stay those of the first
    for _ in range(2):
        opened._worker._process.kill()
        opened._worker._process.wait()
        assert opened.encode("a word") == wanted

    def none(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(worker.subprocess, "Popen", none)
        opened._worker.close()
        for call in (lambda: opened.encode("a word"), opened.ready):
            with pytest.raises(ArtifactError, match="the tokenizer cannot be started: Cannot allocate memory; close"):
                call()
    assert opened.encode("a word") == wanted
    opened.close()


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    opened = load_tokenizer(saved(tmp_path, base()))
    with pytest.raises(RunError, match="half a character"):
        encode_prompt(opened, "\udcff")
    opened.close()


@pytest.mark.parametrize("kind", ["fifo", "folder", "missing", "device"])
def test_what_is_no_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    import os

    file = tmp_path / "tokenizer.json"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match=r"not a regular file|is a folder|no such tokenizer"):
        load_tokenizer(file)


def test_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stands in a downloaded artifact runs no `json.py` that lies in it."""
    for name in ("json", "tokenizers", "struct", "moec"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    tokenizer = TextTokenizer(whole_word_tokenizer().encode(), "tokenizer.json")
    try:
        assert tokenizer.encode("a b")
    finally:
        tokenizer.close()
    assert not (tmp_path / "ran").exists()


def whole_word_tokenizer() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(made.to_str())
