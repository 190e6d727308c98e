"""`make bench-flash`: an artifact whose experts do not all fit in memory, against the same with all of them there.

Two tables. *Time*: budgets and "all in memory" in turns, medians over rounds; hits, bytes read for each token, the rate
at which the storage gives blocks of an expert's size, the bound max(computing, reading) and how near to it decoding is;
peak memory over budget. *Policies*: the same routing replayed against caches that give up the expert used longest ago,
the one used least often, and the one whose next use is farthest (Belady's optimum, which knows the future); with
`--save-trace FILE` that routing is kept. `--cache-aware X,...` adds rows to *Time* whose router prefers experts in
memory, and a table of what that costs: perplexity, and divergence from the router's own selections, of the same tokens.

Prompt and decoded tokens are those of the text, so that routing is that of text; with random weights a router has no
preferences, and the hit rate only reflects the size of the cache.

`--replay FILE,...` takes saved traces instead of an artifact: hits by policy, and the share of the speed in memory that
reading the misses leaves at most on another shape (`--shape`), by arithmetic.
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

import numpy as np

from moec.assistant.load import load
from moec.cli.output import table
from moec.compiler.artifact import Artifact
from moec.compiler.build import load_unrounded
from moec.compiler.errors import RunError
from moec.compiler.files import read_text
from moec.runtime import machine
from moec.runtime.native import runner_binary

Use = tuple[int, int]  # layer, expert


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-flash", description=__doc__)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--ids", type=Path, help="token ids of a text, for prompt and decoding")
    parser.add_argument("--fractions", default="0.5,0.26,0.1", help="of the routed experts that memory holds")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-aware", default="", help="shares, such as 0.05,0.1")
    parser.add_argument("--save-trace", type=Path, default=None)
    parser.add_argument("--replay", default="", help="traces, instead of an artifact")
    parser.add_argument("--shape", default="177,13,2", help="of --replay: MB of experts a token, ms in memory, GB/s")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    fractions = [float(f) for f in options.fractions.split(",")]
    if options.replay:
        return replay([Path(file) for file in options.replay.split(",")], fractions, options)
    if options.artifact is None or options.ids is None:
        parser.error("give an artifact and --ids, or --replay")
    artifact = Artifact.open(options.artifact)
    ids = [int(i) for i in re.findall(r"\d+", read_text(options.ids, limit=64 << 20))]
    need = options.prompt + options.decode
    if len(ids) < need or need > artifact.manifest.model.context:
        parser.error(
            f"{need} tokens are needed, of a text of {len(ids)} in a context of {artifact.manifest.model.context}"
        )
    shares = [float(share) for share in options.cache_aware.split(",") if share]
    rows = timed(artifact, ids[:need], fractions, shares, options)
    columns = [
        "experts",
        "cache-aware",
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
    layers = len(artifact.manifest.model.moe_layers)
    experts = layers * int(artifact.manifest.section("model", "moe")["experts"])
    policies = policy_rows(trace, experts, fractions)
    table("\nHits of the same routing", ["experts", "LRU", "LFU", "Belady"], policies, right=range(1, 4))
    costs = []
    if shares:
        own, _ = decoded(artifact, ids[:need], options.prompt, None, None)
        costs = [cost(artifact, ids[:need], own, f, share, options.prompt) for f in fractions for share in shares]
        columns = ["experts", "cache-aware", "hits", "perplexity", "KLD", "same"]
        shown_costs = [
            (f"{c['fraction']:.0%}", f"{c['share']:g}", f"{c['hits']:.1%}", f"{c['perplexity']:.3f}", f"{c['kld']:.4f}",
             f"{c['same']:.1%}") for c in costs
        ]  # fmt: skip
        plain = costs[0]["own_perplexity"]
        title = f"\nCost of cache-aware selection; the router's own selections have perplexity {plain:.3f}"
        table(title, columns, shown_costs, right=range(1, len(columns)))
    if options.save_trace is not None:
        saved = {"artifact": artifact.manifest.name, "layers": layers, "experts": experts // layers, "trace": trace}
        options.save_trace.write_text(json.dumps(saved) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"decode": rows, "policies": policies, "cost": costs}, indent=1) + "\n")
    return 0


def replay(files: Sequence[Path], fractions: Sequence[float], options: Any) -> int:
    """Tables of saved traces."""
    megabytes, milliseconds, rate = (float(part) for part in options.shape.split(","))
    rows = []
    for file in files:
        saved = json.loads(read_text(file, limit=256 << 20))
        trace = [[(int(layer), int(expert)) for layer, expert in uses] for uses in saved["trace"]]
        slots = saved["layers"] * saved["experts"]
        for fraction, *policies in policy_rows(trace, slots, fractions):
            lru = float(policies[0].rstrip("%")) / 100
            reading = (1 - lru) * megabytes / rate
            share = milliseconds / max(milliseconds, reading)
            rows.append((file.stem, f"{distinct(trace, saved['layers']):.2f}", fraction, *policies, f"{share:.0%}"))
    shape = f"{megabytes:g} MB of experts and {milliseconds:g} ms a token, {rate:g} GB/s"
    title = f"Saved routing, and the speed that LRU leaves at most with {shape}"
    columns = ["trace", "distinct per 16", "experts", "LRU", "LFU", "Belady", "of all, at most"]
    table(title, columns, rows, right=range(1, len(columns)))
    return 0


def distinct(trace: list[list[Use]], layers: int) -> float:
    """Experts of a layer that 16 consecutive tokens use, in the mean over places and layers."""
    tokens = [trace[at : at + layers] for at in range(0, len(trace), layers)]
    counts = [
        len({use for token in tokens[first : first + 16] for use in token[layer]})
        for first in range(len(tokens) - 15)
        for layer in range(layers)
    ]
    return statistics.mean(counts)


def cost(
    artifact: Artifact, ids: Sequence[int], own_TV: np.ndarray, fraction: float, share: float, prompt: int
) -> dict[str, Any]:
    """What cache-aware selection changes in the tokens behind the prompt, each run alone: perplexity in place of the
    router's own, KL divergence from it in nats, and how often the likeliest token is the same. own_TV: logits of the
    router's own selections."""
    budget = round(_least(artifact) + fraction * artifact.manifest.sizes_by_role["expert"] / 1e6)
    mine_TV, hits = decoded(artifact, ids, prompt, budget, share)
    targets = np.asarray(ids[prompt + 1 :])
    p, q = (log_softmax(x)[:-1] for x in (own_TV, mine_TV))
    rows = np.arange(len(targets))
    return {
        "fraction": fraction,
        "share": share,
        "hits": hits,
        "own_perplexity": float(np.exp(-p[rows, targets].mean())),
        "perplexity": float(np.exp(-q[rows, targets].mean())),
        "kld": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "same": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


def decoded(
    artifact: Artifact, ids: Sequence[int], prompt: int, budget: int | None, share: float | None
) -> tuple[np.ndarray, float]:
    """(logits of the tokens behind the prompt, [T, V], share of their experts that were in memory).

    With fp32 activations on the same codes: where activations are rounded, one other selection in a thousand moves
    all that follows by a hundredth of a nat or more, and what more of them cost cannot be told from that.
    """
    chosen = artifact.within(budget, share)
    session = load_unrounded(chosen) or load(chosen)
    try:
        session.prefill(ids[:prompt])
        before = session.expert_stats() if budget else None  # type: ignore[attr-defined]
        rows = np.stack([session.decode(token) for token in ids[prompt:]])
        after = session.expert_stats() if budget else None  # type: ignore[attr-defined]
    finally:
        session.close()
    if before is None or after is None:
        return rows, 1.0
    found, read = after.hits - before.hits, after.misses - before.misses
    return rows, found / (found + read)


def _least(artifact: Artifact) -> int:
    """The least budget of this process, as the refusal of a smaller one says it."""
    try:
        load(artifact, memory_mb=1).close()
    except RunError as error:
        refusal = re.search(r"is less than (\d+) MB", str(error))
        if refusal is None:
            raise
        return int(refusal[1])
    return 1


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def timed(
    artifact: Artifact, ids: Sequence[int], fractions: Sequence[float], shares: Sequence[float], options: Any
) -> list[dict[str, Any]]:
    least = int(_run(artifact, ids, 1, 0.0, options)["least_mb"])
    experts_mb = artifact.manifest.sizes_by_role["expert"] / 1e6
    settings: dict[tuple[float, float], int | None] = {(1.0, 0.0): None}
    settings |= {(f, share): round(least + f * experts_mb) for f in fractions for share in (0.0, *shares)}
    runs: dict[tuple[float, float], list[dict[str, Any]]] = {setting: [] for setting in settings}
    for number in range(options.rounds):
        for setting, budget in settings.items():
            runs[setting].append(_run(artifact, ids, budget, setting[1], options))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = []
    whole = statistics.median(r["rate"] for r in runs[1.0, 0.0])
    for (fraction, share), found in runs.items():
        budget = settings[fraction, share]
        rate = statistics.median(r["rate"] for r in found)
        row: dict[str, Any] = {
            "fraction": fraction,
            "cache_aware": share,
            "rate": rate,
            "of_all": rate / whole,
            "peak_mb": max(r["peak_mb"] for r in found),
        }
        if budget is not None:
            read = statistics.median(r["bytes"] for r in found) / options.decode
            speed = machine.storage_rate(artifact.path("model.pte"), found[0]["slot_bytes"])
            bound = 1 / max(1 / whole, read / speed)
            row |= {
                "budget_mb": budget,
                "hits": found[-1]["hits"],
                "bytes": read,
                "storage": speed,
                "of_bound": rate / bound,
            }
        rows.append(row)
    return rows


def _run(artifact: Artifact, ids: Sequence[int], budget: int | None, share: float, options: Any) -> dict[str, Any]:
    """One process: the prompt, then the text's own tokens one by one. For a budget that is refused, the least one."""
    command = [str(runner_binary()), str(artifact.path("model.pte")), "--json", "--tokens", "-", "--decode", "0"]
    command += ["--chunk", "1", "--threads", str(options.threads)] + (["--memory-mb", str(budget)] if budget else [])
    command += ["--cache-aware", str(share)] if share else []
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
    first = (f"{row['fraction']:.0%}", f"{row['cache_aware']:g}" if row["cache_aware"] else "")
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


def policy_rows(trace: list[list[Use]], experts: int, fractions: Sequence[float]) -> list[tuple[str, ...]]:
    """experts: of all layers."""
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
