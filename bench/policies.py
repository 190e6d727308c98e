"""Which expert a full cache gives up: policies replayed on recorded routing, beside the optimum that knows the future.

A trace is, for each token and layer in the order they run, the experts that are used: `(layer, expert)` pairs. A cache
holds `slots` experts of all layers; the experts of one layer of one token are not given up for each other. Misses that
nothing can avoid, the first use of each expert, count.

A policy is a value of each expert that is held; the one of the least value goes. Values change only when an expert is
used, so that a heap finds the least: `seen(use, now, layers)` gives the new value of an expert that is used now.
Time is counted in calls of layers; `now // layers` is the token.

    lru            the time of the last use
    lfu            the number of uses, also of those before it was given up; the last use among equals
    decayed(h)     the number of uses, each halved every h tokens (LRFU, Lee et al. 2001): lru for a small h, lfu for a
                   large one. The logarithm of the sum at time 0 orders as the sum now does, so old values stay valid
    aged(h)        the number of uses, all halved every h tokens: what an integer and a sweep give
    second(k)      the time of the k-th last use (LRU-K, O'Neil et al. 1993); experts used less often go first, by lru
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

Use = tuple[int, int]  # layer, expert
Trace = Sequence[Sequence[Use]]


class Policy(Protocol):
    def seen(self, use: Use, now: int, layers: int) -> float: ...


class Lru:
    def seen(self, use: Use, now: int, layers: int) -> float:
        return now


class Lfu:
    def __init__(self) -> None:
        self._count: Counter[Use] = Counter()

    def seen(self, use: Use, now: int, layers: int) -> float:
        self._count[use] += 1
        return self._count[use] + now * 1e-9


class Decayed:
    def __init__(self, half_life: float) -> None:
        self._half_life, self._log = half_life, dict[Use, float]()

    def seen(self, use: Use, now: int, layers: int) -> float:
        new = now / layers / self._half_life  # log2 of the weight of a use now, as of time 0
        old = self._log.get(use, -math.inf)
        self._log[use] = max(new, old) + math.log2(1 + 2.0 ** -abs(new - old))
        return self._log[use]


class Aged:
    def __init__(self, period: int) -> None:
        self._period, self._count = period, dict[Use, tuple[int, int]]()

    def seen(self, use: Use, now: int, layers: int) -> float:
        era = now // layers // self._period
        count, last = self._count.get(use, (0, 0))
        count = (count >> min(era - last, 62)) + 16
        self._count[use] = (count, era)
        # what it would be worth had it been used `era` halvings earlier orders it among values of other eras
        return math.log2(count) + era + now * 1e-9


class Second:
    def __init__(self, k: int) -> None:
        self._k, self._times = k, dict[Use, deque[int]]()

    def seen(self, use: Use, now: int, layers: int) -> float:
        times = self._times.setdefault(use, deque(maxlen=self._k))
        times.append(now)
        return float(times[0]) if len(times) == self._k else now * 1e-9 - 1


class Belady:
    """The one whose next use is farthest away goes."""

    def __init__(self, trace: Trace) -> None:
        self._times: dict[Use, list[int]] = {}
        for now in range(len(trace) - 1, -1, -1):
            for use in trace[now]:
                self._times.setdefault(use, []).append(now)

    def seen(self, use: Use, now: int, layers: int) -> float:
        times = self._times[use]
        while times and times[-1] <= now:
            times.pop()
        return -float(times[-1]) if times else -math.inf


def policies(trace: Trace) -> dict[str, Policy]:
    """One of each, by the name of its column."""
    return {
        "LRU": Lru(),
        "LFU": Lfu(),
        "LRFU 16": Decayed(16),
        "LRFU 32": Decayed(32),
        "LRFU 64": Decayed(64),
        "LRFU 128": Decayed(128),
        "LRFU 256": Decayed(256),
        "aged 32": Aged(32),
        "LRU-2": Second(2),
        "LRU-4": Second(4),
        "Belady": Belady(trace),
    }


def hits(trace: Trace, slots: int, policy: Policy, layers: int) -> float:
    """The share of uses that a cache of `slots` experts holds."""
    found = sum(count for count, _ in replayed(trace, slots, policy, layers))
    asked = sum(map(len, trace))
    return found / asked if asked else 1.0


def replayed(trace: Trace, slots: int, policy: Policy, layers: int) -> Iterable[tuple[int, list[Use]]]:
    """For each layer of each token (experts that are held, those that are not)."""
    value: dict[Use, float] = {}  # of those held
    heap: list[tuple[float, Use]] = []  # values of the past remain: they are no longer true
    for now, uses in enumerate(trace):
        missed = [use for use in uses if use not in value]
        yield len(uses) - len(missed), missed
        kept: list[tuple[float, Use]] = []
        new = {use: policy.seen(use, now, layers) for use in uses}
        for use in missed:
            while len(value) >= slots and heap:
                least = heapq.heappop(heap)
                if value.get(least[1]) != least[0]:
                    continue
                if least[1] in new:
                    kept.append(least)
                    continue
                del value[least[1]]
            if len(value) < slots:
                value[use] = new[use]
                heapq.heappush(heap, (new[use], use))
        for use in uses:
            if use in value and value[use] != new[use]:
                value[use] = new[use]
                heapq.heappush(heap, (new[use], use))
        for entry in kept:
            if value.get(entry[1]) == entry[0]:
                heapq.heappush(heap, entry)


def table_of(trace: Trace, layers: int, experts: int, fractions: Sequence[float]) -> list[dict[str, float]]:
    """Hits by policy for caches of these shares of all experts. experts: of all layers."""
    rows = []
    for fraction in fractions:
        slots = max(int(fraction * experts), 1)
        rows.append({name: hits(trace, slots, policy, layers) for name, policy in policies(trace).items()})
    return rows


def distinct(trace: Trace, layers: int) -> float:
    """Experts of a layer that 16 consecutive tokens use, in the mean over places and layers."""
    tokens = [trace[at : at + layers] for at in range(0, len(trace), layers)]
    counts = [
        len({use for token in tokens[first : first + 16] for use in token[layer]})
        for first in range(len(tokens) - 15)
        for layer in range(layers)
    ]
    return sum(counts) / len(counts) if counts else 0.0


def neighbours(trace: Trace, slots: int, layers: int, experts: int) -> tuple[float, float]:
    """What an order of a layer's experts in the file could gain: (misses at a time in a layer where there are any, the
    share of misses that the read of a neighbour would fetch along).

    The order is greedy, by how often two experts of a layer were missed at a time, and made from the first half of the
    trace; pairs are counted in the second half, against the misses of LRU there.
    """
    missed = [uses for _, uses in replayed(trace, slots, Lru(), layers)]
    half = len(missed) // 2
    together: Counter[tuple[Use, Use]] = Counter()
    for uses in missed[:half]:
        together.update((a, b) for a in uses for b in uses if a < b)
    links = chain(together)
    some = [uses for uses in missed[half:] if uses]
    count = sum(map(len, some))
    saved = 0
    for uses in some:
        free = set(uses)
        for use in sorted(uses):  # a use is fetched along once, and a pair shares one read
            mates = [mate for mate in links.get(use, ()) if mate in free and mate != use]
            if use in free and mates:
                free -= {use, mates[0]}
                saved += 1
    return (count / len(some) if some else 0.0), (saved / count if count else 0.0)


def chain(together: Counter[tuple[Use, Use]]) -> dict[Use, list[Use]]:
    """Neighbours of each expert where pairs are joined greedily, most frequent first, to chains without circles."""
    links: dict[Use, list[Use]] = {}
    parent: dict[Use, Use] = {}

    def root(use: Use) -> Use:
        while parent.get(use, use) != use:
            use = parent[use]
        return use

    for (a, b), _ in sorted(together.items(), key=lambda item: (-item[1], item[0])):
        if len(links.get(a, ())) < 2 and len(links.get(b, ())) < 2 and root(a) != root(b):
            links.setdefault(a, []).append(b)
            links.setdefault(b, []).append(a)
            parent[root(a)] = root(b)
    return links
