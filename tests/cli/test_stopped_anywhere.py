"""Commands that write, killed and out of disk at fifty random moments each: what stood stands, or the new is whole.

A limit on file sizes stands in for the full disk: writing fails half way in the same manner.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moec.cli import main as cli
from tests.forked import ended, forked

ROOT = Path(__file__).parents[2]
MOMENTS = 50


@dataclass(frozen=True)
class Command:
    """`words` writes `out`, where `before` stands; it ends with `after` there."""

    words: list[str]
    out: Path
    before: Path
    after: Path


def digest(folder: Path) -> dict[str, str]:
    """Digests of all files that matter: progress and clocks of a run are in its metrics and lock."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix in (".pte", ".safetensors", ".bin", ".npy", ".json", ".yaml")
        and file.name not in ("metrics.jsonl", "run.json")
    }  # fmt: skip


def spec_text(seed: int) -> str:
    text = (ROOT / "specs" / "models" / "mobilemoe-tiny.yaml").read_text("utf-8")
    return f"checkpoint: checkpoint-{seed}\n" + text.replace("layers: 4", "layers: 2").replace("1024", "96")


@pytest.fixture(scope="module")
def compile_command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("compile")
    words: list[str] = []
    for seed, place in ((1, "before"), (2, "after")):
        spec = folder / f"{seed}.yaml"
        spec.write_text(spec_text(seed), encoding="utf-8")
        checkpoint = str(folder / f"checkpoint-{seed}")
        assert cli.run(["checkpoint", "synthesize", str(spec), "--out", checkpoint, "--seed", str(seed), "-q"]) == 0
        words = ["compile", str(spec), "-q", "--out"]
        assert cli.run([*words, str(folder / place)]) == 0
    return Command([*words, str(folder / "out" / "it")], folder / "out" / "it", folder / "before", folder / "after")


@pytest.fixture(scope="module")
def data_command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("data")
    words: list[str] = []
    generator = random.Random(5)
    vocabulary = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(400)]
    for place in ("before", "after"):
        text = folder / f"{place}-text"
        text.mkdir()
        for number in range(60):
            (text / f"{number}.txt").write_text(" ".join(generator.choices(vocabulary, k=300)), encoding="utf-8")
        words = ["data", "build", "--add", f"notes={text}", "--vocab-size", "512", "-q", "--out"]
        assert cli.run([*words, str(folder / place)]) == 0
    return Command([*words, str(folder / "out" / "it")], folder / "out" / "it", folder / "before", folder / "after")


@pytest.fixture(scope="module")
def quantize_command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A spec inside a folder; nothing is found again from an earlier run, so every moment of the work is met."""
    folder = tmp_path_factory.mktemp("quantize")
    spec = folder / "given.yaml"
    spec.write_text(spec_text(3), encoding="utf-8")
    checkpoint = str(folder / "checkpoint-3")
    assert cli.run(["checkpoint", "synthesize", str(spec), "--out", checkpoint, "--seed", "3", "-q"]) == 0
    words: list[str] = []
    for place, size in (("before", "90"), ("after", "1.4")):
        (folder / place).mkdir()
        words = ["quantize", str(spec), "-q", "--tokens", "128", "--target-size", size, "--out"]
        assert cli.run([*words, str(folder / place / "small.yaml")]) == 0
    out = folder / "out" / "it"
    return Command([*words, str(out / "small.yaml")], out, folder / "before", folder / "after")


@pytest.fixture(params=["compile", "data", "quantize"])
def command(request: pytest.FixtureRequest) -> Command:
    found: Command = request.getfixturevalue(f"{request.param}_command")
    return found


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Measurements of these models are kept here, and no others forgotten for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEC_CALIBRATION_DIR", str(folder := tmp_path_factory.mktemp("measured")))
        yield folder


def restored(command: Command) -> None:
    shutil.rmtree(command.out.parent, ignore_errors=True)
    command.out.parent.mkdir()
    shutil.copytree(command.before, command.out)


@pytest.mark.slow
def test_killed(command: Command) -> None:
    restored(command)
    began = time.monotonic()
    assert ended(forked(command.words)) == 0
    whole = time.monotonic() - began
    old, new = digest(command.before), digest(command.after)
    assert digest(command.out) == new
    assert old != new
    killed = 0
    for moment in range(MOMENTS):
        if digest(command.out) != old:
            restored(command)
        child = forked(command.words)
        time.sleep(random.Random(moment).random() * whole)
        os.kill(child, signal.SIGKILL)
        killed += ended(child) == -signal.SIGKILL
        assert digest(command.out) in (old, new), f"moment {moment}"
    assert killed > MOMENTS // 2
    # what the killed ones left beside it is cleared by the next that ends
    assert ended(forked(command.words)) == 0
    assert digest(command.out) == new
    left = [p.name for p in command.out.parent.iterdir() if p.name != "it" and not p.name.startswith("it.")]
    assert left == []


@pytest.mark.slow
def test_out_of_disk(command: Command) -> None:
    restored(command)
    old, new = digest(command.before), digest(command.after)
    largest = max(file.stat().st_size for file in command.after.rglob("*") if file.is_file())
    for moment in range(MOMENTS):
        most = int(random.Random(moment).random() * largest)
        restored(command)
        status = ended(forked(command.words, lambda most=most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))))
        assert status == 2, f"status {status} where files are at most {most} bytes"
        assert digest(command.out) == old
        left = [p.name for p in command.out.parent.iterdir() if p.name != "it" and not p.name.startswith("it.")]
        assert left == []
    assert ended(forked(command.words)) == 0
    assert digest(command.out) == new
