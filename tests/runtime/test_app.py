"""The library of applications against Python: the same ids, the same text for a seed, errors where it is misused."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import moec
from moec.assistant.assistant import Assistant
from moec.assistant.native_text import FILE, TEXTS, tables
from moec.cli import main as cli
from moec.compiler.artifact import Artifact
from moec.compiler.tokenizer import load_tokenizer
from moec.runtime.native import find_compiler
from tests.assistant.sentencepiece import KINDS, trained
from tests.runtime import app
from tests.runtime.app_text import compare_with
from tests.tiny import tiny_text

TEMPLATE = Path(__file__).parents[1] / "assistant" / "templates" / "chatml.jinja"
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a chat template, of random weights: what it says is bytes of any kind."""
    made = tmp_path_factory.mktemp("app")
    (made / "spec.yaml").write_text(tiny_text(layers=2, context=256), "utf-8")
    spec, checkpoint = str(made / "spec.yaml"), made / "checkpoint"
    assert cli.run(["checkpoint", "synthesize", spec, "--out", str(checkpoint), "--seed", "1", "--quiet", "--qat"]) == 0
    shutil.copy(TEMPLATE, checkpoint / "chat_template.jinja")
    built = str(made / "artifact")
    assert cli.run(["compile", spec, "--checkpoint", str(checkpoint), "--out", built, "--quiet"]) == 0
    return made / "artifact"


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Assistant:
    return Assistant.of(Artifact.open(folder))


def test_text_and_ids_are_the_tokenizers(opened: int, assistant: Assistant) -> None:
    drawn = random.Random(5)
    for _ in range(40):
        text = "".join(chr(drawn.choice((drawn.randrange(9, 127), drawn.randrange(0x3000)))) for _ in range(30))
        text += drawn.choice(("", "<|begin_of_text|>", "<|end_of_text|> x"))
        for flags, options in (
            (0, {}),
            (app.PLAIN, {"special_tokens": False}),
            (app.AS_TEXT, {"markers_as_text": True}),
        ):
            assert app.tokenize(opened, text, flags) == assistant.tokenizer.encode(text, **options)
        ids = [drawn.randrange(assistant.tokenizer.vocab_size) for _ in range(20)]
        assert app.detokenize(opened, ids) == assistant.tokenizer.decode(ids)
        assert app.detokenize(opened, ids, app.SPECIAL) == assistant.tokenizer.decode(ids, skip_special_tokens=False)


# how families cut their texts: whether in normal form C, expressions, digits one by one, a space before the first word
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_OSS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
FAMILIES: dict[str, tuple[bool, tuple[str, ...], bool | None, bool]] = {
    "gpt2": (False, (), None, False),
    "smollm2, granite": (False, (), True, False),
    "llama3": (False, (LLAMA3,), None, False),
    "qwen": (True, (LLAMA3.replace("{1,3}", ""),), None, False),
    "deepseek": (False, DEEPSEEK, None, False),
    "gpt-oss": (False, (GPT_OSS,), None, False),
    "roberta": (True, (), False, True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_each_family(name: str, folder: Path, tmp_path: Path) -> None:
    """A vocabulary that is trained on the pages of this repository, cut as the family does; text of the pages, of more
    scripts, random bytes and characters."""
    normal, expressions, digits, prefix = FAMILIES[name]
    made = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    made.normalizer = normalizers.NFC() if normal else None
    steps: list[Any] = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    steps += [pre_tokenizers.Digits(individual_digits=digits)] if digits is not None else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not expressions))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    pages = [page.read_text("utf-8") for page in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, show_progress=False, initial_alphabet=alphabet, special_tokens=["<|end|>"]
    )
    made.train_from_iterator([*pages, *TEXTS * 20], trainer)
    made.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<tool>s", normalized=False), "  "])
    compare_with(made, folder, tmp_path / "copy")


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_sentencepiece(name: str, folder: Path, tmp_path: Path) -> None:
    compare_with(trained(name), folder, tmp_path / "copy")


