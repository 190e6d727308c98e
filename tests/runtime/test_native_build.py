"""The native build's own faults: each a UserError, and nothing left behind that looks like a build."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.runtime import native


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no build known to this process."""
    monkeypatch.setenv("MOEC_NATIVE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_built", None)
    return tmp_path / "cache"


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler found .*install g\+\+"):
        native.native_files(progress=Progress(quiet=True))
    assert not fresh.exists()


def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match="building the kernels failed"):
        native.native_files(progress=Progress(quiet=True))
    assert not [p for p in fresh.iterdir() if len(p.name) == 16]


def test_an_unwritable_cache(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.parent.joinpath("file").write_text("")
    monkeypatch.setenv("MOEC_NATIVE_DIR", str(fresh.parent / "file" / "cache"))
    with pytest.raises(UserError, match="MOEC_NATIVE_DIR"):
        native.native_files(progress=Progress(quiet=True))


def test_no_executorch(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import executorch

    monkeypatch.setattr(executorch, "__path__", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install executorch"):
        native.native_files(progress=Progress(quiet=True))


def test_a_complete_build_is_used_as_it_is(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler is needed where the cache has the files."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = fresh / native._digest(native._read_sources(), "")
    files = native.NativeFiles(folder, folder.name)
    folder.mkdir(parents=True)
    for path in (files.kernels, files.runtime, files.runner):
        path.write_bytes(b"")
    assert native.native_files() == files


def test_unchanged_sources_keep_their_time_stamps(tmp_path: Path) -> None:
    native._sync(tmp_path, {"kernels/a.cpp": b"1", "kernel/b.cpp": b"2"})
    before = (tmp_path / "kernels/a.cpp").stat().st_mtime_ns
    native._sync(tmp_path, {"kernels/a.cpp": b"1", "runner/c.cpp": b"3"})
    assert (tmp_path / "kernels/a.cpp").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.rglob("*.cpp")) == ["a.cpp", "c.cpp"]


def test_old_builds_are_forgotten(tmp_path: Path) -> None:
    folders = [tmp_path / f"{i:016x}" for i in range(9)]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "tree-plain").mkdir()
    native._forget_old_builds(tmp_path, keep=folders[0], most=3)
    left = {p.name for p in tmp_path.iterdir()}
    assert folders[0].name in left
    assert "tree-plain" in left
    assert len(left) == 4
