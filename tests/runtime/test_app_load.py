"""Several threads on the sessions of one artifact, as an application that does everything at once (`app_load.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import TinyModels, tiny_text

KINDS = {"answers", "cancelled", "forks", "rewinds", "saves", "prefixes", "errors", "closed meanwhile"}
# A round of answers has some sessions more or less open at once than the one before, each with caches of a quarter of a
# megabyte, and the allocator keeps what threads had; what leaks with every answer is a multiple of this in the end.
SPARE_MEMORY, SPARE_MAPPINGS = 8 << 20, 40


@pytest.mark.parametrize(
    ("count", "seed"), [(900, 1), pytest.param(20_000, 2, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_everything_at_once(count: int, seed: int, tiny: TinyModels, tmp_path: Path) -> None:
    folders = [tiny(tiny_text(context=64)) / "artifact", tiny(tiny_text(layers=1, context=64)) / "artifact"]
    command = [sys.executable, "-m", "tests.runtime.app_load", *map(str, folders), str(tmp_path), str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["left"] == 0
    assert set(found["done"]) == {
        "answers",
        "cancelled",
        "forks",
        "rewinds",
        "saves",
        "prefixes",
        "errors",
        "closed meanwhile",
    }
    assert min(found["done"].values()) > 3
    before, after = found["before"], found["after"]
    assert after["memory"] - before["memory"] < SPARE_MEMORY, (before, after)
    assert after["files"] <= before["files"] + 1, (before, after)
    assert after["mappings"] - before["mappings"] < SPARE_MAPPINGS, (before, after)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"prefixes"}