@pytest.mark.parametrize("name", ["llama2", "t5"])
def test_text_and_conversations_with_sentencepiece(name: str, folder: Path, tmp_path: Path) -> None:
    """Random tokens as they are generated, bytes among them: the pieces joined are what `tokenizers` decodes."""
    made = trained(name)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    made.save(str(copy / "tokenizer.json"))
    words = load_tokenizer(copy / "tokenizer.json")
    (copy / FILE).write_bytes(tables(copy, words))
    artifact = app.open_artifact(copy)
    session, drawn, count = app.call("session", artifact), random.Random(3), made.get_vocab_size()
    biases = [(id_, -float("inf")) for id_ in range(count, 4096)]
    for seed in range(4):
        prompt = app.tokenize(artifact, "a prompt")
        options = app.options(artifact, temperature=1.0, seed=seed, max_new_tokens=80, biases=biases)
        generation = app.begin(session, prompt, options)
        text = "".join(app.pieces(generation))
        held = app.many("tokens", session)[len(prompt) :]
        app.call("close", generation)
        assert any(text == made.decode([*held, last]) for last in range(count)) or text == made.decode(held)
        ids = [drawn.randrange(count) for _ in range(60)]
        assert app.detokenize(artifact, ids) == made.decode(ids)
        assert app.detokenize(artifact, ids, app.SPECIAL) == made.decode(ids, skip_special_tokens=False)
    python = Assistant.of(Artifact.open(folder), tokenizer=copy / "tokenizer.json")
    turns = [("system", "Be <|end|> brief."), ("user", "日本 🙂\n <s>"), ("assistant", "x"), ("user", "y  z")]
    for given in (turns[1:2], turns):
        messages = [{"role": role, "content": content} for role, content in given]
        assert app.chat(artifact, given) == python.chat_prompt(messages).ids
    for id_ in (session, artifact):
        app.call("close", id_)


@pytest.mark.slow
@pytest.mark.real_model
def test_ids_are_those_of_a_real_model(smollm2: Path, folder: Path, tmp_path: Path) -> None:
    compare_with(Tokenizer.from_file(str(smollm2 / "tokenizer.json")), folder, tmp_path / "copy")


def test_conversations_are_the_templates(opened: int, assistant: Assistant) -> None:
    for turns in (
        [("user", "Hi")],
        [("system", "Be brief."), ("user", "a"), ("assistant", " b \n"), ("user", "日本語 🙂")],
        [("user", "what is <|begin_of_text|>, and <|end_of_text|><|end_of_text|>?")],
        [("system", ""), ("user", "x")],
    ):
        messages = [{"role": role, "content": content} for role, content in turns if content]
        assert app.chat(opened, turns) == assistant.chat_prompt(messages).ids


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "top_k": 40, "seed": 2},
        {"temperature": 1.3, "top_p": 0.9, "seed": (1 << 64) - 1},
        {"temperature": 1.0, "top_k": 300, "top_p": 0.95, "min_p": 0.02, "seed": 4},
        {"temperature": 0.9, "repeat_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.2, "seed": 5},
        {"temperature": 0.0, "repeat_penalty": 1.5},
    ],
    ids=lambda values: ",".join(values) or "greedy",
)
def test_the_same_seed_says_the_same(folder: Path, opened: int, session: int, values: dict[str, Any]) -> None:
    biases = {300: 2.0, 301: -float("inf")} if values.get("top_p") else {}
    with moec.load(folder) as python:
        answer = python.generate(PROMPT, max_new_tokens=60, logit_bias=biases or None, **values)
        wanted = "".join(answer)
    given = app.options(opened, max_new_tokens=60, biases=list(biases.items()), **values)
    generation = app.begin(session, app.tokenize(opened, PROMPT), given)
    assert "".join(app.pieces(generation)) == wanted
    found = app.stats(generation)
    assert (app.STOPPED[found.stopped], found.new_tokens) == (answer.stats.stopped, answer.stats.new_tokens)
    app.call("close", generation)


