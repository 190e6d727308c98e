"""docs/write-a-rule.md, executed; `make new-rule`; rules of other distributions."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moec.compiler import plugins
from moec.compiler.errors import CompileError, UserError
from moec.compiler.new_rule import new_rule

ROOT = Path(__file__).parents[1]
CHAPTER = ROOT / "docs" / "write-a-rule.md"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the rooms that a rule's author touches; the others are linked."""
    (tmp_path / "src" / "moec").mkdir(parents=True)
    shutil.copy(ROOT / "src" / "moec" / "__init__.py", tmp_path / "src" / "moec")
    for room in (p.name for p in (ROOT / "src" / "moec").iterdir() if p.is_symlink() and p.name != "passes"):
        (tmp_path / "src" / "moec" / room).symlink_to(ROOT / room)
    shutil.copytree(ROOT / "passes", tmp_path / "passes", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src" / "moec" / "passes").symlink_to(tmp_path / "passes")
    (tmp_path / "tests" / "passes").mkdir(parents=True)
    for file in ("harness.py", "interpreter.py", "passes/moe_zoo.py"):
        shutil.copy(ROOT / "tests" / file, tmp_path / "tests" / file)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the chapter; `make new-rule` is what the Makefile calls."""
    made = re.fullmatch(r"make new-rule NAME=(\w+)", command)
    words = shlex.split(f"python -m moec.compiler.new_rule {made[1]}" if made else command)
    assert words[0] == "python", command
    path = os.pathsep.join([str(folder / "src"), str(folder)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow  # four processes that import torch; the commands have tests of their own
def test_the_chapter_works_as_printed(checkout: Path) -> None:
    printed = ""
    ran = 0
    for kind, name, body in BLOCK.findall(CHAPTER.read_text("utf-8")):
        if kind == "python":
            assert name, "a block of code without a file"
            (checkout / name).write_text(body)
        elif kind == "text":
            assert body in printed, f"the chapter shows\n{body}\nand the command printed\n{printed}"
        elif kind == "console":
            for command in re.findall(r"^\$ (.*)$", body, re.M):
                done = run(command, checkout)
                assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
                printed, ran = done.stdout, ran + 1
    assert ran == 4
    files = ["passes/fuse_silu.py", "tests/passes/test_fuse_silu.py"]
    assert subprocess.run([sys.executable, "-m", "ruff", "check", *files], cwd=checkout, check=False).returncode == 0


def test_a_new_rule_passes_lint(checkout: Path) -> None:
    files = [str(f) for f in new_rule("fuse_something_else", checkout)]
    for options in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *options, *files], cwd=checkout, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
    with pytest.raises(UserError, match="already"):
        new_rule("fuse_something_else", checkout)
    for name in ("Fuse", "fuse", "fuse-x", "../x_y"):
        with pytest.raises(UserError, match="does not name a rule"):
            new_rule(name, checkout)


RULES = {
    "their_rule": ("their_rules:rule", None),
    "missing": ("their_rules:nothing", "failed: module 'their_rules' has no attribute"),
    "broken": ("their_rules:broken", "failed: out of order"),
    "number": ("their_rules:number", "returned int, not a Pass"),
    "late": ("their_rules:late", "leads from FUSED to FUSED"),
}
SOURCE = """
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Stage

def rule():
    return Pass("their_rule", lambda p: PassResult(p, 0), needs=Stage.CANONICAL, gives=Stage.CANONICAL)

def broken():
    raise RuntimeError("out of order")

def number():
    return 3

def late():
    return Pass("late", lambda p: PassResult(p, 0), needs=Stage.FUSED, gives=Stage.FUSED)
"""


@pytest.mark.parametrize("name", RULES)
def test_a_rule_of_another_distribution(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, fault = RULES[name]
    (tmp_path / "their_rules.py").write_text(SOURCE)
    info = tmp_path / "their_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[moec.passes]\n{name} = {reference}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_rules", raising=False)
    from moec.passes.pipelines import fusion

    if fault is None:
        names = [p.name for p in fusion()]
        assert names.index("canonicalize") < names.index("their_rule") < names.index("fuse_rms_norm")
        return
    with pytest.raises(CompileError, match=fault) as caught:
        plugins.installed_rules()
    assert "their-rules" in str(caught.value)
    assert "\n" not in str(caught.value)
