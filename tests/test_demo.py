"""tools/demo.sh with stand-ins for the programs: which way it goes, what it times, how it ends."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "demo.sh"
PYTHON = '#!/bin/bash\necho "noise of a library" >&2\necho "{said}" >&2\necho /models/dense\nexit {status}\n'
MOEC = '#!/bin/bash\necho "moec $*" >> "{log}"\nif [ "$1" = "{fails}" ]; then exit 5; fi\n'


def demo(folder: Path, *, said: str = "", status: int = 0, fails: str = "nothing") -> tuple[int, list[str], list[str]]:
    """(exit status, lines of output, commands that were run)."""
    programs, log = folder / "bin", folder / "log"
    programs.mkdir(parents=True)
    for name, text in (
        ("python", PYTHON.format(said=said, status=status)),
        ("moec", MOEC.format(log=log, fails=fails)),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    done = subprocess.run([SCRIPT, programs, folder / "out"], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    ran = log.read_text().splitlines() if log.exists() else []
    return done.returncode, (done.stdout + done.stderr).splitlines(), ran


def test_the_mixture_is_made_measured_and_asked(tmp_path: Path) -> None:
    code, lines, ran = demo(tmp_path)
    assert code == 0
    commands = ["data", "upcycle", "train", "compile", "verify", "quality", "profile", "run", "run", "run"]
    assert [line.split()[1] for line in ran] == commands
    assert "--teacher /models/dense" in ran[2]
    assert "--reference /models/dense" in ran[5]
    assert sum(line.startswith("== ") and line.endswith(" s") for line in lines) == len(commands) + 1


def test_without_the_model_it_says_why_in_one_line_and_trains_the_tiny_one(tmp_path: Path) -> None:
    code, lines, ran = demo(tmp_path, said="pip could not fetch it: no network", status=3)
    assert code == 0
    (line,) = [line for line in lines if "not to be had" in line]
    assert "(pip could not fetch it: no network)" in line
    assert [line.split()[1] for line in ran] == ["data", "train", "compile", "inspect", "verify", "run", "run"]
    assert all("mobilemoe-tiny" in line for line in ran if line.split()[1] in ("train", "compile"))


@pytest.mark.parametrize("fails", ["upcycle", "compile", "run"])
def test_a_step_that_fails_ends_it_with_its_status(fails: str, tmp_path: Path) -> None:
    code, lines, ran = demo(tmp_path, fails=fails)
    assert code == 5
    assert ran[-1].split()[1] == fails
    assert not any("the whole demo" in line for line in lines)


def test_another_fault_of_the_model_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    code, lines, ran = demo(tmp_path, said="Traceback: a disk is full", status=1)
    assert (code, ran) == (1, [])
    assert "Traceback: a disk is full" in lines


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    at = tmp_path / "out" / "mixture"
    for file in ("corpus/corpus.json", "split/upcycle.json", "healed/run.json"):
        (at / file).parent.mkdir(parents=True)
        (at / file).touch()
    _, _, ran = demo(tmp_path)
    assert ran[0].startswith("moec train")
    assert ran[0].endswith("--resume")
