"""Which build is used: what a wheel brought if it fits, in every respect, and otherwise one that is made here."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import pytest

from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.runtime import native, shipped


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> native.NativeFiles:
    """An installation whose wheel brought a build, of files that are no libraries; no compiler, an empty cache."""
    site = tmp_path / "site-packages"
    folder = site / "moec" / "runtime" / "shipped"
    folder.mkdir(parents=True)
    (site / "executorch" / "share" / "cmake").mkdir(parents=True)
    (site / "executorch" / "share" / "cmake" / "executorch-config.cmake").write_text("")
    import executorch

    monkeypatch.setattr(executorch, "__path__", [str(site / "executorch")])
    monkeypatch.setattr(shipped, "FOLDER", folder)
    monkeypatch.setattr(native, "_built", None)
    monkeypatch.delenv("MOEC_NATIVE_DIR", raising=False)
    monkeypatch.delenv("MOEC_SANITIZE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    files = native.NativeFiles(folder, native.source_digest())
    for path in files.all:
        path.write_bytes(path.name.encode())
    files.sums.write_text(files.text_of_sums())
    record(folder)
    return files


def record(folder: Path, **other: str) -> None:
    """The record of a build that fits here, but for `other`."""
    values = {
        "sources": native.source_digest(),
        "executorch": native._executorch_version(),
        "machine": platform.machine(),
        "system": sys.platform,
    }
    shipped.Record(**{**values, **other}).write(folder)


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a build that does not fit. Another is begun, for which there is no compiler."""
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        native.native_files(progress=Progress())
    assert native.obstacle() is not None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the kernels that came with moec are not used, and are built here: ")
    return line


def test_a_build_that_fits_is_used_as_it_is(
    brought: native.NativeFiles, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert native.native_files(progress=Progress()) == brought
    assert native.kernels_library() == brought.kernels
    assert native.obstacle() is None
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"sources": "0" * 16}, "built from other sources"),
        ({"executorch": "1.4.0"}, "for executorch 1.4.0, and "),
        ({"machine": "riscv64"}, "for linux on riscv64, this is "),
        ({"system": "darwin"}, "for darwin on "),
    ],
)
def test_a_build_for_something_else_is_not_used(
    brought: native.NativeFiles, capsys: pytest.CaptureFixture[str], other: dict[str, str], said: str
) -> None:
    record(brought.folder, **other)
    assert said in refused(capsys)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"sources": 1}', "\xff", "[" * 100_000, '{"a": "b"}', None], ids=lambda t: repr(t)[:12]
)
def test_a_damaged_record_is_no_record(
    brought: native.NativeFiles, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    file = brought.folder / "build.json"
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    assert "their record is damaged" in refused(capsys)


def test_a_record_of_values_that_are_no_texts_is_no_record(brought: native.NativeFiles) -> None:
    file = brought.folder / "build.json"
    values = json.loads(file.read_text())
    assert shipped.read_record(brought.folder) == shipped.Record(**values)
    file.write_text(json.dumps({**values, "executorch": None}))
    assert shipped.read_record(brought.folder) is None


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing", "no sums"])
def test_a_damaged_file_is_not_loaded(
    brought: native.NativeFiles, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    raw = brought.runtime.read_bytes()
    if damage == "bit":
        brought.runtime.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    elif damage == "truncated":
        brought.runtime.write_bytes(raw[:-1])
    elif damage == "missing":
        brought.runtime.unlink()
    else:
        brought.sums.unlink()
    assert "is missing or damaged" in refused(capsys)


def test_executorch_must_lie_beside_moec(
    brought: native.NativeFiles, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The libraries look for it there, and nowhere else."""
    os.rename(brought.folder.parents[2] / "executorch", tmp_path / "executorch")
    import executorch

    executorch.__path__[:] = [str(tmp_path / "executorch")]
    assert f"executorch is not installed beside moec but in {tmp_path}" in refused(capsys)


def test_an_own_cache_is_an_own_build(
    brought: native.NativeFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MOEC_NATIVE_DIR", str(tmp_path / "own"))
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        native.native_files(progress=Progress())
    assert capsys.readouterr().err == ""


def test_a_build_in_the_cache_is_used_without_a_word(
    brought: native.NativeFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that does not fit was named when the other was built."""
    record(brought.folder, executorch="1.4.0")
    digest = native._digest(native._read_sources(), "")
    own = native.NativeFiles(native.cache_folder() / digest, digest)
    own.folder.mkdir(parents=True)
    for path in own.all:
        path.write_bytes(b"x")
    own.sums.write_text(own.text_of_sums())
    assert native.native_files(progress=Progress()) == own
    assert capsys.readouterr().err == ""


def test_a_checkout_has_none() -> None:
    """`make wheel` puts the build into the wheel, never into the tree."""
    assert not shipped.FOLDER.exists()
