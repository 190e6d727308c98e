"""Native drafts against those of Python: the same tokens, and the same pauses for the same times."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from moec.assistant.speculate import DraftLength, Pays, PromptLookup
from moec.runtime.native import find_compiler

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("speculation") / "lines"
    source = ROOT / "tests" / "runtime" / "native" / "speculation_lines.cpp"
    build = [find_compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'runtime' / 'app'}"]
    subprocess.run([*build, str(source), "-o", str(made)], check=True, capture_output=True)
    return made


def answers(program: Path, commands: list[str]) -> list[str]:
    done = subprocess.run([program], input="\n".join(commands), capture_output=True, text=True, check=True)
    return [line.strip() for line in done.stdout.splitlines()]


def test_the_same_drafts(program: Path) -> None:
    drawn, tokens, lookup = random.Random(1), [], PromptLookup()
    commands, wanted = [], []
    for _ in range(3000):  # three letters: most grams have occurred; the first drafts have fewer than three tokens
        new = [drawn.randrange(3) for _ in range(drawn.randrange(4))]
        tokens += new
        most = drawn.randrange(1, 16)
        commands.append(f"draft {most} {' '.join(map(str, new))} ;")
        wanted.append(" ".join(map(str, lookup.draft(tokens, most))))
    assert answers(program, commands) == wanted
    assert sum(map(bool, wanted)) > 1000


@pytest.mark.parametrize("gain", [0.2, 1.0, 1.1, 3.0])
def test_the_same_pauses(program: Path, gain: float) -> None:
    drawn, pays = random.Random(2), Pays()
    commands, wanted = [], []
    for _ in range(3000):
        commands.append("now")
        wanted.append(str(int(drafted := pays.now())))
        if drafted:
            kept, seconds = drawn.randrange(1, 8), drawn.uniform(0.5, 8.0) / gain
            commands.append(f"checked {kept} {seconds!r}")
            pays.checked(kept, seconds)
        else:
            commands.append(f"stepped {(seconds := drawn.uniform(0.5, 2.0))!r}")
            pays.stepped(seconds)
    assert answers(program, commands) == wanted
    assert 0 < wanted.count("1") < 3000


@pytest.mark.parametrize("slope", [0.02, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("right", [0.3, 0.7, 0.95])
def test_the_same_lengths(program: Path, slope: float, right: float) -> None:
    drawn, length = random.Random(3), DraftLength()
    commands, wanted = [], []
    for _ in range(500):
        drafted, tokens = length.value(), 1
        while tokens <= drafted and drawn.random() < right:
            tokens += 1
        steps = (1 + slope * drafted) * drawn.uniform(0.9, 1.1)
        commands.append(f"length {tokens} {drafted} {steps!r}")
        length.checked(tokens, drafted, steps)
        wanted.append(str(length.value()))
    assert answers(program, commands) == wanted
