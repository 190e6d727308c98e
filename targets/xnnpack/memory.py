"""A memory budget: routed experts are read from the file when tokens select them (runtime/runner/expert_cache.h)."""

from __future__ import annotations

from dataclasses import dataclass

from moec.compiler.errors import RunError
from moec.targets.xnnpack.options import Options

MAX_MEMORY_MB = 1 << 24
EVICTIONS = ("lru", "lfu", "lrfu")  # as moec_runtime.h numbers them


@dataclass(frozen=True)
class ExpertCacheOptions:
    """eviction: which expert is given up, the one used longest ago ("lru"), least often ("lfu") or
    least often of late ("lrfu": a use counts half after 32 tokens).

    readers: threads that read, 1 to 64. cache_aware: how much the router of a token that is run alone prefers experts
    in memory, as a share (0 to 1) of the range of what it selects by. read_ahead: while a layer of a
    few tokens is computed, experts are read that the next layer will probably select. RunError for other values.
    """

    eviction: str = "lrfu"
    readers: int = 2
    cache_aware: float = 0.0
    read_ahead: bool = True

    def __post_init__(self) -> None:
        if self.eviction not in EVICTIONS:
            raise RunError(f"there is no eviction policy {self.eviction!r}", remedy=f"one of {', '.join(EVICTIONS)}")
        if not 1 <= self.readers <= 64:
            raise RunError(f"{self.readers} readers", remedy="give a number from 1 to 64")
        if not 0 <= self.cache_aware <= 1:
            raise RunError(f"cache-aware selection by {self.cache_aware}", remedy="give a number from 0 to 1")


@dataclass(frozen=True)
class ExpertStats:
    """budget, slot_bytes, bytes_read: bytes. experts: of all layers; slots: of them that may be in memory.

    hits and misses: experts that a layer found in memory or being read ahead, and that it had to ask for. ahead:
    experts that were read before their layer was routed; ahead_used: those of them that it then selected. stalled_ns:
    the sum over threads that waited for a read; reading_ns: the sum over threads that read. preferred: experts that
    cache-aware selection takes to be in memory, at most; 0: it is off.
    Time by the clock, however many threads did it at once: waiting_ns, at least one thread waited for a read;
    active_ns, at least one thread read; exposed_ns, both.
    """

    budget: int
    experts: int
    slots: int
    slot_bytes: int
    hits: int
    misses: int
    bytes_read: int
    stalled_ns: int
    reading_ns: int
    preferred: int
    waiting_ns: int
    active_ns: int
    exposed_ns: int
    ahead: int
    ahead_used: int

    @property
    def overlapped(self) -> float | None:
        """`overlapped` of these counts."""
        return overlapped(self.active_ns, self.exposed_ns)


@dataclass(frozen=True)
class LayerExpertStats:
    """The counts of `ExpertStats` of one layer with routed experts. The time by the clock of two layers may be the
    same time, where one is read while another is computed."""

    hits: int
    misses: int
    bytes_read: int
    stalled_ns: int
    reading_ns: int
    waiting_ns: int
    active_ns: int
    exposed_ns: int
    ahead: int
    ahead_used: int

    @property
    def overlapped(self) -> float | None:
        """`overlapped` of these counts."""
        return overlapped(self.active_ns, self.exposed_ns)


def overlapped(active: float, exposed: float) -> float | None:
    """The share (0 to 1) of reading that computing hid; None if nothing was read.

    Of the time by the clock in which at least one thread read (`active`), that in which no thread waited for a read:
    all others were computing, or had nothing to do. `exposed`: that in which at least one waited. With several threads
    it is a cautious figure, since the others may have gone on while one waited.
    """
    return 1 - exposed / active if active > 0 else None


def budget_arguments(options: Options | None, cache_aware: float = 0.0) -> list[str]:
    """The runner's arguments for the budget of an artifact and cache-aware selection; none without a budget."""
    if options is None or options.memory_mb is None:
        return []
    chosen = ["--memory-mb", str(options.memory_mb), "--eviction", options.eviction]
    return [*chosen, "--cache-aware", repr(float(cache_aware))] if cache_aware else chosen