def test_drafts_change_nothing_of_the_text(folder: Path, opened: int, session: int) -> None:
    """A text that repeats itself: the same with drafts, without, and in Python; the session holds no draft afterwards,
    nor while it runs."""
    info = app.Info(size=ctypes.sizeof(app.Info))
    app.call("describe", opened, ctypes.byref(info))
    with moec.load(folder) as python:
        assert (info.speculates, python.exact_calls) == (1, True)  # type: ignore[attr-defined]
        prompt = app.tokenize(opened, PROMPT + " there was a king, and there was a king, and there was")
        accepted = 0
        for values in ({}, {"repeat_penalty": 1.02}, {"temperature": 0.1, "seed": 3}):
            python.reset()
            wanted = "".join(python.generate(prompt, max_new_tokens=150, **values))
            for speculate in (1, 0):
                given = app.options(opened, max_new_tokens=150, speculate=speculate, **values)
                generation = app.begin(session, prompt, given)
                assert "".join(app.pieces(generation)) == wanted
                found = app.stats(generation)
                assert found.drafted_tokens >= found.accepted_tokens >= 0
                assert speculate or not found.drafted_tokens
                accepted += found.accepted_tokens
                assert len(app.many("tokens", session)) in range(len(prompt), len(prompt) + found.new_tokens + 1)
                app.call("close", generation)
        assert accepted > 20
        generation = app.begin(session, prompt, app.options(opened, max_new_tokens=150))
        said, lengths = "", set()
        while app.call("next", generation, ctypes.byref(piece := ctypes.c_void_p()), None):
            said += ctypes.string_at(piece).decode()
            new = app.stats(generation).new_tokens
            if new % 3 == 0:  # drafts that it still holds are forgotten, and the text goes on
                lengths.add(len(app.many("tokens", session)) - new)
        python.reset()
        assert said == "".join(python.generate(prompt, max_new_tokens=150))
        assert lengths == {len(prompt) - 1}
        app.call("close", generation)


def test_a_stop_string_and_a_full_context(folder: Path, opened: int, session: int) -> None:
    prompt = app.tokenize(opened, PROMPT)
    with moec.load(folder) as python:
        whole = "".join(python.generate(PROMPT, temperature=1.0, seed=3))  # to the end of the context
        stop = whole[20:24]
        wanted = "".join(python.generate(PROMPT, temperature=1.0, seed=3, stop=[stop, "never said"]))
    for stops, text, reason in (((stop, "never said"), wanted, "stop string"), ((), whole, "context")):
        generation = app.begin(session, prompt, app.options(opened, stops=stops, temperature=1.0, seed=3))
        assert "".join(app.pieces(generation)) == text
        assert app.STOPPED[app.stats(generation).stopped] == reason
        assert app.pieces(generation) == []  # it is over
        app.call("close", generation)


def test_a_session_computes_what_is_new(opened: int, session: int, tmp_path: Path) -> None:
    prompt = app.tokenize(opened, PROMPT + " there was a king")

    def answer(of: int, ids: list[int]) -> tuple[str, int]:
        generation = app.begin(of, ids, app.options(opened, max_new_tokens=12))
        text = "".join(app.pieces(generation))
        reused = app.stats(generation).reused_tokens
        app.call("close", generation)
        return text, reused

    first = answer(session, prompt)
    assert first[1] == 0
    assert app.many("tokens", session)[: len(prompt)] == prompt
    assert answer(session, prompt) == (first[0], len(prompt) - 1)
    app.call("rewind", session, 4)
    app.call("save", session, str(tmp_path / "s").encode())
    fork, other = app.call("fork", session), app.call("session", opened)
    app.call("restore", other, str(tmp_path / "s").encode())
    for of in (fork, other):
        assert app.many("tokens", of) == prompt[:4]
        assert answer(of, prompt) == (first[0], 4)
        app.call("close", of)


