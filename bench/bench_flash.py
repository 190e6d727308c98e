"""`make bench-flash`: an artifact whose experts do not all fit in memory, against the same with all of them there.

    make bench-flash BENCH_ARGS="ARTIFACT --ids FILE"            routing of a text: a prompt, and ids decoded behind it
    make bench-flash BENCH_ARGS="--model mobilemoe-l --peer ..." a shape, with the routing of a trained model (below)
    make bench-flash BENCH_ARGS="--replay FILE,..."              recorded routing alone: hits by policy, no artifact

*Decoding*: budgets and "all in memory" in turns, medians over rounds; hits, bytes read for each token, the bound
max(computing, reading), how near to it decoding is, what `moec plan` says with these hits, peak memory over budget.
`--storage-gb` holds reads to a rate and memory to the budget + 2%, by control groups (limits.py). `--with
"NAME=OPTIONS"` adds rows with further options of the runner, `--cache-aware X,...` rows whose router prefers experts in
memory, and a table of what that costs. *Prompts*: the text in calls as long as the budget allows; each expert is read
once a call at most.
*Policies* (policies.py) and *Layout*: the same routing replayed.

`--model` runs OUT/MODEL: `--prepare` makes it from a spec and a recorded trace (replayed_routing.py). The ids behind
the replayed ones are routed at random: with `--peer` they are run beside llama.cpp, whose random weights do the same;
its model mapped into the same memory behind the same throttle.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import policies
from flash_runs import SLACK, Machine, Sample, Setting, least_budget, middle
from limits import forget_pages, limited
from peers import gguf_models, llama_cpp
from replayed_routing import Recorded, make, mapped

from moec.analysis.plan.devices import load_device
from moec.analysis.plan.planner import plan_spec
from moec.assistant.load import load
from moec.cli.output import table
from moec.compiler.artifact import Artifact
from moec.compiler.build import load_unrounded
from moec.compiler.errors import RunError, UserError
from moec.compiler.files import read_text
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.device import Device, Figure
from moec.sources.decoder.config import decoder_of

Use = tuple[int, int]  # layer, expert
SPECS = Path(__file__).parent.parent / "specs" / "models"
TRACE = Path(__file__).parent / "traces" / "nano60.json.gz"
ALL = "all in memory"


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    options.fractions = [float(f) for f in options.fractions.split(",") if f]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # groups are removed then too
    try:
        if options.replay:
            return replay([Path(file) for file in options.replay.split(",")], options)
        if options.prepare:
            return prepare(options)
        return measure(parser, options)
    except (UserError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="make bench-flash", description=__doc__, formatter_class=raw)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--ids", type=Path, help="token ids of a text, for prompt and decoding")
    parser.add_argument("--model", help="a shipped spec whose artifact in OUT repeats a recorded trace")
    parser.add_argument("--prepare", action="store_true", help="make that artifact and the peer's model and program")
    parser.add_argument("--trace", type=Path, default=TRACE, help="of --prepare")
    parser.add_argument("--tokens", type=int, default=512, help="of --model: how many tokens are replayed")
    parser.add_argument("--ahead", type=float, default=0.85, help="of --prepare: how often a lookahead shall be right")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument(
        "--fractions", default="0.5,0.26,0.1", help="of the routed experts, held beside the least budget"
    )
    parser.add_argument("--budgets", default="", help="in MB, beside the fractions")
    parser.add_argument("--storage-gb", type=float, default=None, help="limits reads (GB/s) and memory")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--with", dest="more", action="append", default=[], help="NAME=OPTIONS of the runner")
    parser.add_argument("--cache-aware", default="", help="shares, such as 0.05,0.1")
    parser.add_argument("--peer", action="store_true", help="llama.cpp beside it; needs --model")
    parser.add_argument("--peer-decode", type=int, default=64)
    parser.add_argument("--peer-fractions", default="0.5,0.25")
    parser.add_argument("--device", default="reference-x86", help="of the plan")
    parser.add_argument("--save-trace", type=Path, default=None)
    parser.add_argument("--replay", default="", help="traces, instead of an artifact")
    parser.add_argument(
        "--layers", type=int, default=None, help="of --replay: mapped onto so many (replayed_routing.py)"
    )
    parser.add_argument("--shape", default="177,13,2", help="of --replay: MB of experts a token, ms in memory, GB/s")
    parser.add_argument("--json", type=Path, default=None)
    return parser


def prepare(options: Any) -> int:
    """OUT/MODEL/artifact, and the model and the program of llama.cpp, each once."""
    progress, folder = Progress(), options.out / options.model
    spec = SPECS / f"{options.model}.yaml"
    print(make(spec, options.trace, folder, options.tokens, options.ahead, progress))
    if options.peer:
        gguf = folder / gguf_models.FILE
        if not gguf.exists():
            with progress.stage(f"write {gguf.name}"):
                gguf_models.write_gguf(decoder_of(load_spec(spec), "a peer's"), gguf.with_suffix(".part"))
                gguf.with_suffix(".part").rename(gguf)
        print(gguf, llama_cpp.build(options.out / "llama.cpp", progress))
    return 0


def measure(parser: argparse.ArgumentParser, options: Any) -> int:
    about: dict[str, Any] = {}
    if options.model:
        folder = options.out / options.model
        if not (folder / "routing.json").exists():
            parser.error(f"{folder} is not prepared: add --prepare first")
        about = json.loads(read_text(folder / "routing.json", limit=64 << 20))
        artifact = Artifact.open(folder / "artifact")
        ids = list(range(min(options.tokens, len(about["chosen"]))))
        if options.cache_aware:
            parser.error("--cache-aware needs a text of the model's own tokens: ARTIFACT --ids FILE")
        options.prompt = min(options.prompt, len(ids) // 4)
        options.decode = len(ids) - options.prompt
    else:
        if options.artifact is None or options.ids is None:
            parser.error("give an artifact and --ids, or --model, or --replay")
        artifact = Artifact.open(options.artifact)
        ids = [int(i) for i in re.findall(r"\d+", read_text(options.ids, limit=64 << 20))]
    if options.peer and options.storage_gb is None:
        parser.error("--peer needs --storage-gb, which limits the memory of both sides too")
    if options.prompt < 1 or options.decode < 1:
        parser.error("decoding needs a prompt of at least one token and a token behind it")
    need = options.prompt + options.decode
    if len(ids) < need or need > artifact.manifest.model.context:
        parser.error(f"{need} tokens are needed, of {len(ids)} in a context of {artifact.manifest.model.context}")
    run = Bench(artifact, options)
    print("; ".join(run.conditions(about)), file=sys.stderr)
    shares = [float(share) for share in options.cache_aware.split(",") if share]
    found: dict[str, Any] = {"conditions": run.conditions(about)}
    found["decode"] = run.decoding(ids[:need], shares)
    found["prompts"] = run.prompts(ids[:need])
    if options.peer:
        found["peer"] = run.beside_llama_cpp(len(about["chosen"]), about["random"])
    trace = uses_of(np.asarray(about["chosen"][: len(ids)])) if about else routing(artifact, ids[:need], options.prompt)
    layers = len(artifact.manifest.model.moe_layers)
    experts = layers * int(artifact.manifest.section("model", "moe")["experts"])
    found["policies"] = policy_table("\nHits of the same routing", trace, layers, experts, options.fractions)
    found["layout"] = run.layout(trace, layers, experts)
    if shares:
        found["cost"] = costs(artifact, ids[:need], options, shares)
    if options.save_trace is not None:
        chosen = np.asarray([[e for _, e in uses] for uses in trace]).reshape(-1, layers, len(trace[0]))
        Recorded(artifact.manifest.name, experts // layers, chosen).write(options.save_trace)
    found["not limited"] = sorted(run.machine.missing)
    if run.machine.missing:
        print("not limited: " + "; ".join(found["not limited"]), file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


class Bench:
    """One artifact on this machine."""

    def __init__(self, artifact: Artifact, options: Any) -> None:
        self.artifact, self.options = artifact, options
        self.file = artifact.path("model.pte")
        self.machine = Machine(options.threads, options.storage_gb, limit=options.storage_gb is not None)
        self.least = least_budget(artifact, options.threads)
        self.experts_mb = artifact.manifest.sizes_by_role["expert"] / 1e6
        moe, layers = artifact.manifest.section("model", "moe"), len(artifact.manifest.model.moe_layers)
        self.expert_bytes = artifact.manifest.sizes_by_role["expert"] // (layers * int(moe["experts"]))
        self.budgets = [round(self.least + f * self.experts_mb) for f in options.fractions]
        self.budgets += [int(mb) for mb in options.budgets.split(",") if mb]
        self.whole = 0.0  # tokens a second with all experts in memory
        self.device: Device | None = None

    def conditions(self, about: dict[str, Any]) -> list[str]:
        """What the figures hold for."""
        storage = self.options.storage_gb
        said = [f"{self.artifact.manifest.name}, {self.options.threads} threads, least budget {self.least} MB"]
        said += [] if storage is None else [f"reads held to {storage:g} GB/s, memory to the budget + {SLACK - 1:.0%}"]
        if about:
            said += [f"routing of {about['trace']}: {about['repeated']:.2%} of uses repeated"]
            said += (
                [f"the next router on this layer's input is right for {about['ahead']:.0%}"] if "ahead" in about else []
            )
        return said

    def decoding(self, ids: Sequence[int], shares: Sequence[float]) -> list[dict[str, Any]]:
        decode = self.options.decode
        settings = [Setting(ALL, decode=decode)]
        ways: list[tuple[str, tuple[str, ...]]] = [("", ())]
        for given in self.options.more:
            name, _, rest = given.partition("=")
            ways.append((name, tuple(shlex.split(rest))))
        ways += [(f"cache-aware {share:g}", ("--cache-aware", str(share))) for share in shares]
        settings += [Setting(name, budget, more, decode) for budget in self.budgets for name, more in ways]
        samples = self._rounds(ids, settings)
        self.whole = decode / samples[settings[0]].seconds
        some = next((s for s in samples.values() if s.slot_bytes), None)
        if some is None:
            return []
        (storage,) = self.machine.storage(self.file, [(some.slot_bytes, 4096)])
        rows = [self._decoded(s, sample, len(ids), storage) for s, sample in samples.items()]
        columns = ["experts held", "", "budget MB", "kept", "read ahead", "MB a token", "in vain", "tokens/s", "of all"]
        columns += ["of bound", "waiting ms", "planned", "peak / budget"]
        title = f"Decoding of {decode} tokens behind {len(ids) - decode}, medians"
        title += f"; the storage gives {storage / 1e9:.2f} GB/s"
        table(title, columns, [shown(row) for row in rows], right=(0, *range(2, len(columns))))
        return rows

    def _rounds(self, ids: Sequence[int], settings: Sequence[Setting]) -> dict[Setting, Sample]:
        taken: dict[Setting, list[Sample]] = {setting: [] for setting in settings}
        for number in range(self.options.rounds):
            for setting in settings:
                taken[setting].append(self.machine.sample(self.artifact, ids, setting))
            print(f"round {number + 1} of {self.options.rounds}", file=sys.stderr)
        return {setting: middle(samples) for setting, samples in taken.items()}

    def _decoded(self, setting: Setting, sample: Sample, positions: int, storage: float) -> dict[str, Any]:
        tokens = setting.decode
        rate = tokens / sample.seconds
        row = {"name": setting.name, "rate": rate, "of_all": rate / self.whole, "peak_mb": sample.peak_mb}
        if setting.budget is None:
            return row
        needed = (sample.bytes - sample.wasted) / tokens
        bound = 1 / max(1 / self.whole, needed / storage)
        row |= {"budget_mb": setting.budget, "held": sample.slots * self.expert_bytes / 1e6 / self.experts_mb}
        row |= {"hits": sample.hits, "ahead": sample.ahead, "bytes": sample.bytes / tokens, "of_bound": rate / bound}
        row |= {"wasted": sample.wasted / tokens, "storage": storage, "waited": sample.waited / tokens}
        planned = self._planned(setting.budget, sample.hits, storage, positions)
        return row | ({"planned": planned} if planned is not None else {})

    def _planned(self, budget: int, hits: float, storage: float, positions: int) -> float | None:
        """Tokens a second by `moec plan` for the device, its storage as fast as measured, at the last position."""
        if self.device is None:
            figure = Figure(number=storage / 1e9, source="measured in this run")
            self.device = load_device(self.options.device).model_copy(update={"storage_gb_per_s": figure})
        spec = Spec.model_validate(self.artifact.manifest.spec)
        try:
            made = plan_spec(spec, self.device, target="xnnpack", context=positions, memory_mb=budget, hits=hits)
        except UserError as error:
            print(f"no plan: {error}", file=sys.stderr)
            return None
        return made.streamed.tokens_per_s if made.streamed is not None else None

    def prompts(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The text as a prompt. RuntimeError if an expert is read twice in one call."""
        settings = [Setting(ALL), *(Setting("", budget=budget) for budget in self.budgets)]
        samples = self._rounds(ids, settings)
        computing = samples[settings[0]].seconds
        (storage,) = self.machine.storage(self.file, [(self.expert_bytes, 4096)])
        rows, cells = [], []
        for setting, sample in samples.items():
            row: dict[str, Any] = {
                "budget_mb": setting.budget,
                "rate": len(ids) / sample.seconds,
                "peak_mb": sample.peak_mb,
            }
            if setting.budget is not None:
                reads = sample.bytes / self.expert_bytes
                if round(reads) > sample.reads:
                    raise RuntimeError(
                        f"{reads:.0f} experts read where {sample.reads} were asked for: one was read twice in a call"
                    )
                bound = max(computing, sample.bytes / storage)
                row |= {"bytes": sample.bytes, "reads": sample.reads, "of_bound": bound / sample.seconds}
                peak = f"{sample.peak_mb / setting.budget:.3f}"
                cells.append((str(setting.budget), f"{row['rate']:.0f}", f"{sample.bytes / 1e6:.0f}",
                              f"{reads / max(sample.reads, 1):.3f}", f"{row['of_bound']:.2f}", peak))  # fmt: skip
            else:
                cells.append(("none", f"{row['rate']:.0f}", "", "", "", ""))
            rows.append(row)
        columns = ["budget MB", "tokens/s", "MB read", "reads an expert", "of bound", "peak / budget"]
        table(f"\nA prompt of {len(ids)} tokens, medians", columns, cells, right=range(len(columns)))
        return rows

    def beside_llama_cpp(self, first: int, count: int) -> list[dict[str, Any]]:
        """Both with random routing, in turn. The ids from `first` on, `count` of them, are routed at random."""
        folder, o = self.options.out / self.options.model, self.options
        binary, gguf = llama_cpp.build(o.out / "llama.cpp", Progress()), folder / gguf_models.FILE
        # both decode behind a prompt, with as many experts in memory as there is room for
        prompt = min(o.prompt, count // 4)
        decode = min(count - prompt, o.peer_decode)
        ids = list(range(first, first + prompt + decode))
        fractions = [float(f) for f in o.peer_fractions.split(",")]
        fixed = self.least - self._token_mb()
        budgets: list[int | None] = [None, *(round(fixed + f * self.experts_mb) for f in fractions)]
        ours: dict[int | None, list[Sample]] = {budget: [] for budget in budgets}
        theirs: dict[int | None, list[llama_cpp.Run]] = {budget: [] for budget in budgets}
        for number in range(o.rounds):
            for budget in budgets:
                setting = Setting("random routing", budget=budget, decode=decode)
                ours[budget].append(self.machine.sample(self.artifact, ids, setting))
                theirs[budget].append(self._peer(binary, gguf, budget, prompt, decode))
            print(f"llama.cpp, round {number + 1} of {o.rounds}", file=sys.stderr)
        rows, cells = [], []
        for budget, fraction in zip(budgets, (1.0, *fractions), strict=True):
            mine = middle(ours[budget])
            peer = float(np.median([run.tokens_per_s for run in theirs[budget]]))
            rate = decode / mine.seconds
            rows.append({"memory_mb": budget, "held": fraction, "ours": rate, "hits": mine.hits, "peer": peer,
                         "peer_peak_mb": max(run.peak_rss_mb for run in theirs[budget])})  # fmt: skip
            memory = "none" if budget is None else str(budget)
            speeds = (f"{mine.hits:.1%}", f"{rate:.1f}", f"{peer:.2f}", f"{rate / peer:.1f}")
            cells.append((f"{fraction:.0%}", memory, *speeds))
        columns = ["experts held", "memory MB", "our hits", "ours, tokens/s", "llama.cpp, mmap", "ratio"]
        table("\nRandom routing on both sides, medians", columns, cells, right=range(len(columns)))
        return rows

    def _token_mb(self) -> float:
        """The experts of one token, which the least budget has room for."""
        moe = self.artifact.manifest.section("model", "moe")
        return len(self.artifact.manifest.model.moe_layers) * int(moe["top_k"]) * self.expert_bytes / 1e6

    def _peer(self, binary: Path, gguf: Path, budget: int | None, prompt: int, tokens: int) -> llama_cpp.Run:
        memory = budget * SLACK if budget is not None and self.machine.limit else None
        if memory is not None:
            forget_pages(gguf)
        with limited(memory_mb=memory, read_gb_per_s=self.options.storage_gb, file=gguf) as group:
            self.machine.note(group)
            # its own repacking would copy all experts into memory that cannot be dropped
            return llama_cpp.run(
                binary, gguf, decode=tokens, context=prompt, threads=self.options.threads, repack=memory is None,
                within=group.command,
            )  # fmt: skip

    def layout(self, trace: policies.Trace, layers: int, experts: int) -> dict[str, Any]:
        """What another order of the experts in the file could gain."""
        half = (self.expert_bytes // 3 * 2, self.expert_bytes // 3)
        cases = [(size * count, alignment) for size in half for count in (1, 2) for alignment in (4096, 16384)]
        rates = self.machine.storage(self.file, cases)
        cells = [(f"{block / 1e6:.2f}", f"{alignment // 1024}", f"{rate / 1e9:.2f}")
                 for (block, alignment), rate in zip(cases, rates, strict=True)]  # fmt: skip
        table("\nReads at random places", ["MB", "aligned to KiB", "GB/s"], cells, right=range(3))
        rows = []
        for fraction in self.options.fractions:
            at_a_time, share = policies.neighbours(trace, max(int(fraction * experts), 1), layers, experts)
            rows.append((f"{fraction:.0%}", f"{at_a_time:.2f}", f"{share:.1%}"))
        columns = ["experts", "misses at a time", "reads saved by the best order"]
        table("\nExperts of a layer that are missed together", columns, rows, right=range(3))
        return {"reads": cells, "neighbours": rows}


def replay(files: Sequence[Path], options: Any) -> int:
    """Tables of recorded routing."""
    megabytes, milliseconds, rate = (float(part) for part in options.shape.split(","))
    for file in files:
        found = Recorded.read(file)
        chosen = found.chosen
        if options.layers is not None:
            chosen = mapped(chosen, options.layers, len(chosen) // -(-options.layers // chosen.shape[1]))
        trace, layers = uses_of(chosen), chosen.shape[1]
        told = f"{file.stem}, {len(chosen)} tokens, {layers} layers; "
        told += f"{policies.distinct(trace, layers):.2f} different experts in 16 tokens"
        rows = policy_table(told, trace, layers, layers * found.experts, options.fractions)
        cells = []
        for fraction, row in zip(options.fractions, rows, strict=True):
            shares = (milliseconds / max(milliseconds, (1 - hits) * megabytes / rate) for hits in row.values())
            cells.append((f"{fraction:.0%}", *(f"{share:.0%}" for share in shares)))
        title = (
            f"at most, of the speed in memory, with {megabytes:g} MB and {milliseconds:g} ms a token at {rate:g} GB/s"
        )
        table(title, ["experts", *rows[0]], cells, right=range(1, len(rows[0]) + 1))
        print()
    return 0


def uses_of(chosen: np.ndarray) -> list[list[Use]]:
    """A trace as policies take it, of int [tokens, layers, k]."""
    return [[(layer, int(e)) for e in row] for token in chosen for layer, row in enumerate(token)]


def policy_table(
    title: str, trace: policies.Trace, layers: int, experts: int, fractions: Sequence[float]
) -> list[dict[str, float]]:
    rows = policies.table_of(trace, layers, experts, fractions)
    if not rows:
        return []
    cells = [(f"{f:.0%}", *(f"{share:.1%}" for share in row.values())) for f, row in zip(fractions, rows, strict=True)]
    table(title, ["experts", *rows[0]], cells, right=range(1, len(rows[0]) + 1))
    return rows


def costs(artifact: Artifact, ids: Sequence[int], options: Any, shares: Sequence[float]) -> list[dict[str, Any]]:
    own, _ = decoded(artifact, ids, options.prompt, None, None)
    found = [cost(artifact, ids, own, f, share, options.prompt) for f in options.fractions for share in shares]
    columns = ["experts", "cache-aware", "hits", "perplexity", "KLD", "same"]
    cells = [
        (f"{c['fraction']:.0%}", f"{c['share']:g}", f"{c['hits']:.1%}", f"{c['perplexity']:.3f}", f"{c['kld']:.4f}",
         f"{c['same']:.1%}") for c in found
    ]  # fmt: skip
    plain = found[0]["own_perplexity"]
    title = f"\nCost of cache-aware selection; the router's own selections have perplexity {plain:.3f}"
    table(title, columns, cells, right=range(1, len(columns)))
    return found


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
    kept = [stats.hits - stats.ahead_used for stats in (before, after)]
    asked = [stats.hits + stats.misses for stats in (before, after)]
    return rows, (kept[1] - kept[0]) / (asked[1] - asked[0])


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


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    if "budget_mb" not in row:
        return ("all", "", "none", "", "", "", "", f"{row['rate']:.1f}", "1.00", "", "", "", "")
    planned = row.get("planned")
    return (
        f"{row['held']:.0%}",
        row["name"],
        str(row["budget_mb"]),
        f"{row['hits']:.1%}",
        f"{row['ahead']:.1%}",
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['wasted'] / 1e6:.2f}",
        f"{row['rate']:.1f}",
        f"{row['of_all']:.2f}",
        f"{row['of_bound']:.2f}",
        f"{row['waited'] * 1e3:.1f}",
        "" if planned is None else f"{planned:.1f} ({planned / row['rate'] - 1:+.0%})",
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


if __name__ == "__main__":
    sys.exit(main())
