"""The output of a run in progress: metrics.jsonl, TensorBoard events, and a live line.

metrics.jsonl has one object a line. A training line: stage, step (from 1), tokens (of the stage), loss, lm_loss,
z_loss, lr, grad_norm, tokens_per_s, dropped_fraction, load_max_over_mean (by layer), distinct_per_16_tokens (experts of
a layer that 16 tokens of a document use, in the mean; absent where no document has so many), with a locality loss that
(locality, nats), all of that very step. An evaluation: stage, step, tokens, heldout (loss by domain, nats per predicted
token), heldout_accuracy, expert_load (by domain: [layer][expert], how many tokens selected it), distinct_per_16_tokens
(by domain).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moec.compiler.progress import Progress
from moec.training.locality import WINDOW
from moec.training.state import disk_faults

FILE, EVENTS = "metrics.jsonl", "tensorboard"
DISTINCT = f"distinct_per_{WINDOW}_tokens"
_EVERY = 30.0  # seconds between lines where none can be overwritten: a log


class Metrics:
    """Appends to OUT/metrics.jsonl and OUT/tensorboard. `quiet` processes (not the first) write nothing."""

    def __init__(self, out: Path, *, keep_bytes: int, first_step: int, writes: bool = True) -> None:
        """UserError, here and below, for what the disk refuses.

        keep_bytes: the valid length of metrics.jsonl; the rest was written after the state that is continued.

        first_step: the next step of the run, over all stages; TensorBoard forgets what it has of later ones.
        """
        self._stream, self._events = None, None
        if not writes:
            return
        self._out = out
        with disk_faults(out / FILE):
            self._stream = (out / FILE).open("ab")
            self._stream.truncate(min(keep_bytes, self._stream.tell()))  # a file cut by someone else is not padded
        with disk_faults(out / EVENTS):
            self._events = _summary_writer(out / EVENTS, first_step)

    @property
    def has_events(self) -> bool:
        return self._events is not None

    def write(self, record: Mapping[str, Any], run_step: int) -> None:
        """One line; scalars become events at `run_step`, the step counted over all stages."""
        if self._stream is None:
            return
        with disk_faults(self._out / FILE):
            self._stream.write(json.dumps(record).encode() + b"\n")
            self._stream.flush()
        if self._events is not None:
            with disk_faults(self._out / EVENTS):
                for tag, value in _scalars(record):
                    self._events.add_scalar(tag, value, run_step)

    def durable_bytes(self) -> int:
        """Flush to the disk; the length of metrics.jsonl."""
        if self._stream is None:
            return 0
        with disk_faults(self._out / FILE):
            os.fsync(self._stream.fileno())
        if self._events is not None:
            with disk_faults(self._out / EVENTS):
                self._events.flush()
        return self._stream.tell()

    def close(self) -> None:
        """What the disk refuses here it has refused before: `write` and `durable_bytes` flush."""
        for stream in (self._stream, self._events):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def _summary_writer(folder: Path, first_step: int) -> Any:
    """None without the package tensorboard (the extra `train`)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step)


def _scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    stage, found = record["stage"], []
    for key, value in record.items():
        if key in ("stage", "step", "expert_load"):
            continue
        if isinstance(value, Mapping):
            found += [(f"{key}/{inner}", float(v)) for inner, v in value.items()]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found += [(f"{key}/layer_{n}", float(v)) for n, v in enumerate(value)]
        else:
            found.append((f"{stage}/{key}", float(value)))
    return found


class Live:
    """The line that shows where training is, and lines that stay for evaluations."""

    def __init__(self, progress: Progress, stage: str, done: int, steps: int) -> None:
        self._progress, self._stage, self._first, self._steps = progress, stage, done, steps
        self._started = self._said = time.perf_counter()

    def step(self, step: int, record: Mapping[str, Any]) -> None:
        """Show `step` steps done; in a log not every time."""
        now = time.perf_counter()
        if not self._progress.overwrites and now - self._said < _EVERY:
            return
        self._said, spent = now, now - self._started
        left = spent / max(1, step - self._first) * (self._steps - step)
        load = record["load_max_over_mean"]
        balance = f", expert load max/mean {max(load):.2f}, dropped {record['dropped_fraction']:.1%}" if load else ""
        self._progress.write(
            f"{self._stage} {step}/{self._steps}, {clock(left)} left: loss {record['loss']:.3f}, "
            f"{record['tokens_per_s']:,.0f} tokens/s{balance}",
            live=self._progress.overwrites,
        )

    def heldout(self, step: int, losses: Mapping[str, float]) -> None:
        shown = ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())
        self._progress.write(f"{self._stage} {step}/{self._steps}: held-out loss {shown}")

    def say(self, text: str) -> None:
        self._progress.write(text)


def clock(seconds: float) -> str:
    """0:07, 12:30 or 3:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
