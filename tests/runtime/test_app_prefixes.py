"""Beginnings of prompts that are kept in a folder: found by their tokens, with the same bits in another process, and
left aside or removed where a file is not what its name says."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moec.assistant.native_text import FILE, tables
from moec.assistant.prefixes import kept_in
from moec.assistant.role_form import FILE as ROLES
from moec.assistant.role_form import RoleForm, role_form
from moec.compiler.tokenizer import load_tokenizer
from tests.assistant.conversations import template
from tests.runtime import app
from tests.runtime.app_prefixes import answer, keep
from tests.runtime.carried_model import carried_program
from tests.runtime.test_app_tools import opened_with
from tests.tiny import TinyModels, tiny_text

SYSTEM = list(range(300, 380))


@pytest.fixture(scope="module")
def folder(tiny: TinyModels) -> Path:
    return tiny(tiny_text(context=256)) / "artifact"


@pytest.fixture
def kept(opened: int, tmp_path: Path) -> Iterator[Path]:
    """A folder for the artifact's prefixes, which does not exist yet."""
    given = tmp_path / "a" / "kept"
    app.call("prefix_folder", opened, str(given).encode())
    yield given
    app.call("prefix_folder", opened, None)


START = """
import json, sys
from pathlib import Path
from tests.runtime import app
from tests.runtime.app_prefixes import answer, keep
artifact = app.open_artifact(Path(sys.argv[1]))
app.call("prefix_folder", artifact, sys.argv[2].encode())
system = json.loads(sys.argv[3])
known = app.call("prefix_tokens", artifact, b"system")
print(json.dumps([known, keep(artifact, system, b"system"), answer(artifact, [*system, 5, 6, 7])]))
session = app.call("session", artifact)
generation = app.begin(session, [*system, 5, 6], app.options(artifact, max_new_tokens=0))
app.pieces(generation)
app.call("save", session, sys.argv[4].encode())
"""


