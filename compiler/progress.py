"""Progress of long work: a live line with stage, item and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """`with progress.stage("pack", total=20) as step: ... step("layer 3")`. Writes to stderr only; never to stdout."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()

    @property
    def overwrites(self) -> bool:
        """Whether live lines are shown, each in the place of the one before it: on a terminal."""
        return self._live

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[_Step]:
        step = _Step(self, name, total)
        step.start()
        try:
            yield step
        except BaseException:
            step.finish(failed=True)
            raise
        step.finish()

    def each(self, name: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        listed = list(items)
        with self.stage(name, len(listed) if total is None else total) as step:
            for item in listed:
                yield item
                step(str(item))

    def write(self, text: str, *, live: bool = False) -> None:
        if self._quiet or (live and not self._live):
            return
        end = "" if live else "\n"
        lead = "\r\x1b[2K" if self._live else ""
        try:
            print(lead + text, end=end, file=sys.stderr, flush=True)
        except OSError:  # nobody can read it: no reason to stop the work
            self._quiet = True


class _Step:
    def __init__(self, progress: Progress, name: str, total: int | None) -> None:
        self._progress, self._name, self._total = progress, name, total
        self._done, self._started = 0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()
        self._progress.write(f"{self._name} ...", live=True)

    def __call__(self, item: str = "") -> None:
        self._done += 1
        spent = time.perf_counter() - self._started
        text = f"{self._name} {self._done}"
        if self._total:
            text += f"/{self._total}, {spent / self._done * max(self._total - self._done, 0):.0f} s left"
        self._progress.write(f"{text}  {item}", live=True)

    def finish(self, *, failed: bool = False) -> None:
        spent = time.perf_counter() - self._started
        self._progress.write(f"{self._name}: {'stopped' if failed else 'done'} in {spent:.1f} s")
