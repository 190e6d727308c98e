"""docs/add-a-model-source.md, executed; sources of other distributions, as they should be and broken."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAPTER = ROOT / "docs" / "add-a-model-source.md"
BLOCK = re.compile(r"^```(\w+) (\S+)\n(.*?)^```$", re.M | re.S)
FILES = {name: body for kind, name, body in BLOCK.findall(CHAPTER.read_text("utf-8")) if kind == "python"}
SOURCE, TEST = "sources/bundle_source.py", "tests/sources/test_bundle_source.py"


def run(folder: Path, path: list[Path], *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of `sources/` with the chapter's two files; the other rooms are linked."""
    package = tmp_path / "src" / "moec"
    package.mkdir(parents=True)
    for file in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "src" / "moec" / file, package)
    for link in (ROOT / "src" / "moec").iterdir():
        if link.is_symlink() and link.name != "sources":
            (package / link.name).symlink_to(link.resolve())
    shutil.copytree(ROOT / "sources", tmp_path / "sources", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "sources").symlink_to(tmp_path / "sources")
    (tmp_path / "tests" / "sources").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert set(FILES) == {SOURCE, TEST}
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    return tmp_path


@pytest.mark.slow  # runs the chapter's tests in a process of their own
def test_the_chapter_works_as_printed(checkout: Path) -> None:
    done = run(checkout, [checkout / "src", checkout], "-m", "pytest", TEST)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "6 passed" in done.stdout
    for options in (["check"], ["format", "--check"]):
        lint = run(checkout, [], "-m", "ruff", *options, *FILES)
        assert lint.returncode == 0, lint.stdout


def test_reading_a_spec_of_a_new_source_stays_light(checkout: Path) -> None:
    (checkout / "a.yaml").write_text("name: a\nmodel: {bundle: m.safetensors}\nquantization: none\n")
    code = "import moec, sys; print(moec.load_spec('a.yaml').model.bundle, 'torch' in sys.modules)"
    done = run(checkout, [checkout / "src"], "-c", code)
    assert done.stdout.split() == [str(checkout / "m.safetensors"), "False"], done.stderr


# Of another distribution: the module that an entry point names, and what is said of one that cannot be used.
THEIRS = {
    "whole": (FILES[SOURCE], "m.safetensors False"),
    "broken": ("import nothing_of_that_name\n", "cannot be imported: No module named 'nothing_of_that_name'"),
    "silent": ("", "does not register it"),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_source_of_another_distribution(kind: str, tmp_path: Path) -> None:
    body, expected = THEIRS[kind]
    (tmp_path / "their_bundle.py").write_text(body)
    info = tmp_path / "their_bundle-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-bundle\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moec.sources]\nbundle = their_bundle\n")
    (tmp_path / "a.yaml").write_text("name: a\nmodel: {bundle: m.safetensors}\nquantization: none\n")
    code = """
import sys, moec
try:
    print(moec.load_spec('a.yaml').model.bundle.name, 'torch' in sys.modules)
except moec.UserError as error:
    print(error.line())
"""
    done = run(tmp_path, [ROOT / "src", tmp_path], "-c", code)
    assert expected in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    # whatever is wrong with it: specs of other sources do not import it
    code = f"import moec; print(moec.load_spec({str(ROOT / 'specs/models/mobilemoe-tiny.yaml')!r}).name)"
    assert run(tmp_path, [ROOT / "src", tmp_path], "-c", code).stdout == "mobilemoe-tiny\n"


def test_no_model_is_told_from_another_outside_its_source() -> None:
    """What a spec's model is, only its source knows: nothing else tests the class of a section."""
    sections = r"\b(?:DecoderConfig|TransformersModel|PythonModel|ExportedProgramModel)\b"
    told = re.compile(rf"isinstance\([^()]*,\s*\(?[^()]*{sections}")
    rooms = (
        "compiler",
        "checkpoints",
        "passes",
        "targets",
        "runtime",
        "analysis",
        "assistant",
        "training",
        "cli",
        "sources",
    )
    wrong = []
    for room in rooms:
        for file in sorted((ROOT / room).rglob("*.py")):
            if file.name.endswith("_source.py") or file == ROOT / "sources" / "decoder" / "config.py":
                continue
            if file.parent == ROOT / "analysis" / "verify":  # decoders still have a reference of their own there
                continue
            for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
                if told.search(line):
                    wrong.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)
