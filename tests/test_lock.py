"""requirements.lock: digests of every file, all that an extra needs and nothing else, and what pip does with it.

Until now a line with a digest was refused: the lock was a list of constraints, since torch comes from different indexes
as different files. A version may have many digests, so each of these files can be listed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = SETTINGS["project"]
EXTRAS = list(PROJECT["optional-dependencies"])


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("locked", ROOT / "tools" / "locked.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["locked"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


locked = load_tool()
TEXT = locked.LOCK.read_text("utf-8")


def test_every_file_has_a_digest_and_nothing_names_an_index() -> None:
    assert "://" not in TEXT
    assert "--index" not in TEXT
    assert " @ " not in TEXT
    for package in locked.read(TEXT).values():
        assert sum("--hash=sha256:" in line for line in package.lines) == len(package.lines) - 1 >= 1, package.name


def test_lock_covers_the_dependencies() -> None:
    assert locked.required(PROJECT, EXTRAS) | {locked.BUILD} <= set(locked.read(TEXT))


def test_locked_versions_are_those_that_pyproject_allows() -> None:
    lock = locked.read(TEXT)
    for line in [*PROJECT["dependencies"], *(x for e in PROJECT["optional-dependencies"].values() for x in e)]:
        wanted = Requirement(line)
        assert lock[locked.plain(wanted.name)].version in wanted.specifier, line


def test_wheels_of_pytorchs_own_index_are_locked() -> None:
    torch = "\n".join(locked.read(TEXT)["torch"].lines)
    for digest in SETTINGS["tool"]["moec"]["lock"][f"torch=={locked.read(TEXT)['torch'].version}"]:
        assert digest in torch


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_selection_is_complete(extra: str) -> None:
    """What installed packages say they require is selected with them: pip does not look for anything else."""
    lock = locked.read(TEXT)
    chosen = {p.name for p in locked.selected(lock, locked.required(PROJECT, [extra]), locked.unneeded_by_torch(lock))}
    checked = 0
    for name in chosen:
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform, or of an extra that is not installed
            continue
        for wanted in map(Requirement, requires):
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                assert locked.plain(wanted.name) in chosen, f"{name} requires {wanted}"
                checked += 1
    assert checked > 50


def test_a_selection_is_no_more_than_that() -> None:
    lock = locked.read(TEXT)
    names = {e: {p.name for p in locked.selected(lock, locked.required(PROJECT, [e]))} for e in EXTRAS}
    assert "torchtitan" in names["titan"]
    assert "torchtitan" not in names["dev"]
    assert "lm-eval" not in names["dev"] | names["onnx"]
    assert "pytest" not in names["onnx"]


def asked_for(statement: ast.stmt) -> Iterator[str]:
    """The modules without which a statement skips the file."""
    for node in ast.walk(statement) if isinstance(statement, ast.Expr | ast.Assign | ast.For) else ():
        match node:
            case ast.Call(func=ast.Attribute(attr="importorskip"), args=[ast.Constant(value=str(name)), *_]):
                yield name.partition(".")[0]


def imported(path: Path, seen: set[Path], asked: set[str]) -> Iterator[tuple[Path, str]]:
    """What a test file, and the helpers that it imports, import from outside; `asked` gets what it has skipped for."""
    seen.add(path)
    for statement in ast.parse(path.read_text("utf-8")).body:
        asked |= set(asked_for(statement))
        match statement:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), level=0, names=aliases):
                names = [module, *(f"{module}.{alias.name}" for alias in aliases if module.startswith("tests"))]
            case _:
                names = []
        for name in names:
            helper = ROOT / (name.replace(".", "/") + ".py")
            if not name.startswith("tests"):
                yield path, name.partition(".")[0]
            elif helper.is_file() and helper not in seen:
                yield from imported(helper, seen, asked)


def test_tests_can_be_collected_with_the_extra_dev_alone() -> None:
    """As `make lint` does in a fresh environment: a test of more asks for its extra before it imports from it."""
    lock = locked.read(TEXT)
    there = {p.name for p in locked.selected(lock, locked.required(PROJECT, ["dev"]))}
    providers = metadata.packages_distributions()
    ours = {"moec", "bench", "tests", *sys.stdlib_module_names}

    def packages(module: str) -> set[str]:
        return {locked.plain(name) for name in providers.get(module, ())}

    found = set()
    for test in (ROOT / "tests").rglob("test_*.py"):
        asked: set[str] = set()
        for path, module in imported(test, set(), asked):
            extra = {p for name in asked for p in packages(name) & set(lock)}
            names = there | {p.name for p in locked.selected(lock, extra)} if extra else there
            if module not in ours and not names & packages(module):
                found.add((path.relative_to(ROOT).as_posix(), module))
    assert found == set()


def test_a_torch_for_the_cpu_needs_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = locked.read(TEXT)
    for requires, there in ([], False), (["cuda-toolkit==1; platform_system == 'Linux'", "sympy>=1"], True):
        monkeypatch.setattr(locked.metadata, "requires", lambda name, found=requires: found)
        chosen = {p.name for p in locked.selected(lock, {"torch"}, locked.unneeded_by_torch(lock))}
        assert ("nvidia-cublas" in chosen) == there
        assert "triton" not in chosen


@pytest.mark.parametrize(
    "damage",
    [
        "six==1.17.0\n    # via torch\n",
        "six>=1.17.0 \\\n    --hash=sha256:" + "0" * 64 + "\n    # via torch\n",
        "six @ file:///six.whl \\\n    --hash=sha256:" + "0" * 64 + "\n    # via torch\n",
        "six==1.17.0 \\\n    --hash=md5:" + "0" * 32 + "\n    # via torch\n",
        "six==1.17.0 \\\n    --hash=sha256:" + "0" * 64 + "\n",
        "--extra-index-url x\nsix==1.17.0 \\\n    --hash=sha256:" + "0" * 64 + "\n    # via torch\n",
    ],
)
def test_a_line_that_is_not_of_the_lock_is_refused(damage: str) -> None:
    with pytest.raises(ValueError, match="damaged"):
        locked.read(damage)


def test_the_wheel_for_the_cpu_has_a_line_of_its_own() -> None:
    lock = locked.read(TEXT)
    plain, cpu = locked.one(lock, "torch"), locked.one(lock, "torch+cpu")
    assert plain is lock["torch"]
    assert cpu.lines[0] == f"torch=={plain.version}+cpu \\"
    assert cpu.lines[1:] == plain.lines[1:]
    with pytest.raises(KeyError, match=r"not in requirements\.lock"):
        locked.one(lock, "nothing+cpu")


def test_an_unknown_extra_is_named() -> None:
    command = [sys.executable, str(ROOT / "tools" / "locked.py"), "select", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tools/locked.py: pyproject.toml has no extra nothing\n"


def make_wheel(folder: Path, name: str, body: str) -> Path:
    """The smallest wheel that pip installs."""
    file = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", body)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file


@pytest.mark.parametrize("change", ["", "digest", "unlocked"])
def test_pip_installs_what_is_locked_and_nothing_else(change: str, tmp_path: Path) -> None:
    """The options of the Makefile, on an index that has another file of the same version, or a package too many."""
    options = re.search(r"\$\(PIP_INSTALL\) (.+) -r \$\(VENV\)/selected.txt\nendef", (ROOT / "Makefile").read_text())
    assert options is not None
    wheel = make_wheel(tmp_path, "locked_one", "x = 1")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if change == "digest":
        make_wheel(tmp_path, "locked_one", "x = 2")
    selected = tmp_path / "selected.txt"
    selected.write_text(f"locked-one==1.0 \\\n    --hash=sha256:{digest}\n" + "unlocked\n" * (change == "unlocked"))
    make_wheel(tmp_path, "unlocked", "")
    command = [sys.executable, "-m", "pip", "install", "-q", "--isolated", "--no-index", "--find-links", str(tmp_path)]
    command += [*options[1].split(), "--target", str(tmp_path / "site"), "-r", str(selected)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (change == ""), done.stderr
    assert (tmp_path / "site" / "locked_one.py").exists() == (change == "")
    if change:
        assert ("DO NOT MATCH THE HASHES" if change == "digest" else "must have their versions pinned") in done.stderr
