"""The native build's own faults: each a UserError, and nothing left behind that looks like a build."""

from __future__ import annotations

import os
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


def cached(fresh: Path) -> native.NativeFiles:
    """A build in the cache, of files that are no libraries."""
    folder = fresh / native._digest(native._read_sources(), "")
    files = native.NativeFiles(folder, folder.name)
    folder.mkdir(parents=True)
    for path in files.all:
        path.write_bytes(path.name.encode())
    files.sums.write_text(files.text_of_sums())
    return files


def test_a_complete_build_is_used_as_it_is(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler is needed where the cache has the files."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    files = cached(fresh)
    assert native.native_files() == files


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing", "sums", "no sums"])
def test_a_damaged_build_is_not_loaded(fresh: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """It is built again, for which this test has no compiler."""
    files = cached(fresh)
    raw = files.runtime.read_bytes()
    if damage == "bit":
        files.runtime.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    elif damage == "truncated":
        files.runtime.write_bytes(raw[:-1])
    elif damage == "missing":
        files.runtime.unlink()
    elif damage == "sums":
        files.sums.write_bytes(b"\xff")
    else:
        files.sums.unlink()
    assert not files.complete()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        native.native_files()


@pytest.mark.parametrize("which", ["cache", "folder", "file"])
def test_what_others_may_write_is_refused(fresh: Path, which: str) -> None:
    files = cached(fresh)
    place = {"cache": fresh, "folder": files.folder, "file": files.kernels}[which]
    place.chmod(0o777)
    with pytest.raises(UserError, match=r"can be written by other users; .*MOEC_NATIVE_DIR"):
        native.native_files()


def test_what_another_user_owns_is_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(fresh)
    monkeypatch.setattr(native.os, "geteuid", lambda: 4711)
    owner = fresh.stat().st_uid
    if owner != 0:
        with pytest.raises(UserError, match=f"belongs to user {owner}"):
            native.native_files()
        return
    real = Path.stat

    def stat(self: Path, **options: bool) -> object:
        found = real(self, **options)
        return os.stat_result((*found[:4], 1234, *found[5:10])) if self.name.startswith("libmoec") else found

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(UserError, match="belongs to user 1234"):
        native.native_files()


def test_unchanged_sources_keep_their_time_stamps(tmp_path: Path) -> None:
    native._sync(tmp_path, {"kernels/a.cpp": b"1", "kernel/b.cpp": b"2"})
    before = (tmp_path / "kernels/a.cpp").stat().st_mtime_ns
    native._sync(tmp_path, {"kernels/a.cpp": b"1", "runner/c.cpp": b"3"})
    assert (tmp_path / "kernels/a.cpp").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.rglob("*.cpp")) == ["a.cpp", "c.cpp"]


@pytest.mark.parametrize(("home", "kept"), [("src", True), ("src/kernel", False)])
def test_a_build_folder_of_sources_that_lay_elsewhere_is_started_afresh(tmp_path: Path, home: str, kept: bool) -> None:
    """CMake refuses a cache of another project: two versions share the folder of builds."""
    work, compiler = tmp_path / "build", tmp_path / "g++"
    compiler.write_text("")
    native._drop_stale_tree(work, "cmake", str(compiler), tmp_path)
    (work / "CMakeCache.txt").write_text(f"CMAKE_HOME_DIRECTORY:INTERNAL={tmp_path / home}\n")
    native._drop_stale_tree(work, "cmake", str(compiler), tmp_path)
    assert (work / "CMakeCache.txt").exists() is kept


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
