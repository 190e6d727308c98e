"""`make bench-flash`: an artifact whose experts do not all fit in memory, against the same with all of them there.

Two tables. *Time*: budgets and "all in memory" in turns, medians over rounds; hits, bytes read for each token, the rate
at which the storage gives blocks of an expert's size, the bound max(computing, reading) and how near to it decoding is;
peak memory over budget. *Policies*: the same routing replayed against caches that give up the expert used longest ago,
the one used least often, and the one whose next use is farthest (Belady's optimum, which knows the future).

Prompt and decoded tokens are those of the text, so that routing is that of text; with random weights a router has no
preferences, and the hit rate only reflects the size of the cache.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moec.assistant.load import load
from moec.cli.output import table
from moec.compiler.artifact import Artifact
from moec.compiler.files import read_text
from moec.runtime import machine
from moec.runtime.native import runner_binary

Use = tuple[int, int]  # layer, expert


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-flash", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--ids", type=Path, required=True, help="token ids of a text, for prompt and decoding")
    parser.add_argument("--fractions", default="0.5,0.26,0.1", help="of the routed experts that memory holds")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    artifact = Artifact.open(options.artifact)
    ids = [int(i) for i in re.findall(r"\d+", read_text(options.ids, limit=64 << 20))]
    need = options.prompt + options.decode
    if len(ids) < need or need > artifact.manifest.model.context:
        parser.error(
            f"{need} tokens are needed, of a text of {len(ids)} in a context of {artifact.manifest.model.context}"
        )
    fractions = [float(f) for f in options.fractions.split(",")]
    rows = timed(artifact, ids[:need], fractions, options)
    columns = [
        "experts",
        "budget MB",
        "hits",
        "MB a token",
        "GB/s read",
        "tokens/s",
        "of all",
        "of bound",
        "peak / budget",
    ]
    table("Decoding, medians", columns, [shown(row) for row in rows], right=range(1, len(columns)))
    trace = routing(artifact, ids[:need], options.prompt)
    policies = policy_rows(trace, artifact, fractions)
    table("\nHits of the same routing", ["experts", "LRU", "LFU", "Belady"], policies, right=range(1, 4))
    if options.json is not None:
        options.json.write_text(json.dumps({"decode": rows, "policies": policies}, indent=1) + "\n")
    return 0


def timed(artifact: Artifact, ids: Sequence[int], fractions: Sequence[float], options: Any) -> list[dict[str, Any]]:
    least = int(_run(artifact, ids, 1, options)["least_mb"])
    experts_mb = artifact.manifest.sizes_by_role["expert"] / 1e6
    budgets = {1.0: None} | {f: round(least + f * experts_mb) for f in fractions}
    runs: dict[float, list[dict[str, Any]]] = {f: [] for f in budgets}
    for number in range(options.rounds):
        for fraction, budget in budgets.items():
            runs[fraction].append(_run(artifact, ids, budget, options))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = []
    whole = statistics.median(r["rate"] for r in runs[1.0])
    for fraction, found in runs.items():
        rate = statistics.median(r["rate"] for r in found)
        row: dict[str, Any] = {
            "fraction": fraction,
            "rate": rate,
            "of_all": rate / whole,
            "peak_mb": max(r["peak_mb"] for r in found),
        }
        if budgets[fraction] is not None:
            read = statistics.median(r["bytes"] for r in found) / options.decode
            speed = machine.storage_rate(artifact.path("model.pte"), found[0]["slot_bytes"])
            bound = 1 / max(1 / whole, read / speed)
            row |= {
                "budget_mb": budgets[fraction],
                "hits": found[-1]["hits"],
                "bytes": read,
                "storage": speed,
                "of_bound": rate / bound,
            }
        rows.append(row)
    return rows


def _run(artifact: Artifact, ids: Sequence[int], budget: int | None, options: Any) -> dict[str, Any]:
    """One process: the prompt, then the text's own tokens one by one. For a budget that is refused, the least one."""
    command = [str(runner_binary()), str(artifact.path("model.pte")), "--json", "--tokens", "-", "--decode", "0"]
    command += ["--chunk", "1", "--threads", str(options.threads)] + (["--memory-mb", str(budget)] if budget else [])
    text = " ".join(map(str, ids[options.prompt :]))
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        refusal = re.search(r"is less than (\d+) MB", done.stderr)
        if refusal is None:
            raise SystemExit(done.stderr.strip())
        return {"least_mb": refusal[1]}
    report = json.loads(done.stdout)
    experts = report.get("experts", {"hits": 0, "misses": 0, "bytes_read": 0, "reading_s": 0.0})
    asked = experts["hits"] + experts["misses"]
    return {
        "rate": report["prefill_tokens_per_s"],
        "peak_mb": report["peak_rss_mb"],
        "hits": experts["hits"] / asked if asked else 1.0,
        "bytes": experts["bytes_read"],
        "slot_bytes": experts.get("slot_bytes", 0),
    }


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    first = (f"{row['fraction']:.0%}",)
    if "budget_mb" not in row:
        return (*first, "none", "", "", "", f"{row['rate']:.1f}", "1.00", "", "")
    return (
        *first,
        str(row["budget_mb"]),
        f"{row['hits']:.1%}",
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['storage'] / 1e9:.2f}",
        f"{row['rate']:.1f}",
        f"{row['of_all']:.2f}",
        f"{row['of_bound']:.2f}",
        f"{row['peak_mb'] / row['budget_mb']:.3f}",
    )


