"""What users install: the wheel and the source distribution hold every room, and work outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = [
    "moec/__init__.py",
    "moec/py.typed",
    "moec/compiler/spec/model.py",
    "moec/cli/main.py",
    "moec/assistant/server/page.html",
    "moec/compiler/ops/fused_moe.py",
    "moec/passes/canonicalize.py",
    "moec/targets/xnnpack/options.py",
    "moec/specs/models/mobilemoe-s.yaml",
    "moec/specs/schema.json",
]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist, built from a copy of the tracked files (as a clone has them)."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "copy"
    copy.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to a distribution")
    names = tracked.stdout.decode().split("\0")[:-1]
    pack = subprocess.run(["tar", "-c", *names], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x"], cwd=copy, input=pack.stdout, check=True)
    code = (
        "from setuptools import build_meta; import sys; out = sys.argv[1]; "  # the backend changes sys.argv
        "build_meta.build_sdist(out); build_meta.build_wheel(out)"
    )
    # the backend itself: `pip wheel` would need to download it again
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=copy, check=True, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_wheel_holds_the_rooms(distributions: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    assert set(NEEDED) <= names
    copy = distributions[0].parent / "copy"
    native = [
        p for p in (copy / "runtime").rglob("*") if p.suffix in (".cpp", ".h", ".inl") or p.name == "CMakeLists.txt"
    ]
    assert native
    assert {f"moec/{p.relative_to(copy).as_posix()}" for p in native} <= names
    assert not [name for name in names if name.startswith(("tests/", "compiler/", "runtime/", "bench/"))]


def test_wheel_holds_every_file_of_every_room(distributions: tuple[Path, Path]) -> None:
    """Data files come by their suffix (pyproject.toml): a new one must not be forgotten."""
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    copy = distributions[0].parent / "copy"
    rooms = [link for link in (copy / "src" / "moec").iterdir() if link.is_dir()]
    assert len(rooms) > 8
    files = [path for room in rooms for path in (copy / room.name).rglob("*") if path.is_file()]
    assert {f"moec/{path.relative_to(copy).as_posix()}" for path in files} - names == set()


def test_sdist_can_be_built_again(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(distributions[1]) as archive:
        # Pythons before 3.11.4 have no filters
        filtered: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **filtered)
    (folder,) = tmp_path.iterdir()
    code = "from setuptools import build_meta as b; import sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=folder, check=True, capture_output=True)
    assert set(NEEDED) <= set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())


@pytest.mark.slow
def test_wheel_runs_elsewhere(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """Installed without its dependencies, which this environment lends; the checkout is out of reach."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", distributions[0]], check=True)
    site = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    (home,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # a path file is read after the venv's own packages, so our installed wheel wins over the editable checkout
    (home / "zz-lent.pth").write_text(f"{site}\n")

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run(python, "-c", "import moec; print(moec.__file__)").startswith(str(tmp_path))
    spec = next(home.glob("moec/specs/models/mobilemoe-tiny.yaml"))
    assert "mobilemoe-tiny" in run(tmp_path / "venv" / "bin" / "moec", "inspect", spec)
    assert run(tmp_path / "venv" / "bin" / "moec", "checkpoint", "synthesize", spec, "--out", "weights").endswith(
        "weights"
    )
