"""One MoE layer against its peers and against the machine. `make bench-kernel`; bench/README.md says how to read it.

Contenders run in turn, round after round, so that a slow moment of the machine hits them all; medians and the middle
80% of the samples are reported. Each call gets other tokens, and consecutive calls go to other layers, so that weights
come from memory as they do in a model. Results: build/bench/kernel.json, and kernel.png where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from kernel_contenders import SOFTMAX, Layer, Moec, OnnxRuntime, Shape, TorchLoop, Upstream
from numpy.typing import NDArray

from moec.runtime import kernel_api
from moec.runtime.machine import build_roofline


def sample_count(tokens: int) -> int:
    """Inputs that calls rotate through: at one token enough that their experts together exceed any cache."""
    return max(8, 192 // tokens)


@dataclass
class Contender:
    """`layers`: implementations of different layers; `shared`: with shared expert; `serial`: ignores threads."""

    name: str
    layers: list
    shared: bool
    serial: bool = False
    samples: dict[tuple[int, int], list[float]] = field(default_factory=dict)


def seconds_of(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def time_round(c: Contender, inputs: list[NDArray[np.float32]], threads: int, budget: float, offset: int) -> None:
    """Add samples of one contender, for about `budget` seconds, at least one call."""
    kernel_api.set_threads(threads)
    runs = [c.layers[i % len(c.layers)].bind(x, threads) for i, x in enumerate(inputs)]
    runs[offset % len(runs)]()  # threads awake, scratch allocated
    samples = c.samples.setdefault((inputs[0].shape[0], threads), [])
    spent, i = 0.0, offset + 1
    while spent < budget:
        samples.append(seconds_of(runs[i % len(runs)]))
        spent += samples[-1]
        i += 1


def roofline(isa: str, threads: list[int], folder: Path) -> dict[int, dict[str, float]]:
    program = build_roofline(isa, folder)
    measured = {}
    for n in threads:
        text = subprocess.run([str(program), str(n), "512", "0.4"], capture_output=True, text=True, check=True).stdout
        measured[n] = json.loads(text)
    return measured


def best_of(a: dict[int, dict[str, float]], b: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """The better of two measurements of the machine's rates: the stricter bound."""
    keys = ("read_gb_per_s", "int8_gop_per_s")
    return {n: {k: max(a[n][k], b[n][k]) for k in keys} for n in a}


def quantile(values: list[float], q: float) -> float:
    return float(np.quantile(values, q))


def check_agreement(layer: Layer, contenders: set[str]) -> dict[str, float]:
    """Cosine of our output with each peer's over the same weights and routing: that they compute the same function."""
    x = np.random.default_rng(99).standard_normal((24, layer.shape.d), dtype=np.float32)

    def cosine(a: NDArray, b: NDArray) -> float:
        a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    ours = Moec(layer, shared=False).output(x)
    found = {}
    if "upstream" in contenders:
        found["upstream"] = cosine(ours, Upstream(layer).output(x))
    if "torch fp32" in contenders:
        found["torch fp32"] = cosine(Moec(layer).output(x), TorchLoop(layer, shared=True).output(x))
    if "onnxruntime" in contenders:
        found["onnxruntime"] = cosine(Moec(layer, shared=False, how=SOFTMAX).output(x), OnnxRuntime(layer).output(x))
    wrong = {name: value for name, value in found.items() if not value > 0.999}
    if wrong:
        raise SystemExit(f"not the same function, nothing to compare: {wrong}")
    return found