def routing(artifact: Artifact, ids: Sequence[int], prompt: int) -> list[list[Use]]:
    """The experts of each layer of each token behind the prompt, in the order they are used."""
    session = load(artifact)
    try:
        session.prefill(ids[:prompt])
        session.trace(True)
        session.prefill(ids[prompt:])
        layers = session.take_traces()
    finally:
        session.close()
    tokens = len(ids) - prompt
    return [[(layer.layer, int(e)) for e in layer.indices_TK[t]] for t in range(tokens) for layer in layers]


def policy_rows(trace: list[list[Use]], artifact: Artifact, fractions: Sequence[float]) -> list[tuple[str, ...]]:
    experts = len(artifact.manifest.model.moe_layers) * int(artifact.manifest.section("model", "moe")["experts"])
    rows = []
    for fraction in fractions:
        slots = max(int(fraction * experts), 1)
        shares = [hits(trace, slots, policy) for policy in (oldest, rarest, farthest)]
        rows.append((f"{fraction:.0%}", *(f"{share:.1%}" for share in shares)))
    return rows


class History:
    """What a policy may know at a moment: when each expert was used last, how often, and when it is used next."""

    def __init__(self, trace: list[list[Use]]) -> None:
        self.last: dict[Use, int] = {}
        self.count: Counter[Use] = Counter()
        self._times: dict[Use, list[int]] = {}
        for now in range(len(trace) - 1, -1, -1):
            for use in trace[now]:
                self._times.setdefault(use, []).append(now)

    def used(self, use: Use, now: int) -> None:
        self.last[use] = now
        self.count[use] += 1
        self._times[use].pop()

    def next(self, use: Use) -> float:
        return self._times[use][-1] if self._times[use] else float("inf")


Policy = Callable[[History, Use], float]  # of those held, the one of the least value goes


def oldest(history: History, use: Use) -> float:
    return history.last[use]


def rarest(history: History, use: Use) -> float:
    return history.count[use] + history.last[use] * 1e-9


def farthest(history: History, use: Use) -> float:
    return -history.next(use)


def hits(trace: list[list[Use]], slots: int, policy: Policy) -> float:
    """The share of uses that a cache of `slots` experts holds; a layer's experts are not given up for each other."""
    history, held = History(trace), set[Use]()
    found = asked = 0
    for now, uses in enumerate(trace):
        asked += len(uses)
        found += sum(use in held for use in uses)
        for use in uses:
            history.used(use, now)
        for use in uses:
            if use not in held and len(held) >= slots:
                others = held - set(uses)
                if not others:
                    continue
                held.remove(min(others, key=lambda other: policy(history, other)))
            held.add(use)
    return found / asked if asked else 1.0


if __name__ == "__main__":
    sys.exit(main())
