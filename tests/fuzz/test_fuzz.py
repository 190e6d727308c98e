"""Every fuzz target for a second or two, always on the same mutants; and that the harness detects failures.

The targets are slow tests: every change runs them for a minute each (`make fuzz`, `.ci/run`).
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.fuzz import __main__, harness, native

# Each mutant of a tokenizer starts a Python process.
SECONDS = {"tokenizer": 10}
TARGETS = sorted(file.stem for file in (Path(__file__).parent / "targets").glob("*.py"))


@pytest.mark.parametrize("name", sorted({file.parent.name for file in harness.CORPUS.glob("*/*.found")}))
def test_what_was_found_stays_mended(name: str, tmp_path: Path) -> None:
    assert harness.replay(importlib.import_module(f"tests.fuzz.targets.{name}").TARGET, tmp_path) == {}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_runs_on_its_seeds(name: str, tmp_path: Path) -> None:
    """So that a change of a reader's interface is found before an hour of CI is over."""
    target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    seeds = target.seeds(tmp_path)
    assert seeds
    for seed in seeds:
        target.run(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_survives(name: str, tmp_path: Path) -> None:
    target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    assert target.name == name
    outcome = harness.run(target, tmp_path, seconds=SECONDS.get(name, 2), most=2000)
    assert outcome.mutants > 10
    assert not outcome.failures, f"mutants of seed 0: {outcome.failures}"


@pytest.mark.slow
@pytest.mark.parametrize("name", native.names())
def test_a_native_reader_survives(name: str, tmp_path: Path) -> None:
    found, reason = native.compiler()
    if found is None:  # coverage needs clang, which not every machine has; mutants of `pte` run everywhere
        pytest.skip(reason)
    assert native.run(name, tmp_path, 3, seed=1) == 0


class Faulty:
    """Fails as it is told, on the mutants whose only byte is below 60."""

    name = "faulty"

    def __init__(self, fail: Callable[[], None]) -> None:
        self.fail = fail

    def seeds(self, folder: Path) -> Sequence[bytes]:
        return [b"seed"]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        return bytes([rng.randrange(256)])

    def run(self, data: bytes, folder: Path) -> None:
        if data[0] < 60:
            self.fail()


def _raise() -> None:
    raise ValueError("not a refusal")


def _fill() -> None:
    held = bytearray(harness.MEMORY_BYTES + (64 << 20))
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(60)


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "died of SIGSEGV"),
        (_raise, "exit status 1"),
        (lambda: time.sleep(600), "hangs"),
    ],
)
def test_the_harness_sees_failures(
    fail: Callable[[], None],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(harness, "HANG_S", 0.3)
    target = Faulty(fail)
    outcome = harness.run(target, tmp_path, seconds=60, most=12)
    assert outcome.mutants == 12
    wanted = [i for i in range(12) if harness.mutant(target, [b"seed"], 0, i)[0] < 60]
    assert wanted
    assert outcome.failures == dict.fromkeys(wanted, said)
    for index in wanted:
        assert (tmp_path / f"failure-{index}").read_bytes() == harness.mutant(target, [b"seed"], 0, index)


def test_what_was_found_is_seen_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty").mkdir()
    for name, data in {"bad": b"\0", "good": b"\xff"}.items():
        (tmp_path / "faulty" / f"{name}.found").write_bytes(data)
    monkeypatch.setattr(harness, "CORPUS", tmp_path)
    assert harness.replay(Faulty(lambda: os._exit(3)), tmp_path) == {"bad": "exit status 3"}


def test_the_harness_sees_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MEMORY_BYTES", harness._resident(os.getpid()) + (64 << 20))
    outcome = harness.run(Faulty(_fill), tmp_path, seconds=60, most=8)
    assert set(outcome.failures.values()) == {"memory"}


def test_one_of_several_targets_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--seed", "1", "--out", str(tmp_path)]
    assert __main__.main(["0.1", "spec", "manifest", *more]) == 0
    said = capfd.readouterr().out
    assert "spec: " in said
    assert "manifest: " in said
    assert __main__.main(["0.1", "spec", "no_such_target", *more]) == 1
