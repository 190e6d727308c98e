"""What a command writes is whole or not written, never in the place of what it describes; streams may be gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.cli.main import run
from moec.cli.output import check_apart, check_writable, write_text
from moec.compiler.artifact import Artifact, ModelRecord, read_manifest
from moec.compiler.errors import ArtifactError, RunError, UserError
from moec.compiler.tokenizer import check_unicode, load_tokenizer
from tests.conftest import Moec

PLAN = ["plan", "specs/models/mobilemoe-tiny.yaml", "--device", "galaxy-s25"]


def shell(command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """`command` in bash, where $MOEC is the command line of this interpreter."""
    environment = os.environ | {"MOEC": f"{sys.executable} -m moec"}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False, env=environment, **options
    )  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("marker", ["manifest.json", "config.json", "run.json", "corpus.json"])
def test_parts_of_what_is_described_are_no_outputs(marker: str, tmp_path: Path) -> None:
    (tmp_path / marker).write_text("{}")
    parts = (marker, "model.pte", "tokenizer.json", "model.safetensors", "train.tokens")
    for name in parts:
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match="belongs to the artifact, checkpoint, run or corpus in its folder"):
            check_writable(tmp_path / name)
        with pytest.raises(UserError, match="belongs to the artifact, checkpoint, run or corpus in its folder"):
            write_text(tmp_path / name, "yours")
        assert (tmp_path / name).read_text() == "mine"
    (tmp_path / "report.html").write_text("old")
    write_text(tmp_path / "report.html", "new")  # a report lies beside them
    write_text(tmp_path / "new.json", "new")
    assert (tmp_path / "report.html").read_text() == (tmp_path / "new.json").read_text() == "new"
    elsewhere = tmp_path / "free" / "manifest.json"
    write_text(elsewhere, "a")
    assert elsewhere.read_text() == "a"


def test_a_link_to_a_part_is_a_part(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "x.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="belongs to the artifact"):
        check_writable(tmp_path / "x.json")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "old.json"
    file.write_text("old")

    def full(self: Path, text: str, *_: object) -> int:
        self.write_bytes(text[:3].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        write_text(file, "longer than before")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_outputs_of_one_name(tmp_path: Path) -> None:
    check_apart(tmp_path / "a", tmp_path / "b")
    check_apart(tmp_path / "a", None)
    with pytest.raises(UserError, match="two outputs go to this file"):
        check_apart(tmp_path / "a", tmp_path / "x" / ".." / "a")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    done = shell(f"$MOEC {' '.join(PLAN)} {closed}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_reader_that_leaves_is_no_failed_check() -> None:
    done = shell("$MOEC schema | head -c 1 >/dev/null; echo ${PIPESTATUS[0]}")
    assert done.stdout.strip() in ("141", "0")  # 0: all was in the pipe before its reader left
    done = shell("($MOEC schema; echo $? >&2) | true")
    assert done.stderr.strip().splitlines()[-1] == "141"
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_status_stays_where_nothing_can_be_said(unbuffered: str) -> None:
    assert shell(f"PYTHONUNBUFFERED={unbuffered} $MOEC plan nosuch.yaml 2>/dev/full").returncode == 2


@pytest.mark.parametrize("text", ["\udcff", "half a \ud800 pair"])
def test_half_characters_are_named(text: str) -> None:
    with pytest.raises(RunError, match="--prompt: holds half a character; give it as UTF-8"):
        check_unicode(text, "--prompt")
    check_unicode("whole 𝄞", "--prompt")


def _manifest(change: Callable[[dict], object], folder: Path, source: Path) -> Path:
    folder.mkdir()
    raw = json.loads((source / "manifest.json").read_text())
    change(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moec.checkpoints import synthesize
    from moec.compiler import build
    from moec.compiler.spec import load_spec

    folder = tmp_path_factory.mktemp("outputs")
    spec = load_spec("specs/models/mobilemoe-tiny.yaml")
    synthesize(spec, folder / "checkpoint", seed=1, qat=True)
    build.compile(spec, checkpoint=folder / "checkpoint", out=folder / "artifact")
    return folder / "artifact"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"][0].update(name="a\0b"),
        lambda m: m["model"].update(vocab_size=0),
        lambda m: m["model"].update(context=10**30),
        lambda m: m["model"].update(max_tokens=0),
        lambda m: m["model"].update(bos_id=10**20),
    ],
)
def test_impossible_manifests(change: Callable[[dict], object], artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        read_manifest(_manifest(change, tmp_path / "a", artifact))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["details"].update(methods="x"),
        lambda m: m["details"].update(methods={"forward": 5}),
        lambda m: m["details"].update(methods={"forward": {"instructions": {"a": 1}}}),
        lambda m: m["details"].update(operators=["moec::linear"]),
    ],
)
def test_impossible_details_are_one_line(
    change: Callable[[dict], object], artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _manifest(change, tmp_path / "a", artifact)
    for file in artifact.iterdir():
        if file.name != "manifest.json":
            (folder / file.name).symlink_to(file)
    assert run(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "manifest.json: damaged: details" in error
    assert error.count("\n") == 1


def test_titles_of_devices_do_not_command_the_terminal(moec: Moec, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "specs" / "devices" / "galaxy-s25.yaml"
    text = "".join(
        'title: "A phone\\e[31m\\u202e"\n' if line.startswith("title:") else line
        for line in shipped.read_text("utf-8").splitlines(keepends=True)
    )
    (device := tmp_path / "phone.yaml").write_text(text, "utf-8")
    spec = Path(__file__).parents[2] / "specs" / "models" / "mobilemoe-tiny.yaml"
    for words in (["device", "show", device], ["plan", spec, "--device", device]):
        status, out, err = moec(*words)
        assert (status, "A phone" in out) == (0, True), err
        assert "\x1b" not in out
        assert "\u202e" not in out


def test_no_sizes_are_no_division(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _manifest(lambda m: m.update(sizes_by_role={"expert": 0}), tmp_path / "a", artifact)
    for file in artifact.iterdir():
        if file.name != "manifest.json":
            (folder / file.name).symlink_to(file)
    assert run(["inspect", str(folder)]) == 0


def test_pipes_are_no_files(artifact: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(ArtifactError, match="is not a regular file"):
        read_manifest(tmp_path)
    folder = _manifest(lambda m: None, tmp_path / "a", artifact)
    for file in artifact.iterdir():
        if file.name == "model.pte":
            os.mkfifo(folder / file.name)
        elif file.name != "manifest.json":
            (folder / file.name).symlink_to(file)
    with pytest.raises(ArtifactError, match="is not a regular file"):
        Artifact.open(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"version": "1.0", "trunc'])
def test_a_damaged_tokenizer_is_no_checkpoint_to_compile(
    content: bytes, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in (artifact.parent / "checkpoint").iterdir():
        (checkpoint / file.name).symlink_to(file)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.json").write_bytes(content)
    out = tmp_path / "artifact"
    arguments = [
        "compile",
        "specs/models/mobilemoe-tiny.yaml",
        "-q",
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(out),
    ]
    assert run(arguments) == 2
    assert "tokenizer.json: not a tokenizer" in capsys.readouterr().err
    assert not out.exists()


def test_a_tokenizer_in_a_folder_that_is_no_utf8(artifact: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff"))
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(artifact / "tokenizer.json")
    assert load_tokenizer(folder / "tokenizer.json").vocab_size > 0


def test_lengths_of_a_real_manifest_are_within_the_bounds(artifact: Path) -> None:
    assert isinstance(read_manifest(artifact).model, ModelRecord)


def test_a_device_name_is_checked_before_the_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moec.runtime import machine

    monkeypatch.setattr(machine, "peaks", lambda *_: pytest.fail("measured"))
    assert run(["device", "measure", "--name", "a/b"]) == 2
    assert "--name a/b: is no name of a device" in capsys.readouterr().err