def build_contenders(shape: Shape, copies: int, peers: set[str]) -> tuple[list[Contender], Layer]:
    layers = [Layer.random(shape, seed) for seed in range(copies)]

    def whole(axis_out: bool) -> list[Moec]:
        """Every call reads the shared expert: as many of them as exceed any cache."""
        blocks = [Moec(layer, axis_out=axis_out) for layer in layers]
        enough = max(1, (64 << 20) // (len(layers) * shape.shared * shape.d * 3 // 2))
        return [block.with_own_shared() for _ in range(enough) for block in blocks]

    contenders = [
        Contender("moec", whole(axis_out=False), shared=True),
        Contender("moec, groups along out", whole(axis_out=True), shared=True),
        Contender("moec, routed only", [Moec(layer, shared=False) for layer in layers], shared=False),
    ]
    if "onnxruntime" in peers:
        contenders.append(Contender("onnxruntime", [OnnxRuntime(layer) for layer in layers], shared=False))
    # fp32 weights of one layer are larger than any cache: one copy is enough
    if "torch fp32" in peers:
        contenders.append(Contender("torch fp32", [TorchLoop(layers[0], shared=True)], shared=True))
    if "upstream" in peers:
        contenders.append(Contender("upstream", [Upstream(layers[0])], shared=False, serial=True))
    return contenders, layers[0]


def available_peers() -> set[str]:
    peers = {"torch fp32", "upstream"}
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        print("onnxruntime is not installed: left out (pip install -e '.[bench]')", file=sys.stderr)
    else:
        peers.add("onnxruntime")
    return peers


def results_of(
    contenders: list[Contender], shape: Shape, hits: dict[int, float], roof: dict[int, dict[str, float]]
) -> Iterator[dict]:
    for c in contenders:
        for (tokens, threads), samples in sorted(c.samples.items()):
            median = statistics.median(samples)
            row = {
                "contender": c.name,
                "tokens": tokens,
                "threads": threads,
                "median_ms": median * 1e3,
                "p10_ms": quantile(samples, 0.1) * 1e3,
                "p90_ms": quantile(samples, 0.9) * 1e3,
                "samples": len(samples),
                "gop_per_s": 2 * shape.macs(tokens, shared=c.shared) / median / 1e9,
            }
            if c.name.startswith("moec"):
                read = shape.weight_bytes(hits[tokens], shared=c.shared) / (roof[threads]["read_gb_per_s"] * 1e9)
                compute = 2 * shape.macs(tokens, shared=c.shared) / (roof[threads]["int8_gop_per_s"] * 1e9)
                row["bound"] = "memory" if read > compute else "int8"
                row["bound_ms"] = max(read, compute) * 1e3
                row["of_bound"] = max(read, compute) / median
            yield row


def ratios_of(results: list[dict]) -> list[dict]:
    """Peer's time over ours, like for like: routed with routed, with shared expert where the peer has one."""
    at = {(r["contender"], r["tokens"], r["threads"]): r["median_ms"] for r in results}
    pairs = [
        ("onnxruntime", "moec, routed only"),
        ("upstream", "moec, routed only"),
        ("upstream", "moec"),
        ("torch fp32", "moec"),
        ("moec, groups along out", "moec"),
    ]
    found = []
    for peer, ours in pairs:
        for name, tokens, threads in sorted(at):
            if name != peer or (ours, tokens, threads) not in at:
                continue
            ratio = at[peer, tokens, threads] / at[ours, tokens, threads]
            found.append({"peer": peer, "ours": ours, "tokens": tokens, "threads": threads, "ratio": ratio})
    return found


def scaling(shape: Shape) -> list[dict]:
    """Our cost against tokens and against experts, one thread, routed and shared."""
    kernel_api.set_threads(1)
    rng = np.random.default_rng(5)
    rows = []

    def measure(s: Shape, block: Moec, tokens: int) -> dict:
        x = rng.standard_normal((tokens, s.d), dtype=np.float32)
        run = block.bind(x, 1)
        run()
        median = statistics.median(seconds_of(run) for _ in range(3 if tokens > 1000 else 7))
        return {"experts": s.experts, "tokens": tokens, "ms": median * 1e3, "us_per_token": median * 1e6 / tokens}

    block = Moec(Layer.random(shape, 0))
    rows += [measure(shape, block, 1 << i) for i in range(14)]
    for experts in (8, 16, 32, 64, 128, 256):
        s = Shape(shape.d, shape.f, experts, shape.top_k, shape.shared)
        block = Moec(Layer.random(s, 0))
        rows += [measure(s, block, tokens) for tokens in (1, 128, 1024)]
    return rows


def print_report(report: dict) -> None:
    print(f"\n{report['machine']['cpu']}, {report['isa']}")
    for threads, roof in report["roofline"].items():
        read, compute = roof["read_gb_per_s"], roof["int8_gop_per_s"]
        print(f"  {threads} thread(s): DRAM read {read:.1f} GB/s, int8 peak {compute:.0f} GOP/s")
    print("  same function as ours (cosine): " + ", ".join(f"{k} {v:.6f}" for k, v in report["agreement"].items()))
    print(f"\n{'':24} {'T':>5} {'thr':>3} {'median ms':>10} {'p10..p90':>19} {'GOP/s':>8} {'of bound':>16}")
    for r in report["results"]:
        bound = f"{r['of_bound']:.0%} ({r['bound']})" if "bound" in r else ""
        print(
            f"{r['contender']:24} {r['tokens']:5} {r['threads']:3} {r['median_ms']:10.3f} "
            f"{r['p10_ms']:9.3f}..{r['p90_ms']:<8.3f} {r['gop_per_s']:8.0f} {bound:>16}"
        )
    print("\ntime of the peer / time of ours")
    for r in report["ratios"]:
        print(f"  {r['peer']:24} / {r['ours']:24} T={r['tokens']:<4} threads={r['threads']}  {r['ratio']:8.2f}")
    if report["scaling"]:
        print("\ncost against tokens and experts, one thread")
        for r in report["scaling"]:
            print(f"  E={r['experts']:<4} T={r['tokens']:<5} {r['ms']:10.3f} ms {r['us_per_token']:9.2f} us/token")


def plot(report: dict, path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no plot (pip install -e '.[bench]')", file=sys.stderr)
        return
    threads = sorted({r["threads"] for r in report["results"]})
    figure, axes = pyplot.subplots(1, len(threads), figsize=(6 * len(threads), 5), squeeze=False, sharey=True)
    for axis, n in zip(axes[0], threads, strict=True):
        for name in dict.fromkeys(r["contender"] for r in report["results"]):
            rows = [r for r in report["results"] if r["contender"] == name and r["threads"] == n]
            if not rows:
                continue
            x, y = [r["tokens"] for r in rows], [r["median_ms"] for r in rows]
            spread = [[r["median_ms"] - r["p10_ms"] for r in rows], [r["p90_ms"] - r["median_ms"] for r in rows]]
            axis.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=name)
            if name == "moec":
                axis.plot(x, [r["bound_ms"] for r in rows], "k--", linewidth=1, label="bound of this machine")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{n} thread(s)")
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("ms per layer")
    axes[0][0].legend()
    figure.suptitle(f"MoE layer D=768 F=384 E=60 k=4, INT4 g32; {report['isa']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {}
    for package in ("torch", "executorch", "onnxruntime", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "versions": versions}


def integers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError("positive numbers, separated by commas")
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=integers, default=[1, 4, 16, 128, 512])
    parser.add_argument("--threads", type=integers, default=[1, 2])
    parser.add_argument("--isa", default="auto", help="one that the kernels have here, or auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.06, help="seconds per contender, case and round")
    parser.add_argument("--copies", type=int, default=6, help="layers that calls rotate through")
    parser.add_argument("--peers", default="onnxruntime,torch fp32,upstream", help="which peers to run; empty: none")
    parser.add_argument("--scaling", action="store_true", help="also cost against tokens 1..8192 and experts 8..256")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()

    kernel_api.use_own_pool()
    try:
        kernel_api.set_isa(options.isa)
    except kernel_api.KernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    isa = kernel_api.get_isa()
    shape = Shape()
    peers = available_peers() & {p.strip() for p in options.peers.split(",")}
    contenders, layer = build_contenders(shape, options.copies, peers)
    agreement = check_agreement(layer, peers)
    before = roofline(isa, options.threads, options.out)
    rng = np.random.default_rng(1)
    hits = {}
    for tokens in options.tokens:
        inputs = [rng.standard_normal((tokens, shape.d), dtype=np.float32) for _ in range(sample_count(tokens))]
        hits[tokens] = statistics.mean(contenders[0].layers[0].experts_hit(x) for x in inputs)
        for threads in options.threads:
            for i in range(options.rounds):
                for c in contenders[i % len(contenders) :] + contenders[: i % len(contenders)]:
                    if not (c.serial and threads > 1):
                        time_round(c, inputs, threads, options.budget, i)
    roof = best_of(before, roofline(isa, options.threads, options.out))
    results = list(results_of(contenders, shape, hits, roof))
    report = {
        "machine": machine(),
        "isa": isa,
        "shape": vars(shape),
        "roofline": roof,
        "agreement": agreement,
        "experts_hit": hits,
        "results": results,
        "ratios": ratios_of(results),
        "scaling": scaling(shape) if options.scaling else [],
    }
    print_report(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernel.json").write_text(json.dumps(report, indent=1))
    plot(report, options.out / "kernel.png")
    print(f"\nwritten: {options.out / 'kernel.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
