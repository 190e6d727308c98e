"""`bench_assistant.py prefix`: what a new process takes to its first token behind a prefix that was saved.

Sessions of Python and of the C library for applications are computed once and saved; then each of `rounds` new
processes opens the artifact, restores, and computes one token, and more for comparison. For each step: seconds,
processor time, and the pages that the system had to give. In half of them weights were read before (warm), in the
others the first token maps them as well (cold).
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moec.cli.output import table
from moec.compiler.artifact import Artifact

ROOT = Path(__file__).parents[1]


class Steps:
    """What each step took: wall seconds, processor seconds of the process, pages given by the system."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        faults, cpu, wall = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time(), time.perf_counter()
        yield
        self.found[name] = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "pages": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
        }


def prompt_of(vocabulary: int, tokens: int) -> list[int]:
    """Ids that repeat with the seed, none of them special."""
    drawn = random.Random(1)
    return [drawn.randrange(3, min(vocabulary, 5000)) for _ in range(tokens)]


class OfPython:
    """A session of Python."""

    def __init__(self, artifact: Path, threads: int) -> None:
        from moec.assistant.load import load

        self.session = load(Artifact.open(artifact).with_threads(threads))

    def first(self, ids: Sequence[int]) -> None:
        self.session.prefill(ids)

    def held(self) -> list[int]:
        return list(self.session.tokens)

    def forget(self) -> None:
        self.session.reset()

    def save(self, file: Path) -> None:
        self.session.save(file)

    def restore(self, file: Path) -> None:
        self.session.restore(file)

    def more(self, count: int) -> None:
        for _ in range(count):
            self.session.prefill([11])


class OfC:
    """A session of the C library for applications."""

    def __init__(self, artifact: Path, threads: int) -> None:
        from tests.runtime import app

        self._app, self._id = app, app.open_artifact(artifact, threads=threads)
        self._session = app.call("session", self._id)

    def _generate(self, ids: Sequence[int], new: int) -> None:
        options = self._app.options(self._id, max_new_tokens=new, speculate=0, temperature=0.0)
        generation = self._app.begin(self._session, ids, options)
        self._app.pieces(generation)
        self._app.call("close", generation)

    def first(self, ids: Sequence[int]) -> None:
        """One token behind what the session holds."""
        self._generate([*self.held(), *ids], 1)

    def held(self) -> list[int]:
        return list(self._app.many("tokens", self._session))

    def forget(self) -> None:
        self._app.call("rewind", self._session, 0)

    def save(self, file: Path) -> None:
        self._app.call("save", self._session, str(file).encode())

    def restore(self, file: Path) -> None:
        self._app.call("restore", self._session, str(file).encode())

    def more(self, count: int) -> None:
        for _ in range(count):
            self.first([11])


SIDES: dict[str, Callable[[Path, int], Any]] = {"python": OfPython, "c": OfC}
_MORE = 8  # steps behind the first one


def saves(side: str, artifact: Path, file: Path, tokens: int, threads: int) -> dict[str, Any]:
    """Computes a prefix and saves it."""
    steps, session = Steps(), SIDES[side](artifact, threads)
    with steps.step("compute"):
        session.first(prompt_of(Artifact.open(artifact).manifest.model.vocab_size, tokens))
    with steps.step("save"):
        session.save(file)
    return {"bytes": file.stat().st_size, "tokens": len(session.held()), **steps.found}


def restores(side: str, artifact: Path, file: Path, threads: int, warm: bool) -> dict[str, Any]:
    """What a new process takes to its first token behind a saved prefix."""
    steps = Steps()
    with steps.step("open"):
        session = SIDES[side](artifact, threads)
    if warm:
        session.first([5])
        session.more(_MORE)
        session.forget()
    with steps.step("restore"):
        session.restore(file)
    with steps.step("first token"):
        session.first([11])
    with steps.step("next tokens"):
        session.more(_MORE)
    steps.found["a decode step"] = {name: value / _MORE for name, value in steps.found.pop("next tokens").items()}
    return steps.found


def path_of_moec() -> dict[str, str]:
    """The environment in which a child imports this checkout."""
    folders = [str(ROOT), str(ROOT / "src"), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def child(*arguments: object) -> Any:
    """A function of this file in a process of its own: what it found."""
    command = [sys.executable, "-W", "ignore", "-c", "import saved_prefix; saved_prefix.run_child()"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **path_of_moec()},
    )
    if done.returncode:
        raise SystemExit(f"a child failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(artifact: Path, *, tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    """Rows by side and warmth: medians of each step."""
    found: dict[str, Any] = {"tokens": tokens, "threads": threads, "rounds": rounds, "saved": {}, "restored": []}
    with tempfile.TemporaryDirectory() as temporary:
        files = {side: Path(temporary) / f"{side}.session" for side in SIDES}
        for side, file in files.items():
            found["saved"][side] = child("saves", side, artifact, file, tokens, threads)
        runs: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for _ in range(rounds):
            for side, file in files.items():
                for warm in (True, False):
                    run = child("restores", side, artifact, file, threads, int(warm))
                    runs.setdefault((side, warm), []).append(run)
    for (side, warm), each in runs.items():
        row: dict[str, Any] = {"side": side, "warm": warm}
        for step in each[0]:
            row[step] = {name: statistics.median(run[step][name] for run in each) for name in each[0][step]}
            row[step]["least"], row[step]["most"] = (f(run[step]["seconds"] for run in each) for f in (min, max))
        row["restore and first token"] = statistics.median(
            run["restore"]["seconds"] + run["first token"]["seconds"] for run in each
        )
        row["beyond a decode step"] = statistics.median(
            run["restore"]["seconds"] + run["first token"]["seconds"] - run["a decode step"]["seconds"] for run in each
        )
        found["restored"].append(row)
    return found


def tell(found: dict[str, Any]) -> None:
    for side, saved in found["saved"].items():
        took = saved["compute"]["seconds"]
        print(f"{side}: {saved['tokens']} tokens in {took:.1f} s, file {saved['bytes'] / 1e6:.1f} MB")
    rows = []
    for row in found["restored"]:
        for step in ("open", "restore", "first token", "a decode step"):
            one = row[step]
            spread = f"{one['least'] * 1e3:.1f} to {one['most'] * 1e3:.1f}"
            times = [f"{one['seconds'] * 1e3:.1f}", spread, f"{one['cpu_seconds'] * 1e3:.1f}", f"{one['pages']:.0f}"]
            rows.append([row["side"], "warm" if row["warm"] else "cold", step, *times])
        beyond = [f"{row[name] * 1e3:.1f}" for name in ("restore and first token", "beyond a decode step")]
        rows.append([row["side"], "warm" if row["warm"] else "cold", "restore + first token", beyond[0], "", "", ""])
        rows.append(
            [row["side"], "warm" if row["warm"] else "cold", "of it beyond a decode step", beyond[1], "", "", ""]
        )
    columns = ["session of", "weights", "step", "ms", "rounds", "CPU ms", "pages"]
    table("a new process behind a saved prefix, medians", columns, rows, right=(3, 5, 6))


def run_child() -> None:
    name, side, artifact, file, *numbers = sys.argv[1:]
    run: Callable[..., Any] = {"saves": saves, "restores": restores}[name]
    print(json.dumps(run(side, Path(artifact), Path(file), *map(int, numbers))))
