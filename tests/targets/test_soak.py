"""`make soak` for a while, and that it finds what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moec.targets.xnnpack.memory import EVICTIONS
from moec.targets.xnnpack.session import CpuSession
from tests.targets import soak
from tests.targets.soak import Known, Walk, compiled

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc of Linux")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    compiled(folder)
    return folder / "a" / "model.pte"


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_minute(model: Path, eviction: str) -> None:
    command = [sys.executable, "-m", "tests.targets.soak", "--model", model, "--seconds", "30", "--eviction", eviction]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert (found["wrong"], done.returncode) == ([], 0), done.stderr
    assert found["misses"] > found["experts"] > found["slots"]
    for done_of in ("append", "decode", "rewind", "fork", "cancel"):
        assert found[done_of] > 0


def test_a_wrong_bit_is_found(model: Path) -> None:
    known = Known(model, 1)
    known.logits[3][100:, 5] = np.nextafter(known.logits[3][100:, 5], np.float32(np.inf))
    with CpuSession(model, threads=2, exact_calls=True) as session:
        walk = Walk(session, known, 1, time.monotonic() + 60)
        walk.run()
    assert walk.wrong
    assert walk.wrong[0].startswith("text 3, ")


def test_memory_that_grows_is_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, started = soak.resident, time.monotonic()
    monkeypatch.setattr(soak, "resident", lambda: usual() + round((time.monotonic() - started) * 10**7))
    assert any("memory grew from" in fault for fault in soak.soak(model, 6, 1)["wrong"])
