"""What the cache of routed experts did under a memory budget, from the runner's counts: in all and by layer.

All bytes are bytes, all times seconds. Counts are sums over the processes of a stream, of the last pass of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The order of moec_expert_layer_stats (runtime/runner/moec_runtime.h).
_TIMES = ("stalled", "reading", "waiting", "active", "exposed")
_COUNTS = ("hits", "misses", "bytes_read", *_TIMES, "ahead", "ahead_used")
PHASES = ("prefill", "decode")


def cache_facts(answers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    """`prefill` and `decode`, each as `use_facts`, of one stream; None for runs without a budget.

    names: the layers with routed experts, in order.
    """
    taken = [a["expert_cache"] for a in answers if "expert_cache" in a]
    if not taken:
        return None
    return {
        "budget": taken[0]["budget"],
        "experts": taken[0]["experts"],
        "slots": min(t["slots"] for t in taken),
        "slot_bytes": taken[0]["slot_bytes"],
        **{phase: use_facts([t[phase] for t in taken], names) for phase in PHASES},
    }


def use_facts(uses: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Sums of the runner's counts over processes: in all, and in `layers` by name.

    ahead: experts that were read before their layer was routed, and ahead_used those of them that it then selected,
    which are hits. hit_rate: of the experts that layers asked for. stalled_s: sum over threads that waited for a read;
    waiting_s: time by the clock in which at least one did. reading_s: sum over threads that read; active_s: time by the
    clock in which at least one did. overlapped: the share of active_s in which no thread waited. hit_rate and
    overlapped are None where nothing was asked for, or read.
    """
    tokens = sum(use["tokens"] for use in uses)
    layers = zip(*(use["layers"] for use in uses), strict=True)
    rows = [_counts(layer, tokens) for layer in layers]
    # layers whose experts are equal count as one: their number tells then, not their name
    known = names if len(names) == len(rows) else [str(n) for n in range(len(rows))]
    return {
        "tokens": tokens,
        **_counts([use["all"] for use in uses], tokens),
        "layers": [{"name": name, **row} for name, row in zip(known, rows, strict=True)],
    }


def together(facts: Sequence[Mapping[str, Any]], phase: str) -> dict[str, Any]:
    """The facts of one phase of several streams, added up: as `use_facts`."""
    uses = [f[phase] for f in facts]
    raw = [
        {"tokens": use["tokens"], "all": _raw(use), "layers": [_raw(layer) for layer in use["layers"]]} for use in uses
    ]
    return use_facts(raw, [layer["name"] for layer in uses[0]["layers"]])


def _raw(facts: Mapping[str, Any]) -> list[int]:
    return [facts[n] if n in facts else round(facts[f"{n}_s"] * 1e9) for n in _COUNTS]


def _counts(rows: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    sums = dict(zip(_COUNTS, (sum(column) for column in zip(*rows, strict=True)), strict=True))
    asked = sums["hits"] + sums["misses"]
    return {
        "hits": sums["hits"],
        "misses": sums["misses"],
        "hit_rate": sums["hits"] / asked if asked else None,
        "bytes_read": sums["bytes_read"],
        "bytes_per_token": sums["bytes_read"] / tokens if tokens else 0.0,
        **{f"{name}_s": sums[name] / 1e9 for name in _TIMES},
        "ahead": sums["ahead"],
        "ahead_used": sums["ahead_used"],
        "overlapped": 1 - sums["exposed"] / sums["active"] if sums["active"] else None,
    }