@pytest.mark.parametrize("changed", ["manifest", "weights"])
def test_a_file_of_another_artifact_is_refused(
    changed: str, folder: Path, opened: int, session: int, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    raw = bytearray((other / "model.pte").read_bytes())
    if changed == "manifest":
        (other / "manifest.json").write_text((other / "manifest.json").read_text() + "\n")
    else:  # other weights behind the same manifest, as where one file of an update is missing
        raw[len(raw) // 2 :] = bytes(byte ^ 1 for byte in raw[len(raw) // 2 :])
        (other / "model.pte").write_bytes(raw)
    artifact = app.open_artifact(other)
    foreign = app.call("session", artifact)
    app.call("save", foreign, str(tmp_path / "s").encode())
    with pytest.raises(app.AppError, match="saved with another artifact"):
        app.call("restore", session, str(tmp_path / "s").encode())
    with pytest.raises(app.AppError, match="No such file"):
        app.call("restore", session, str(tmp_path / "absent").encode())
    for id_ in (artifact, foreign):  # the session keeps its artifact
        app.call("close", id_)


def test_it_is_cancelled(opened: int, session: int) -> None:
    prompt = app.tokenize(opened, PROMPT)
    said: list[str] = []
    generation = app.begin(session, prompt, app.options(opened, temperature=1.0))
    app.pieces(generation, lambda piece: said.append(piece) or len(said) < 3)  # type: ignore[func-returns-value]
    assert (app.STOPPED[app.stats(generation).stopped], len(said) < 6) == ("cancelled", True)
    for before in (True, False):  # it begins, and from another thread while it runs
        generation = app.begin(session, prompt, app.options(opened, temperature=1.0))
        if before:
            app.call("cancel", generation)
        begun = threading.Event()
        thread = threading.Thread(target=lambda: (begun.wait(10), app.call("cancel", generation)))  # noqa: B023
        thread.start()
        app.pieces(generation, lambda _: begun.set() is None)  # noqa: B023
        begun.set()
        thread.join()
        assert app.STOPPED[app.stats(generation).stopped] in ("cancelled", *(() if before else ("context",)))


def test_a_callback_that_ends_is_not_called_again(opened: int, session: int) -> None:
    """Not with bytes of a character either that were held back."""
    prompt = app.tokenize(opened, PROMPT)
    for seed in range(20):
        generation = app.begin(session, prompt, app.options(opened, temperature=1.0, seed=seed))
        assert len(app.pieces(generation, lambda _: False)) == 1
        assert app.STOPPED[app.stats(generation).stopped] == "cancelled"
        app.call("close", generation)


def test_saves_remove_what_killed_ones_left(session: int, tmp_path: Path) -> None:
    file, alike = tmp_path / "s", tmp_path / "s2.moec-part-00000000"
    old, new = tmp_path / "s.moec-part-0a0b0c0d", tmp_path / "s.moec-part-00000001"
    for left in (old, new, alike):
        left.write_bytes(b"x")
    for left in (old, alike):
        os.utime(left, (1e9, 1e9))
    app.call("save", session, str(file).encode())
    assert sorted(tmp_path.iterdir()) == sorted([file, new, alike])  # somebody may be writing the new one


def test_sessions_in_threads_say_what_they_say_alone(opened: int) -> None:
    prompt = app.tokenize(opened, PROMPT)

    def answer(seed: int) -> str:
        made = app.call("session", opened)
        generation = app.begin(made, prompt, app.options(opened, temperature=1.0, seed=seed, max_new_tokens=20))
        text = "".join(app.pieces(generation))
        for id_ in (made, generation):
            app.call("close", id_)
        return text

    alone = [answer(seed) for seed in range(4)]
    found: dict[int, str] = {}
    threads = [threading.Thread(target=lambda s=s: found.update({s: answer(s)})) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == alone


def test_what_is_misused_is_told(folder: Path, opened: int, session: int, tmp_path: Path) -> None:
    ids = (app.I32 * 1)(5)
    given = app.options(opened)
    generation = app.begin(session, [5], given)

    def changed(**values: Any) -> Any:
        found = app.options(opened)
        for name, value in values.items():
            setattr(found, name, value)
        return ctypes.byref(found)

    many = app.options(opened)
    many.stops, many.stop_count = (app.TEXT * 1)(b"x"), 1_000_000
    bad = (ctypes.c_char_p * 1)(b"\xff")
    faults: list[tuple[str, tuple[Any, ...], str]] = [
        ("open", (None, None), "folder: NULL"),
        ("open", (str(tmp_path).encode(), None), "manifest.json"),
        ("open", (b"x" * 100_000, None), "xxx"),
        ("open", (b"/absent/caf\xe9/model", None), "No such file"),  # a name that is not UTF-8
        ("open", (str(folder).encode(), ctypes.byref(app.OpenOptions(4, 0, 0))), "options.size is 4"),
        ("open", (str(folder).encode(), ctypes.byref(app.OpenOptions(16, -1, 0))), "negative"),
        ("open", (str(folder).encode(), ctypes.byref(app.OpenOptions(16, 1, 1000))), "budget"),
        ("close", (0,), "0 is not open"),
        ("close", (-5,), "-5 is not open"),
        ("describe", (session, None), "no open artifact"),
        ("describe", (opened, None), "info: NULL"),
        ("tokenize", (opened, None, 1, 0, None, 0), "text: NULL"),
        ("tokenize", (opened, b"\xc3(", 2, 0, None, 0), "not UTF-8 at byte 0"),
        ("tokenize", (opened, b"a", 1, 64, None, 0), "flags"),
        ("tokenize", (opened, b"a", 1, 0, None, 5), "no buffer"),
        ("tokenize", (opened, b"a", 1, 0, ids, -1), "negative capacity"),
        ("tokenize", (opened, b"a", 1 << 40, 0, None, 0), "64 MB"),
        ("detokenize", (opened, None, 3, 0, None, 0), "no ids"),
        ("chat", (opened, None, 1, None, 0), "messages: NULL"),
        ("generate", (session, ids, 0, None), "no tokens"),
        ("generate", (session, None, 3, None), "no ids"),
        ("generate", (opened, ids, 1, None), "no open session"),
        ("generate", (session, (app.I32 * 1)(1 << 30), 1, None), "not in the vocabulary"),
        ("generate", (session, (app.I32 * 300)(), 300, None), "the context holds 256"),
        ("generate", (session, ids, 1, changed(size=3)), "options.size is 3"),
        ("generate", (session, ids, 1, changed(temperature=float("nan"))), "temperature"),
        ("generate", (session, ids, 1, changed(top_p=0.0)), "top_p"),
        ("generate", (session, ids, 1, changed(top_k=-1)), "top_k"),
        ("generate", (session, ids, 1, changed(repeat_penalty=1e-310, min_p=0.5)), "repeat_penalty"),
        ("generate", (session, ids, 1, changed(max_new_tokens=-2)), "max_new_tokens"),
        ("generate", (session, ids, 1, changed(stop_count=2, stops=None)), "stops: NULL"),
        ("generate", (session, ids, 1, ctypes.byref(many)), "not 0 to 1000"),
        ("generate", (session, ids, 1, ctypes.byref(app.options(opened, stops=[""]))), "stops[0]: empty"),
        ("generate", (session, ids, 1, ctypes.byref(app.options(opened, stops=["a", "x" * 5000]))), "stops[1]"),
        ("generate", (session, ids, 1, changed(stop_count=1, stops=bad)), "not UTF-8"),
        ("generate", (session, ids, 1, ctypes.byref(app.options(opened, biases=[(1 << 20, 1.0)]))), "bias for token"),
        ("generate", (session, ids, 1, ctypes.byref(app.options(opened, biases=[(1, 1.7e308)]))), "at most 1e6"),
        ("run", (generation, app.PIECE(), None), "each: NULL"),
        ("next", (opened, None, None), "no open generation"),
        ("rewind", (session, 9), "position 9"),
        ("rewind", (session, -1), "position -1"),
        ("save", (session, b"/absent/folder/s"), "/absent/folder/s"),
        ("save", (session, None), "path: NULL"),
    ]
    for name, arguments, words in faults:
        with pytest.raises(app.AppError) as caught:
            app.call(name, *arguments)
        assert words in str(caught.value), (name, arguments, str(caught.value))
        assert "\n" not in str(caught.value)
    for turns, words in (
        ([("tool", "x")], "messages[0]"),
        ([("user", "x"), ("user", "y")], "messages[1]"),
        ([("user", "x"), ("assistant", "y")], "the last message"),
        ([("user", "x"), ("system", "y")], "messages[1]"),
        ([("system", "y")], "no message of the user"),
    ):
        with pytest.raises(app.AppError) as caught:
            app.chat(opened, turns)
        assert words in str(caught.value)
    later = app.begin(session, [5], given)  # the first of them is over then
    with pytest.raises(app.AppError, match="another generation"):
        app.call("next", generation, None, None)
    assert app.STOPPED[app.stats(generation).stopped] == "failed"
    ruled_out = app.begin(session, [5], app.options(opened, biases=[(i, -float("inf")) for i in range(4096)]))
    with pytest.raises(app.AppError, match="exclude all"):
        app.call("next", ruled_out, None, None)
    for id_ in (generation, later, ruled_out):
        app.call("close", id_)
        for name in ("close", "next"):
            with pytest.raises(app.AppError, match="open"):
                app.call(name, id_, *([None, None] if name == "next" else []))


DAMAGED = """
import sys, random, zlib, shutil
from pathlib import Path
from tests.runtime import app
folder, raw = Path(sys.argv[1]), Path(sys.argv[1], "text.moec").read_bytes()
draw, refused, told = random.Random(int(sys.argv[2])), 0, set()
for _ in range(150):
    bad = bytearray(raw)
    index = 24 + 24 * int.from_bytes(raw[12:16], "little")
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(24, min(len(bad), draw.choice((index, 2000, len(bad)))))
        bad[at : at + 4] = draw.choice((b"\\xff" * 4, b"\\0" * 4, b"\\xff\\xff\\xff\\x7f", draw.randbytes(4)))
    bad = bad[:len(raw)]
    bad[20:24] = zlib.crc32(bad[24:]).to_bytes(4, "little")
    (folder / "text.moec").write_bytes(bad)
    try:
        app.call("close", app.open_artifact(folder))
    except app.AppError as fault:
        refused += 1
        told.add(str(fault).split(": ", 1)[1][:20])
print(refused, len(told))
"""


def test_damaged_tables_are_refused(folder: Path, tmp_path: Path) -> None:
    """With a digest that is right, as whoever forges a file writes it: refused, or harmless; never a crash."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    done = subprocess.run([sys.executable, "-c", DAMAGED, str(copy), "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, kinds = map(int, done.stdout.split())
    assert refused > 50
    assert kinds > 2
    raw = (folder / FILE).read_bytes()
    for bad, words in (
        (raw[:-1], "digest"),
        (raw[:30] + b"x" + raw[31:], "digest"),
        (b"", "length"),
        (b"x" * 100, "is not a text.moec"),
        (raw[:8] + b"\1" + raw[9:], "another version"),
    ):
        (copy / FILE).write_bytes(bad)
        with pytest.raises(app.AppError, match=words):
            app.open_artifact(copy)


def test_other_ids_are_refused(folder: Path, tmp_path: Path) -> None:
    """Tables that give other ids than the model's tokenizer: here two merges whose ranks are exchanged."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    raw = bytearray((folder / FILE).read_bytes())
    at = next(
        24 + 24 * i for i in range(int.from_bytes(raw[12:16], "little")) if raw[24 + 24 * i : 28 + 24 * i] == b"MERG"
    )
    offset, size = (int.from_bytes(raw[at + 8 + 8 * i : at + 16 + 8 * i], "little") for i in range(2))
    for merge in range(offset, offset + size, 16):
        rank = int.from_bytes(raw[merge + 8 : merge + 12], "little")
        raw[merge + 8 : merge + 12] = (100_000 - rank).to_bytes(4, "little")
    raw[20:24] = zlib.crc32(raw[24:]).to_bytes(4, "little")
    (copy / FILE).write_bytes(raw)
    with pytest.raises(app.AppError, match="other ids than the model's tokenizer"):
        app.open_artifact(copy)


def test_the_example_of_the_page(folder: Path, tmp_path: Path) -> None:
    """docs/app.md's program, compiled as C99 with every warning, says what Python says."""
    page = (Path(__file__).parents[2] / "docs" / "app.md").read_text("utf-8")
    source = page.split("```c\n", 1)[1].split("```", 1)[0]
    (tmp_path / "app.c").write_text(source)
    library = Path(app.runtime_library())
    include = Path(__file__).parents[2] / "runtime" / "include"
    build = [find_compiler().replace("g++", "gcc").replace("c++", "cc"), "-std=c99", "-pedantic", "-Wall", "-Wextra"]
    build += ["-Werror", "-I", str(include), str(tmp_path / "app.c"), str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*build, "-o", str(tmp_path / "app")], check=True, capture_output=True)
    done = subprocess.run([tmp_path / "app", folder, "Tell me a story."], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with moec.load(folder) as python:
        messages = [{"role": "system", "content": "Answer in one sentence."}]
        messages.append({"role": "user", "content": "Tell me a story."})
        wanted = "".join(python.generate(messages, max_new_tokens=100, temperature=0.7, seed=1))
    assert done.stdout.decode() == wanted + "\n"
    missing = subprocess.run([tmp_path / "app", tmp_path, "x"], capture_output=True, timeout=120)
    assert (missing.returncode, b"manifest.json" in missing.stderr) == (1, True)
