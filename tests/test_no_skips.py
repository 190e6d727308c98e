"""`make release-check`: skips for want of a tool are failures with a list, those for the platform are not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {
    "test_one.py": """
import pytest
@pytest.mark.skipif(True, reason="needs a hammer: install hammer")
def test_a(): pass
def test_b(): pytest.skip("needs a hammer: install hammer")
def test_c(): pytest.skip("this file system has no direct reads")
def test_d(): pass
@pytest.mark.xfail(reason="known")
def test_e(): assert False
""",
    "test_two.py": "import pytest\npytest.importorskip('no_such_module', reason='needs saws')\ndef test_f(): pass\n",
}


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    for name, text in TESTS.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "tests.no_skips", "-p", "no:cacheprovider", "-c", "/dev/null"]
    done = [*command, "--continue-on-collection-errors", *options, str(folder)]
    return subprocess.run(done, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


def test_a_skip_for_a_tool_fails_and_is_listed(tmp_path: Path) -> None:
    done = run(tmp_path, "--no-skips")
    assert done.returncode == 1, done.stdout
    # the module is an error of collection, the marker one of setup
    assert re.search(r"1 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors", done.stdout), done.stdout
    assert "2 x needs a hammer: install hammer" in done.stdout
    assert "1 x needs saws" in done.stdout
    assert "x this file system" not in done.stdout


def test_without_the_option_skips_are_skips(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 4 skipped, 1 xfailed" in done.stdout
    assert "missing on this machine" not in done.stdout


def test_the_release_check_runs_files_that_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    listed = re.search(r"^RELEASE_TESTS := (.*?[^\\])$", makefile, re.MULTILINE | re.DOTALL)
    assert listed
    files = [name for name in listed[1].replace("\\\n", " ").split() if name]
    assert len(files) > 5
    assert [name for name in files if not (ROOT / name).is_file()] == []
