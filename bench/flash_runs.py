"""Processes of `make bench-flash`: the runner within a budget, in a group with limits, and what it reports."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limits import Group, forget_pages, limited
from storage_rates import rates_in

from moec.compiler.artifact import Artifact
from moec.compiler.errors import UserError
from moec.runtime.native import runner_binary

SLACK = 1.02  # of a budget: what the memory of a group may be
_TOUCH = 8  # tokens that bring the weights that are always used into memory
_PAGE = 4096
_REFUSAL = re.compile(r"is less than (\d+) MB")


@dataclass(frozen=True)
class Setting:
    """How a text is run. more: options of the runner. decode: so many ids at its end are decoded, and timed; 0: all of
    it is a prompt, in calls as long as the budget allows, and that is timed."""

    name: str
    budget: int | None = None
    more: tuple[str, ...] = ()
    decode: int = 0


@dataclass(frozen=True)
class Sample:
    """One process. hits, ahead: shares of the experts that calls of layers asked for, found because they were kept and
    because they were read ahead; reads: experts that were read, ahead or not. bytes: read in the time that counts;
    wasted: of those, for experts read ahead in vain. waited: seconds of it in which a worker waited for reads."""

    seconds: float
    peak_mb: float
    hits: float = 1.0
    ahead: float = 0.0
    reads: int = 0
    bytes: int = 0
    wasted: float = 0.0
    waited: float = 0.0
    slots: int = 0
    slot_bytes: int = 0


@dataclass
class Machine:
    """Where processes run: threads, the rate that reads are held to in GB/s, whether memory is limited too."""

    threads: int
    storage_gb: float | None = None
    limit: bool = False
    missing: set[str] = field(default_factory=set)

    def sample(self, artifact: Artifact, ids: Sequence[int], setting: Setting) -> Sample:
        """One run of a text. Without a budget the second of two runs, the first brings all experts into memory."""
        file = artifact.path("model.pte")
        if setting.budget is None:
            with limited(read_gb_per_s=self.storage_gb, file=file) as group:
                self.note(group)
                return self._run(file, ids, setting, group)
        memory = setting.budget * SLACK if self.limit else None
        if memory is not None:
            forget_pages(file)
        with limited(memory_mb=memory, read_gb_per_s=self.storage_gb, file=file) as group:
            self.note(group)
            self._run(file, ids[:_TOUCH], replace(setting, decode=0), group)
            return self._run(file, ids, setting, group)

    def _run(self, file: Path, ids: Sequence[int], setting: Setting, group: Group) -> Sample:
        command = [str(runner_binary()), str(file), "--json", "--tokens", "-", "--threads", str(self.threads)]
        command += ["--decode", str(setting.decode), "--follow", *setting.more]
        command += ["--memory-mb", str(setting.budget)] if setting.budget else ["--repeats", "2"]
        text = " ".join(map(str, ids))
        done = subprocess.run(group.command(command), input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip() or ("memory ran out" if group.killed() else f"status {done.returncode}")
            raise UserError(f"{setting.name} at {setting.budget} MB: {reason}", place=str(file))
        return of_report(json.loads(done.stdout))

    def storage(self, file: Path, cases: list[tuple[int, int]]) -> list[float]:
        """Bytes a second of reads of (block, alignment) bytes from `file`, as fast as the machine's limit allows."""
        pages = [(-(-block // _PAGE) * _PAGE, alignment) for block, alignment in cases]
        with limited(read_gb_per_s=self.storage_gb, file=file) as group:
            self.note(group)
            return rates_in(group.command([]), file, pages)

    def note(self, group: Group) -> None:
        if group.missing:
            self.missing.add(group.missing)


def least_budget(artifact: Artifact, threads: int) -> int:
    """In MB, as the refusal of a smaller one says it."""
    command = [str(runner_binary()), str(artifact.path("model.pte")), "--prompt-length", "1", "--memory-mb", "1"]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refusal = _REFUSAL.search(done.stderr)
    if refusal is None:
        raise UserError(
            done.stderr.strip() or "the runner accepts a budget of 1 MB", place=str(artifact.path("model.pte"))
        )
    return int(refusal[1])


def of_report(report: dict[str, Any]) -> Sample:
    """What the runner's JSON says of decoding, or where nothing was decoded of the prompt; the last of its repeats."""
    decoded = bool(report.get("decode_tokens"))
    seconds, peak = report["decode_s" if decoded else "prefill_s"][-1], report["peak_rss_mb"]
    experts = report.get("decode_experts" if decoded else "experts")
    if experts is None:
        return Sample(seconds, peak)
    asked, reads = experts["hits"] + experts["misses"], experts["misses"] + experts["ahead"]
    kept, used = experts["hits"] - experts["ahead_used"], experts["ahead_used"]
    return Sample(
        seconds, peak, kept / max(asked, 1), used / max(asked, 1), reads, experts["bytes_read"],
        experts["bytes_read"] * (experts["ahead"] - used) / max(reads, 1), experts["waiting_s"], experts["slots"],
        experts["slot_bytes"],
    )  # fmt: skip


def middle(samples: Sequence[Sample]) -> Sample:
    """The sample of the median time (of two the shorter), with the highest peak of all."""
    seconds = statistics.median_low([s.seconds for s in samples])
    found = next(s for s in samples if s.seconds == seconds)
    return replace(found, peak_mb=max(s.peak_mb for s in samples))
