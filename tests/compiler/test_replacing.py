"""Whose folder `--out` may replace, who is alive, and what a reader sees meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moec.compiler import replacing
from moec.compiler.errors import UserError
from moec.compiler.replacing import MARK, await_replaced, owned

KIND = "an artifact"


def make(out: Path, text: str = "one") -> Path:
    with replacing.replacing(out, kind=KIND) as folder:
        (folder / "data.txt").write_text(text)
    return out


def test_ours_is_replaced(tmp_path: Path) -> None:
    out = make(tmp_path / "a")
    assert owned(out) == KIND
    assert (make(out, "two") / "data.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"manifest.json": '{"manifest_version": 3}', "background.js": "x"}, id="browser-extension"),
        pytest.param({"config.json": "{}", "model.safetensors": "weights"}, id="downloaded-checkpoint"),
        pytest.param({".git": None, "manifest.json": "{}", "src.py": "x"}, id="git-project"),
        pytest.param({MARK: "not json", "manifest.json": "{}"}, id="broken-mark"),
        pytest.param({MARK: '{"moec": "a corpus", "files": [".moec"]}'}, id="another-kind"),
        pytest.param({MARK: '{"moec": "an artifact"}', "x": "y"}, id="mark-without-files"),
        pytest.param({MARK: "[" * 100_000, "x": "y"}, id="deep-mark"),
    ],
)
def test_a_folder_without_our_mark_is_refused(tmp_path: Path, files: dict[str, str | None]) -> None:
    out = tmp_path / "theirs"
    out.mkdir()
    for name, text in files.items():
        (out / name).mkdir() if text is None else (out / name).write_text(text)
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match="choose another --out") as caught:
        make(out)
    assert "\n" not in str(caught.value)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("name", [".", "..", "../here", "../../outer", "/"])
def test_the_current_folder_is_refused_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty as it is: it would be exchanged below the feet of whoever stands there."""
    here = tmp_path / "outer" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    says = pytest.raises(UserError, match="is the current folder or lies above it; choose another --out")
    with says, replacing.replacing(Path(name), kind=KIND):
        pytest.fail("the work began")
    assert [*here.iterdir()] == []
    make(Path("below"))


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "verify.json"])
def test_what_a_user_laid_beside_is_kept(tmp_path: Path, name: str) -> None:
    out = make(tmp_path / "a")
    (out / name).write_text("mine")
    with pytest.raises(UserError, match="moec did not write"):
        make(out)
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["tasks/mine.yaml", "tasks/more/mine.yaml", "data.txt/mine.yaml"])
def test_what_a_user_laid_below_is_kept(tmp_path: Path, name: str) -> None:
    """In a folder of ours, in a new one below it, and in one that stands where our file was."""
    out = tmp_path / "a"
    for again in (False, True):
        with replacing.replacing(out, kind=KIND) as folder:
            (folder / "data.txt").write_text("ours")
            (folder / "tasks").mkdir()
            (folder / "tasks" / "heldout.yaml").write_text("again" if again else "first")
    if name.startswith("data.txt"):
        (out / "data.txt").unlink()
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(UserError, match="moec did not write"):
        make(out)
    assert (out / name).read_text() == "mine"


def test_a_file_laid_there_meanwhile_is_kept(tmp_path: Path) -> None:
    out = make(tmp_path / "a")
    with pytest.raises(UserError, match="moec did not write"), replacing.replacing(out, kind=KIND):
        (out / "notes.txt").write_text("mine")
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "data.txt").read_text() == "one"


HOLD = """
import sys, time
from pathlib import Path
from moec.compiler.replacing import replacing
with replacing(Path(sys.argv[1]), kind="an artifact") as folder:
    (folder / "data.txt").write_text("slow")
    print(folder, flush=True)
    sys.stdin.read()
"""


def held(out: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_running_process_keeps_its_folder_whatever_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another PID namespace the id of a running process is nobody's: no id may be looked at."""

    def nobody(*_: int) -> None:
        raise ProcessLookupError

    process, folder = held(tmp_path / "a")
    try:
        monkeypatch.setattr(os, "kill", nobody)
        make(tmp_path / "a", "other")
        assert folder.is_dir()
        monkeypatch.undo()
    finally:
        process.communicate("")
    assert process.returncode == 0
    assert (tmp_path / "a" / "data.txt").read_text() == "slow"  # the last to finish
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    process, folder = held(tmp_path / "a")
    process.kill()
    process.communicate()
    assert folder.is_dir()
    make(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_reader_waits_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacing, "_exchange", lambda a, b: False)
    out, real, moved = make(tmp_path / "a"), os.rename, threading.Event()

    def slow(a: Path, b: Path) -> None:
        real(a, b)
        if str(b).endswith("-old"):
            moved.set()
            time.sleep(0.2)

    monkeypatch.setattr(os, "rename", slow)
    writer = threading.Thread(target=make, args=(out, "two"))
    writer.start()
    assert moved.wait(10)
    assert not out.exists()
    await_replaced(out)
    assert (out / "data.txt").read_text() == "two"
    writer.join()


def test_a_reader_restores_what_was_cut_off_between_two_renames(tmp_path: Path) -> None:
    out = make(tmp_path / "a")
    out.rename(tmp_path / ".a.moec-part-0-old")
    await_replaced(out)
    assert (out / "data.txt").read_text() == "one"


def test_a_missing_folder_is_not_waited_for(tmp_path: Path) -> None:
    started = time.monotonic()
    await_replaced(tmp_path / "none")
    await_replaced(tmp_path / "no" / "parent")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("inside", [True, False])
def test_an_unreadable_input_is_not_blamed_on_out(tmp_path: Path, inside: bool) -> None:
    """A file of the checkpoint that may not be read is named; only what is written is the fault of --out."""
    other = tmp_path / "checkpoint" / "tokenizer.json"
    with pytest.raises((UserError, OSError)) as caught, replacing.replacing(tmp_path / "a", kind=KIND) as folder:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "x" if inside else other))
    assert isinstance(caught.value, UserError) == inside
    assert ("--out" in str(caught.value)) == inside
