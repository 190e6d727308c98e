"""What the user named to be written or read is checked before the work, and named in one line with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.cli.main import run
from moec.cli.output import check_writable
from moec.compiler.artifact import new_artifact
from moec.compiler.errors import UserError

# what comes first does not exist: a command that names the output's fault has not begun its work
COMMANDS = [
    ["verify", "nowhere.yaml", "--json"],
    ["verify", "nowhere.yaml", "--junit"],
    ["profile", "nowhere", "--json"],
    ["report", "nowhere", "--out"],
    ["search", "--device", "nowhere", "--out"],
    ["fit", "nowhere.csv", "--out"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(("name", "fault"), [("folder", "is a folder"), ("file/x.json", "file is no folder")])
def test_an_output_in_the_way_is_said_before_the_work(
    command: list[str], name: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    assert run([*command, str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.startswith(str(tmp_path / name))
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "folder"]


def test_outputs_that_can_be_written_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    check_writable(None, Path("-"), tmp_path / "old.json", tmp_path / "new.json", tmp_path / "a" / "b" / "c.json")
    assert (tmp_path / "old.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "old.json"]


def test_an_output_below_a_file_is_no_other_compile(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(UserError, match="file is no folder; choose another --out"),
        new_artifact(tmp_path / "file" / "x"),
    ):
        pass


@pytest.mark.parametrize(
    ("content", "fault"), [(None, "No such file"), (b"\xff", "not UTF-8"), (b"", "no token in the text")]
)
def test_a_text_to_verify_with_is_named(
    content: bytes | None, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    assert run(["verify", "specs/models/mobilemoe-tiny.yaml", "--text", str(file), "-q"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{file}: ")
    assert fault in error
    assert ";" in error
    assert error.count("\n") == 1


def test_a_file_of_ids_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moec.cli.bench_cmd import _token_ids

    with pytest.raises(UserError) as caught:
        _token_ids(tmp_path / "none")
    assert str(caught.value).count("none") == 1
    assert "Errno" not in str(caught.value)


@pytest.mark.parametrize(("device", "fault"), [("gpu0", "'gpu0' is not known"), ("cuda", "has no CUDA")])
def test_a_device_to_train_on_is_checked_before_the_work(
    device: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec, out = "specs/models/mobilemoe-nano.yaml", tmp_path / "run"
    assert run(["train", spec, "--data", str(tmp_path / "none"), "--out", str(out), "--device", device]) == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "quantization", "fault"),
    [
        (["--method", "gtpq"], "{weights: int4}", "there is no quantization method 'gtpq'; known here: "),
        (["--method", "gptq"], "none", "the spec quantizes nothing; leave --method and --calibration out"),
        (["--calibration", "a.txt"], "none", "the spec quantizes nothing"),
    ],
)
def test_methods_that_cannot_be_used(
    options: list[str], quantization: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "a.yaml"
    model = "{transformers: .}"
    spec.write_text(f"name: a\nmodel: {model}\nquantization: {quantization}\ntargets: [xnnpack]\n")
    assert run(["compile", str(spec), *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
