"""`make soak`: a mixture within a tight budget of memory, for as long as asked: random prompts and decoding, forks,
rewinds, generations that are cancelled, two sessions in two threads. Every logit must be that of the model in memory,
bit for bit, and memory must not grow.

Prints one line of what was done and exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from moec.assistant.generate import Generation
from moec.assistant.sampling import Sampling
from moec.compiler.errors import RunError
from moec.targets.xnnpack.memory import EVICTIONS, ExpertCacheOptions
from moec.targets.xnnpack.session import CpuSession
from tests.targets.memory_faults import least_mb

TEXTS, LENGTH = 12, 160  # token sequences whose logits are known
MORE_MB = 4  # above the least budget
DEFAULT = ExpertCacheOptions().eviction
GROWTH, OVER = 1.01, 1.02  # of memory after the first part, and of the peak over the budget, at most
WARM_SHARE = 0.25


class Known:
    """Token sequences, and the logits after each of their tokens as the model in memory gives them, float32 [T, V]."""

    def __init__(self, model: Path, seed: int) -> None:
        chosen = np.random.default_rng(seed)
        with CpuSession(model, threads=2) as session:
            vocabulary = session.vocab_size
            self.ids = [chosen.integers(0, vocabulary, LENGTH).tolist() for _ in range(TEXTS)]
            self.logits = []
            for ids in self.ids:
                session.reset()
                self.logits.append(session.prefill(ids, "all"))


class Walk:
    """Random operations on one session, in a thread of its own, until `until` (time.monotonic)."""

    def __init__(self, session: CpuSession, known: Known, seed: int, until: float) -> None:
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._session, self._known, self._until = session, known, until
        self._random = random.Random(seed)
        self._text = 0

    def run(self) -> None:
        try:
            self._restart()
            while time.monotonic() < self._until and not self.wrong:
                step = self._random.choices(
                    [self._append, self._decode, self._rewind, self._restart, self._fork, self._cancel],
                    weights=[4, 8, 2, 1, 2, 1],
                )[0]
                self.done[step.__name__.lstrip("_")] += 1
                step()
        except Exception as error:  # of a thread: told by the main one
            self.wrong.append(f"{type(error).__name__}: {error}")

    def _restart(self) -> None:
        self._text = self._random.randrange(TEXTS)
        self._session.reset()

    def _append(self) -> None:
        self._advance(self._session, self._random.randint(1, 60))

    def _decode(self) -> None:
        for _ in range(self._random.randint(1, 8)):
            self._advance(self._session, 1)

    def _rewind(self) -> None:
        self._session.rewind(self._random.randint(0, self._session.position))

    def _fork(self) -> None:
        """A copy goes on by itself, the session after it as if there had been none."""
        try:
            copy = self._session.fork()
        except RunError as error:
            if "no room for the caches of another session" not in str(error):
                raise
            self.done["forks refused"] += 1
            return
        with copy:
            for _ in range(3):
                self._advance(copy, self._random.choice([1, 1, 7]))
        self._advance(self._session, 1)

    def _cancel(self) -> None:
        """A generation of the text's beginning is cancelled at any moment, in the middle of a read or not."""
        ids = self._known.ids[self._text][: self._random.randint(1, 120)]
        begun = Generation(self._session, ids, 16, Sampling(temperature=0.0), drafter=None)
        timer = threading.Timer(self._random.random() * 0.05, begun.cancelled.set)
        timer.start()
        for _ in begun:
            pass
        timer.join()
        held = self._session.tokens
        same = next((n for n, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids)))
        self._session.rewind(same)
        self._advance(self._session, 1)

    def _advance(self, session: CpuSession, count: int) -> None:
        ids, at = self._known.ids[self._text], session.position
        if at == LENGTH:
            session.rewind(self._random.randrange(LENGTH))
            at = session.position
        count = min(count, LENGTH - at)
        row = session.prefill(ids[at : at + count])[0]
        self.done["tokens"] += count
        if not np.array_equal(row.view(np.uint32), self._known.logits[self._text][at + count - 1].view(np.uint32)):
            self.wrong.append(f"text {self._text}, {count} tokens at {at}: other logits than in memory")


def resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(model: Path, seconds: float, seed: int, eviction: str = DEFAULT) -> dict[str, Any]:
    """What was done, and under "wrong" all that should not be. Memory is compared from a quarter of the time on."""
    known = Known(model, seed)
    gc.collect()
    budget = least_mb(model) + MORE_MB
    started = time.monotonic()
    warm = after = 0  # the most bytes in the first part of the time, and in the rest; a list of all would itself grow
    options = ExpertCacheOptions(eviction)
    with (
        CpuSession(model, threads=2, memory_mb=budget, experts=options, exact_calls=True) as first,
        first.fork() as second,
    ):
        walks = [Walk(s, known, seed + n, started + seconds) for n, s in enumerate((first, second))]
        threads = [threading.Thread(target=walk.run) for walk in walks]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            if time.monotonic() - started <= WARM_SHARE * seconds:
                warm = max(warm, resident())
            else:
                after = max(after, resident())
        for thread in threads:
            thread.join()
        stats = first.expert_stats()
    assert stats is not None
    wrong = [fault for walk in walks for fault in walk.wrong]
    if after > GROWTH * warm:
        wrong.append(f"memory grew from {warm / 1e6:.1f} to {after / 1e6:.1f} MB")
    if max(warm, after) > OVER * budget * 10**6:
        wrong.append(f"{max(warm, after) / 1e6:.1f} MB in use of a budget of {budget} MB")
    return {
        "seconds": round(time.monotonic() - started, 1),
        **sum((walk.done for walk in walks), Counter()),
        "budget_mb": budget,
        "slots": stats.slots,
        "experts": stats.experts,
        "hits": stats.hits,
        "misses": stats.misses,
        "read_mb": round(stats.bytes_read / 1e6),
        "warm_mb": round(warm / 1e6, 1),
        "most_mb_after": round(after / 1e6, 1),
        "wrong": wrong,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command; see the top."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--eviction", default=DEFAULT, choices=EVICTIONS)
    parser.add_argument("--model", type=Path, default=None, help="a model.pte; default: one that is compiled for it")
    given = parser.parse_args(arguments)
    seed = given.seed if given.seed is not None else time.time_ns() % 10**6
    print(f"seed {seed}", file=sys.stderr)
    if given.model is not None:
        found = soak(given.model, given.seconds, seed, given.eviction)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compiled(Path(folder))
            found = soak(Path(folder) / "a" / "model.pte", given.seconds, seed, given.eviction)
    print(json.dumps(found))
    return 1 if found["wrong"] else 0


def compiled(folder: Path) -> None:
    """An artifact `a` in `folder`: 4 layers of 64 experts. In a process of its own: the compiler takes much memory."""
    code = (
        "import sys; from pathlib import Path; "
        "from moec.checkpoints import synthesize; from moec.compiler import build; "
        "from tests.targets.budgets import spec; f = Path(sys.argv[1]); "
        "build.compile(spec(), checkpoint=synthesize(spec(), f / 'c', seed=0, qat=True), out=f / 'a')"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


if __name__ == "__main__":
    sys.exit(main())