def test_once_for_an_installation(opened: int, folder: Path, kept: Path, tmp_path: Path) -> None:
    """In two processes: what the second restores has the bits of what the first computed, and of neither."""

    def start(saved: str) -> tuple[int, int, list[Any]]:
        command = [sys.executable, "-c", START, str(folder), str(kept), json.dumps(SYSTEM), str(tmp_path / saved)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        known, reused, given = json.loads(done.stdout)
        return known, reused, given

    first, second = start("1"), start("2")
    assert (first[:2], second[:2]) == ((0, 0), (len(SYSTEM), len(SYSTEM)))
    assert first[2] == second[2]
    app.call("prefix_folder", opened, None)
    text, reused, scores = answer(opened, [*SYSTEM, 5, 6, 7])
    assert [text, scores] == [second[2][0], second[2][2]]
    assert (reused, second[2][1]) == (0, len(SYSTEM))
    session = app.call("session", opened)
    answer(opened, [*SYSTEM, 5, 6], session, max_new_tokens=0)
    app.call("save", session, str(tmp_path / "3").encode())
    app.call("close", session)
    assert len({(tmp_path / saved).read_bytes() for saved in "123"}) == 1  # tokens and caches
    assert len(list(kept.iterdir())) == 1


def test_the_longest_that_is_longer_than_what_is_held(opened: int, kept: Path) -> None:
    assert list(kept.iterdir()) == []
    for count in (20, 40, 60):
        keep(opened, SYSTEM[:count])
    keep(opened, [7, *SYSTEM[:69]], b"other")
    alone = {}
    app.call("prefix_folder", opened, None)
    for count in (30, 60, 61, 80):
        alone[count] = answer(opened, SYSTEM[:count])
    app.call("prefix_folder", opened, str(kept).encode())
    for count, reused in ((30, 20), (60, 40), (61, 60), (80, 60)):  # a token is left, behind which the answer begins
        text, found, scores = answer(opened, SYSTEM[:count])
        assert (text, found, scores) == (alone[count][0], reused, alone[count][2])
    session = app.call("session", opened)
    answer(opened, SYSTEM[:50], session)
    assert answer(opened, [*SYSTEM[:50], 9], session)[1] == 50  # what the session holds is not read again
    assert answer(opened, SYSTEM[:80], session)[1] == 60
    assert answer(opened, SYSTEM[:60], session, max_new_tokens=0)[1] == 60  # nothing is computed at all
    app.call("rewind", session, 3)
    assert answer(opened, SYSTEM[:60], session, max_new_tokens=0)[1] == 60
    assert answer(opened, [7, *SYSTEM], session)[1] == 70
    app.call("close", session)
    assert app.prefix_warning(opened) == ""


def test_a_name_has_one_prefix(opened: int, kept: Path) -> None:
    for name in (b"a", b"A.b_c-9", b"..", b"session", b"x" * 64):
        assert app.call("prefix_tokens", opened, name) == 0
        keep(opened, SYSTEM[:20], name)
        keep(opened, SYSTEM[:20], name)  # once more changes nothing
        keep(opened, SYSTEM[:30], name)
        assert app.call("prefix_tokens", opened, name) == 30
    assert len(list(kept.iterdir())) == 5
    keep(opened, SYSTEM[:20], b"a")
    keep(opened, SYSTEM[:40])
    assert answer(opened, SYSTEM[:50])[1] == 40
    assert [app.call("forget_prefix", opened, b"a") for _ in range(2)] == [1, 0]
    assert app.call("prefix_tokens", opened, b"a") == 0
    assert app.call("prefix_tokens", opened, b"..") == 30
    assert len(list(kept.iterdir())) == 5
    listed = kept_in(kept)  # what `moec prefixes` tells
    assert {one.name for one in listed} == {None, "A.b_c-9", "..", "session", "x" * 64}
    assert {(one.name, one.tokens) for one in listed if one.tokens != 30} == {(None, 40)}
    assert len({one.artifact for one in listed}) == 1


@pytest.mark.parametrize(
    "name", [b"", b"a/b", b"../x", b"a b", b"a\n", "é".encode(), b"\xff", b"x" * 65, b"x" * 10_000]
)
def test_hostile_names_are_refused(opened: int, session: int, kept: Path, name: bytes) -> None:
    answer(opened, SYSTEM[:20], session)
    for function, id_ in (("keep_prefix", session), ("prefix_tokens", opened), ("forget_prefix", opened)):
        with pytest.raises(app.AppError, match="name: 1 to 64 of"):
            app.call(function, id_, name)
    assert list(kept.iterdir()) == []


def test_what_is_misused_is_told(opened: int, session: int, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(app.AppError, match="cannot be used for prefixes: Not a directory"):
            app.call("prefix_folder", opened, str(path).encode())
    with pytest.raises(app.AppError, match="folder: empty"):
        app.call("prefix_folder", opened, b"")
    with pytest.raises(app.AppError, match="holds no tokens"):
        app.call("keep_prefix", session, None)
    for function, words in (("prefix_tokens", "name: NULL"), ("forget_prefix", "name: NULL")):
        with pytest.raises(app.AppError, match=words):
            app.call(function, opened, None)
    app.call("prefix_folder", opened, None)
    for function, arguments in (
        ("keep_prefix", (session, None)),
        ("prefix_tokens", (opened, b"a")),
        ("forget_prefix", (opened, b"a")),
        ("prefix_warning", (opened, None, 0)),
    ):
        with pytest.raises(app.AppError, match="no folder for prefixes"):
            app.call(function, *arguments)
    assert list(kept.iterdir()) == []


def damages(raw: bytes, foreign: bytes, other: bytes) -> list[tuple[bytes, str]]:
    flipped = raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]
    return [
        (raw[: len(raw) // 2], "damaged: "),
        (flipped, "damaged: its contents differ from its digest"),
        (raw[:20] + b"x" + raw[21:], "damaged: its header"),
        (b"", "is not a session that moec saved"),
        (b"x" * 10_000, "is not a session that moec saved"),
        (foreign, "saved with another artifact"),
        (other, "holds other tokens than its name says"),
    ]


def test_damaged_files_are_told_removed_and_computed_again(
    opened: int, session: int, folder: Path, kept: Path, tmp_path: Path
) -> None:
    keep(opened, SYSTEM)
    (file,) = kept.iterdir()
    raw = file.read_bytes()
    app.call("prefix_folder", opened, None)
    text, _, scores = answer(opened, [*SYSTEM, 5])
    app.call("prefix_folder", opened, str(kept).encode())
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").write_text((folder / "manifest.json").read_text() + "\n")
    another = app.open_artifact(tmp_path / "copy")
    found = []
    for of, ids in ((another, SYSTEM), (opened, [9] * len(SYSTEM))):
        made = app.call("session", of)
        answer(of, ids, made, max_new_tokens=0)
        app.call("save", made, str(tmp_path / "saved").encode())
        found.append((tmp_path / "saved").read_bytes())
        app.call("close", made)
    for bad, words in damages(raw, *found):
        file.write_bytes(bad)
        answer(opened, [*SYSTEM[:10], 4], session)  # the session may hold a part of the prompt, and lose it
        again, reused, values = answer(opened, [*SYSTEM, 5], session)
        assert (again, values) == (text, scores)
        assert reused in (0, 10)
        warning = app.prefix_warning(opened)
        assert warning.startswith(f"{file}: ")
        assert words in warning
        assert warning.endswith("; it was removed")
        assert not file.exists()
    # prefixes of the other artifact are not looked at
    app.call("prefix_folder", another, str(kept).encode())
    keep(another, SYSTEM, b"a")
    assert (app.call("prefix_tokens", another, b"a"), app.call("prefix_tokens", opened, b"a")) == (len(SYSTEM), 0)
    assert answer(opened, [*SYSTEM, 5])[1] == 0
    app.call("close", another)


def test_files_that_cannot_be_read_stay(opened: int, kept: Path) -> None:
    keep(opened, SYSTEM[:20])
    keep(opened, SYSTEM[:40])
    file = max(kept.iterdir(), key=lambda f: f.stat().st_size)
    file.unlink()
    file.symlink_to(file)  # to itself: the system refuses to open it
    assert answer(opened, [*SYSTEM, 5])[1] == 20
    assert "is not used: cannot be read" in app.prefix_warning(opened)
    assert file.is_symlink()
    file.unlink()
    file.mkdir()
    assert answer(opened, [*SYSTEM, 5])[1] == 20
    assert "is not a regular file; it cannot be removed" in app.prefix_warning(opened)
    assert file.is_dir()


READ_ONLY = """
import json, os, sys
from pathlib import Path
from tests.runtime import app
from tests.runtime.app_prefixes import answer
artifact, session = app.open_artifact(Path(sys.argv[1])), None
os.chdir(sys.argv[2])
if os.geteuid() == 0:
    os.setuid(65534)  # the system keeps nothing from root
app.call("prefix_folder", artifact, b"kept")
session = app.call("session", artifact)
reused = answer(artifact, [*range(300, 380), 5], session)[1]
assert reused == 80, (reused, app.prefix_warning(artifact))
assert app.call("prefix_tokens", artifact, b"named") == 80
for function, id_ in (("keep_prefix", session), ("forget_prefix", artifact)):
    try:
        app.call(function, id_, b"named")
    except app.AppError as error:
        assert "Permission denied" in str(error), error
    else:
        raise AssertionError(function)
print("read-only")
"""


def test_a_folder_that_cannot_be_written(opened: int, folder: Path, kept: Path) -> None:
    keep(opened, SYSTEM, b"named")
    (file,) = kept.iterdir()
    file.chmod(0o444)
    for place in (kept, kept.parent):
        place.chmod(0o555)
    try:
        command = [sys.executable, "-c", READ_ONLY, str(folder), str(kept.parent)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        for place in (kept, kept.parent):
            place.chmod(0o755)
    assert done.stdout == "read-only\n", done.stderr[-2000:]
    assert list(kept.iterdir()) == [file]


def test_the_oldest_without_a_name_go(opened: int, kept: Path) -> None:
    keep(opened, SYSTEM[:20])
    keep(opened, SYSTEM[:30], b"named")
    identity, _, digest = next(f for f in kept.iterdir() if "named" not in f.name).name.split("-")
    for index in range(70):
        old = kept / f"{identity}-{1000 + index}-{digest}"
        old.write_bytes(b"")
        os.utime(old, (1000 + index, 1000 + index))
    strange = [
        kept / name for name in ("mine", f"{identity}-x-{digest}", f"{identity}-12-{digest[1:]}", f"x{identity}")
    ]
    for file in strange:
        file.write_text("stays")
    os.utime(next(f for f in kept.iterdir() if "named" in f.name), (1, 1))
    assert answer(opened, [*SYSTEM[:20], 5])[1] == 20  # it is used, and the newest therefore
    keep(opened, SYSTEM[:40])
    names = {f.name for f in kept.iterdir()}
    assert {f.name for f in strange} <= names
    assert len(names) == 64 + 1 + len(strange)
    assert answer(opened, [*SYSTEM[:20], 5])[1] == 20
    assert app.call("prefix_tokens", opened, b"named") == 30
    assert f"{identity}-1069-{digest}" in names
    assert f"{identity}-1007-{digest}" not in names


def test_sessions_at_once(opened: int, kept: Path) -> None:
    prompts = [[*SYSTEM, *range(500 + 9 * i, 520 + 9 * i)] for i in range(4)]
    app.call("prefix_folder", opened, None)
    alone = [answer(opened, prompt)[0] for prompt in prompts]
    app.call("prefix_folder", opened, str(kept).encode())
    found: list[tuple[int, str, int]] = []

    def run(index: int) -> None:
        for turn in range(4):
            keep(opened, SYSTEM[: 60 + 5 * ((index + turn) % 4)], b"system" if index % 2 else None)
            text, reused, _ = answer(opened, prompts[index])
            found.append((index, text, reused))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(index, text) for index, text, _ in found} == set(enumerate(alone))
    assert len(found) == 16
    assert max(reused for _, _, reused in found) == 75
    assert app.call("prefix_tokens", opened, b"system") in (60, 65, 70, 75)
    assert len([f for f in kept.iterdir() if ".system." in f.name]) == 1


def test_states_that_do_not_go_back(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.pte").write_bytes(carried_program(4096, 256, known=4096))
    artifact = app.open_artifact(tmp_path / "copy")
    alone = answer(artifact, [*SYSTEM, 5])
    app.call("prefix_folder", artifact, str(tmp_path / "kept").encode())
    keep(artifact, SYSTEM, b"system")
    session = app.call("session", artifact)
    for _ in range(3):  # what the session holds goes too far, and begins anew
        assert answer(artifact, [*SYSTEM, 5], session) == (alone[0], len(SYSTEM), alone[2])
    for id_ in (session, artifact):
        app.call("close", id_)


# --- system prompts ---------------------------------------------------------------------------------------------------

TOOLS = json.dumps([
    {"type": "function", "function": {"name": name, "description": "Says", "parameters": {"type": "object"}}}
    for name in ("f", "g")
])  # fmt: skip


def turns(drawn: random.Random, system: str | None, with_tools: bool) -> list[app.Turn]:
    """A conversation with texts of all kinds."""

    def text() -> str:
        words = (
            "a",
            " ",
            "\n",
            "Hello",
            "  ",
            "()",
            "=>",
            "::",
            "é",
            "日本",
            "🙂",
            "\u0301",
            "1",
            "<",
            "|",
            "\t",
            "T",
            "_",
        )
        return "".join(drawn.choice(words) for _ in range(drawn.randrange(6)))

    found = [] if system is None else [app.turn("system", system)]
    for _ in range(drawn.randrange(4)):
        found.append(app.turn("user", text()))
        if with_tools and drawn.random() < 0.5:
            found += [app.turn("assistant", "", [("f", "{}")]), app.turn("tool", text())]
        found.append(app.turn("assistant", text()))
    return [*found, app.turn("user", text())]


def check_prefix(artifact: int, drawn: random.Random) -> list[int]:
    """Lengths of what is common, each proven on conversations."""
    found = []
    for system in (None, "Be brief, and never say a word too much."):
        for tools in (None, TOOLS):
            given = None if tools is None else tools.encode(), None if system is None else system.encode()
            try:
                ids = app.many("system_prompt", artifact, *given)
            except app.AppError as error:
                if not any(words in str(error) for words in ("no system prompt", "tools: ")):
                    raise
                continue
            found.append(len(ids))
            for _ in range(60):
                try:
                    whole = app.chat_with_tools(artifact, tools, turns(drawn, system, tools is not None))
                except app.AppError as error:
                    if "differently" not in str(error):
                        raise
                    continue
                assert whole[: len(ids)] == ids
                assert len(whole) > len(ids)
    return found


@pytest.mark.parametrize("name", ["hermes", "llama3", "deepseek", "qwen3", "granite", "lfm2"])
def test_conversations_begin_with_their_system_prompt(name: str, tiny: TinyModels, tmp_path: Path) -> None:
    artifact = opened_with(tiny(tiny_text()) / "artifact", template(name), tmp_path / "copy", name)
    lengths = check_prefix(artifact, random.Random(name))
    # tokens are bytes: the text of the system prompt and that of the tools are in it
    assert max(lengths) > (150 if name != "llama3" else 40)
    app.call("close", artifact)


def test_tokens_that_reach_into_the_question_are_left_out(tiny: TinyModels, tmp_path: Path) -> None:
    """A template whose markers are no tokens of the vocabulary: what stands before a question may be cut with it."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny(tiny_text()) / "artifact", copy)
    form = role_form(template("chatml"))
    assert isinstance(form, RoleForm)
    (copy / ROLES).write_text(form.json(), "utf-8")
    (copy / FILE).write_bytes(tables(copy, load_tokenizer(copy / "tokenizer.json")))
    artifact = app.open_artifact(copy)
    lengths = check_prefix(artifact, random.Random(4))
    assert len(lengths) == 2
    assert min(lengths) > 4
    for text, words in ((b"\xff", "system: is not UTF-8"), (b"x" * (65 << 20), "system: more than 64 MB")):
        with pytest.raises(app.AppError, match=words):
            app.call("system_prompt", artifact, None, text, None, 0)
    with pytest.raises(app.AppError, match="tools: is not JSON"):
        app.call("system_prompt", artifact, b"", None, None, 0)
    app.call("close", artifact)
