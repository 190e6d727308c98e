"""Whole models against llama.cpp: prefill, decode by context length, memory, file size, load time. `make bench-peers`.

Models are shipped specs (specs/models) and shapes that people carry (bench/shapes). Both sides run as processes of
their own, in turn, round after round, on random 4-bit weights of the same shape; medians and the lowest and highest
round are reported. Results: build/bench/peers.json, and peers.png where matplotlib is installed. bench/README.md says
how to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers import gguf_models, llama_cpp

from moec.assistant.load import load
from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.cores import usable_cores
from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.compiler.spec import load_spec
from moec.compiler.timing import BenchPlan
from moec.sources.decoder.config import DecoderConfig
from moec.sources.random_checkpoint import stream_random
from moec.sources.transformers_config import read_config
from moec.sources.transformers_source import TransformersModel
from moec.targets.xnnpack.bench import bench

SPECS, SHAPES = Path(__file__).parent.parent / "specs" / "models", Path(__file__).parent / "shapes"
ROUTED = 512  # random tokens whose experts are counted
OURS, PEER = "moec", "llama.cpp"


@dataclass(frozen=True)
class Test:
    """`prefill` tokens, or `decode` tokens from position `context` on."""

    name: str
    prefill: int = 0
    decode: int = 0
    context: int = 0


TESTS = (
    Test("pp128", prefill=128),
    Test("pp512", prefill=512),
    Test("pp1024", prefill=1024),
    Test("tg64", decode=64),
    Test("tg32 @ 1024", decode=32, context=1024),
    Test("tg32 @ 4096", decode=32, context=4096),
    Test("tg32 @ 8000", decode=32, context=8000),
)


@dataclass(frozen=True)
class Pair:
    """One model, compiled by us and written for llama.cpp."""

    name: str
    artifact: Artifact
    gguf: Path
    window: int | None  # of the model's local attention, where llama.cpp's has none
    long: bool  # a prompt takes seconds


@dataclass(frozen=True)
class Sample:
    tokens_per_s: float
    peak_rss_mb: float


def prepare(name: str, folder: Path, progress: Progress) -> Pair:
    """Checkpoint, artifact and GGUF of a shipped spec or a shape, made once."""
    shape = SHAPES / f"{name}.yaml"
    spec = load_spec(shape if shape.exists() else SPECS / f"{name}.yaml")
    checkpoint, artifact = folder / f"{name}-checkpoint", folder / f"{name}-artifact"
    gguf = folder / f"{name}-{gguf_models.FILE}"
    config: Any = spec.model
    if isinstance(spec.model, TransformersModel):
        config = read_config(spec.model.transformers)
    elif not isinstance(spec.model, DecoderConfig):
        raise UserError("only models of ours and of transformers have a counterpart in llama.cpp", place=name)
    if not artifact.exists():
        if isinstance(spec.model, TransformersModel):
            stream_random(spec.model.transformers, checkpoint, progress=progress)
        elif not checkpoint.exists():
            synthesize(spec, checkpoint, seed=0, qat=True, progress=progress)
        build.compile(spec, target="xnnpack", checkpoint=checkpoint, out=artifact, progress=progress)
        if isinstance(spec.model, TransformersModel):
            shutil.rmtree(checkpoint)  # gigabytes, which the artifact now holds
    if not gguf.exists():
        with progress.stage(f"writing {gguf.name}"):
            part = gguf.with_suffix(".part")
            gguf_models.write_gguf(config, part)
            part.rename(gguf)
    window = config.attention_window if isinstance(config, DecoderConfig) else None
    return Pair(name, Artifact.open(artifact), gguf, window.size if window else None, shape.exists())


def routing(pair: Pair, counter: Path) -> dict[str, float]:
    """Share of the experts in use on each side, mean of the layers: exp(entropy of how often each is selected) over
    their number; 1 where all are equally busy.

    Both sides see `ROUTED` random tokens. A model without experts has none.
    """
    ids = np.random.default_rng(1).integers(0, pair.artifact.manifest.model.vocab_size, ROUTED).tolist()
    with load(pair.artifact) as session:
        session.trace(True)
        session.prefill(ids)
        traces = session.take_traces()
    peer = [np.asarray(row) for row in llama_cpp.routing(counter, pair.gguf, ROUTED)]
    if not peer and not traces:
        return {}
    # a long prompt may be cut into calls, each of which goes through all layers
    joined = [np.concatenate([t.indices_TK.ravel() for t in traces[at :: len(peer)]]) for at in range(len(peer))]
    ours = [np.bincount(chosen) for chosen in joined]
    count = max(len(row) for row in (*ours, *peer))
    return {side: float(np.mean([_in_use(row, count) for row in rows])) for side, rows in ((OURS, ours), (PEER, peer))}


def _in_use(counts: np.ndarray, experts: int) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()) / experts)


def run_ours(pair: Pair, test: Test, threads: int) -> Sample:
    plan = BenchPlan(
        prefill=test.prefill or 8,
        decode=test.decode or 1,
        contexts=(test.context,) if test.context else (),
        threads=threads,
        repeats=1 + repeats(pair, test),
    )
    report = bench(pair.artifact.path("model.pte"), plan, Progress(quiet=True))
    taken = report["prefill_s"] if test.prefill else report["contexts"][0]["decode_s"]
    # the first repeat also maps the file: it is the warm-up that llama-bench does and does not count
    return Sample((test.prefill or test.decode) / statistics.median(taken[1:]), report["peak_rss_mb"])


def repeats(pair: Pair, test: Test) -> int:
    """Timed runs of a process, after its warm-up: llama-bench fills a long context again for each."""
    return 1 if test.context or pair.long else 3


def turns(pair: Pair, test: Test) -> int:
    """Pairs of processes in a round: short tests of small models take a fraction of a second, which other load on the
    machine disturbs."""
    return 1 if test.context or pair.long else 3


def start_ours(pair: Pair, threads: int) -> float:
    """Seconds from starting the process to its end, with one token computed."""
    plan = BenchPlan(prefill=1, decode=1, threads=threads, repeats=1)
    began = time.perf_counter()
    bench(pair.artifact.path("model.pte"), plan, Progress(quiet=True))
    return time.perf_counter() - began


def start_peer(binary: Path, pair: Pair, threads: int) -> float:
    return llama_cpp.run(binary, pair.gguf, prefill=1, threads=threads, warm_up=False).wall_s


def run_peer(binary: Path, pair: Pair, test: Test, threads: int) -> Sample:
    run = llama_cpp.run(
        binary,
        pair.gguf,
        prefill=test.prefill,
        decode=test.decode,
        context=test.context,
        threads=threads,
        repeats=repeats(pair, test),
    )
    return Sample(run.tokens_per_s, run.peak_rss_mb)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def one_round(
    pair: Pair, binary: Path, tests: list[Test], threads: int, step: Callable[[str], None]
) -> tuple[dict[str, float], dict[tuple[str, str], list[Sample]]]:
    """Seconds of a start by side, and the samples by side and test."""
    starts = {OURS: start_ours(pair, threads), PEER: start_peer(binary, pair, threads)}
    samples: dict[tuple[str, str], list[Sample]] = {}
    for test in (each for each in tests for _ in range(turns(pair, each))):
        samples.setdefault((OURS, test.name), []).append(run_ours(pair, test, threads))
        step(f"{OURS} {test.name}")
        samples.setdefault((PEER, test.name), []).append(run_peer(binary, pair, test, threads))
        step(f"{PEER} {test.name}")
    return starts, samples


def measure(
    pair: Pair, binary: Path, tests: list[Test], threads: int, rounds: int, progress: Progress
) -> dict[str, Any]:
    samples: dict[tuple[str, str], list[Sample]] = {}
    starts: dict[str, list[float]] = {OURS: [], PEER: []}
    steps = rounds * sum(turns(pair, test) for test in tests) * 2
    with progress.stage(f"{pair.name}, {threads} threads", steps) as step:
        for _ in range(rounds):
            started, found = one_round(pair, binary, tests, threads, step)
            for side, seconds in started.items():
                starts[side].append(seconds)
            for key, values in found.items():
                samples.setdefault(key, []).extend(values)
    rows = []
    for test in tests:
        ours, peer = samples[OURS, test.name], samples[PEER, test.name]
        ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, peer, strict=True)]
        rows.append(
            {
                **asdict(test),
                "same_attention": pair.window is None or test.prefill + test.context + test.decode <= pair.window,
                "tokens_per_s": {
                    OURS: spread([s.tokens_per_s for s in ours]),
                    PEER: spread([s.tokens_per_s for s in peer]),
                },
                "ratio": spread(ratios),
                "peak_rss_mb": {
                    OURS: max(s.peak_rss_mb for s in ours),
                    PEER: max(s.peak_rss_mb for s in peer),
                },
            }
        )
    return {
        "model": pair.name,
        "threads": threads,
        "rounds": rounds,
        "file_bytes": {OURS: pair.artifact.path("model.pte").stat().st_size, PEER: pair.gguf.stat().st_size},
        "experts_in_use": routing(pair, llama_cpp.routing_counter(binary)),
        "start_s": {side: spread(found) for side, found in starts.items()},
        "tests": rows,
    }


def show(result: dict[str, Any]) -> None:
    files = result["file_bytes"]
    print(f"\n{result['model']}, {result['threads']} threads, {result['rounds']} rounds")
    print(f"  file: {OURS} {files[OURS] / 1e6:.0f} MB, {PEER} {files[PEER] / 1e6:.0f} MB")
    starts = {side: f"{v['median']:.2f} s ({v['low']:.2f}-{v['high']:.2f})" for side, v in result["start_s"].items()}
    print(f"  start, load and one token: {OURS} {starts[OURS]}, {PEER} {starts[PEER]}")
    if result["experts_in_use"]:
        shares = ", ".join(f"{side} {share:.0%}" for side, share in result["experts_in_use"].items())
        print(f"  experts in use by {ROUTED} tokens: {shares}")
    print(f"  {'test':<14} {'moec tok/s':>22} {'llama.cpp tok/s':>22} {'ratio':>18} {'peak RSS MB':>14}")
    for row in result["tests"]:
        cells = [
            f"{v['median']:.1f} ({v['low']:.1f}-{v['high']:.1f})"
            for v in (row["tokens_per_s"][OURS], row["tokens_per_s"][PEER])
        ]
        ratio = row["ratio"]
        rss = row["peak_rss_mb"]
        print(
            f"  {row['name'] + ('' if row['same_attention'] else ' *'):<14} {cells[0]:>22} {cells[1]:>22} "
            f"{ratio['median']:>6.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) {rss[OURS]:>6.0f} / {rss[PEER]:.0f}"
        )
    if not all(row["same_attention"] for row in result["tests"]):
        print("  * llama.cpp attends to every position there, we to the model's window in most layers")


def plot(results: list[dict[str, Any]], out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(6 * len(results), 6.4), squeeze=False, sharex="col")
    for (speed, memory), result in zip(axes.T, results, strict=True):
        rows = result["tests"]
        names = [row["name"] + ("" if row["same_attention"] else " *") for row in rows]
        medians = [row["ratio"]["median"] for row in rows]
        errors = [
            [m - row["ratio"]["low"] for m, row in zip(medians, rows, strict=True)],
            [row["ratio"]["high"] - m for m, row in zip(medians, rows, strict=True)],
        ]
        bars = speed.bar(names, medians, yerr=errors, color="#3b6ea5", capsize=3)
        speed.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontsize=8)
        speed.axhline(1.0, color="black", linewidth=0.8)
        speed.set_title(f"{result['model']}, {result['threads']} threads")
        speed.set_ylabel("tokens/s, moec over llama.cpp")
        places = range(len(names))
        for side, shift, color in ((OURS, -0.2, "#3b6ea5"), (PEER, 0.2, "#b0b0b0")):
            sizes = [row["peak_rss_mb"][side] for row in rows]
            memory.bar([place + shift for place in places], sizes, 0.4, color=color, label=side)
        memory.set_ylabel("peak RSS, MB")
        memory.legend(fontsize=8, loc="upper left")
        memory.tick_params(axis="x", rotation=35)
    if any(not row["same_attention"] for result in results for row in result["tests"]):
        figure.text(0.01, 0.005, "* llama.cpp attends to every position, we to the model's window", fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(out, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where results, models and llama.cpp go")
    parser.add_argument(
        "--models", default="mobilemoe-s,mobilellm-pro", help="shipped specs and bench/shapes, separated by commas"
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tests", default="", help="names such as pp512,tg64; default: all")
    parser.add_argument("--isa", choices=("native", "avx2"), default="native", help="instruction sets of both sides")
    options = parser.parse_args()
    wanted = [name.strip() for name in options.tests.split(",") if name.strip()]
    tests = [t for t in TESTS if not wanted or t.name in wanted]
    progress = Progress()
    if options.isa != "native":
        os.environ["MOEC_ISA"] = options.isa
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        binary = llama_cpp.build(options.out / "llama.cpp", progress, isa=options.isa)
        pairs = [prepare(name, options.out / "models", progress) for name in options.models.split(",")]
        results = [measure(pair, binary, tests, options.threads, options.rounds, progress) for pair in pairs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for result in results:
        show(result)
    report = {"machine": platform.processor() or platform.machine(), "isa": options.isa, "models": results}
    stem = "peers" if options.isa == "native" else f"peers-{options.isa}"
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(results, options.out / f"{stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
