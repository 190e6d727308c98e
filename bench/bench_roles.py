"""Which kernel should serve which dense role: ours or the XNNPACK delegate, on whole models. `make bench-roles`.

Compiles a spec once for each choice (`kernels:` of the target, one role moved to XNNPACK at a time, then all of them),
runs the artifacts in turn, round after round, and prints rates, memory and start of each beside the default. The
target's `auto` follows this table. Results: build/bench/roles.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.cores import usable_cores
from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.compiler.spec import load_spec
from moec.compiler.timing import BenchPlan
from moec.targets.xnnpack.bench import bench

SPECS = Path(__file__).parent.parent / "specs" / "models"
CHOICES: dict[str, dict[str, str]] = {
    "default": {},
    "attention: xnnpack": {"attention": "xnnpack"},
    "ffn: xnnpack": {"ffn": "xnnpack"},
    "head: xnnpack": {"head": "xnnpack"},
    "all: xnnpack": {"attention": "xnnpack", "ffn": "xnnpack", "head": "xnnpack"},
}


def compiled(name: str, choice: str, layers: int | None, folder: Path, progress: Progress) -> Path:
    """model.pte of a shipped spec with the kernels of `choice`, made once. The experts stay in our operator always."""
    raw = yaml.safe_load((SPECS / f"{name}.yaml").read_text())
    if layers is not None:
        raw["model"]["layers"] = layers
        folder = folder / f"{layers}-layers"
    raw["targets"] = {"xnnpack": {"kernels": CHOICES[choice]}}
    # XNNPACK takes groups along the input only
    raw["quantization"].pop("expert_group_axis", None)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, artifact = folder / f"{name}-sft", folder / f"{name}-{choice.replace(': ', '-')}"
    with tempfile.TemporaryDirectory() as temp:
        path = Path(temp) / "spec.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        spec = load_spec(path)
        if not checkpoint.exists():
            synthesize(spec, checkpoint, seed=0, progress=progress)
        if not artifact.exists():
            build.compile(spec, target="xnnpack", checkpoint=checkpoint, out=artifact, progress=progress)
    return artifact / "model.pte"


def measure(models: dict[str, Path], threads: int, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {choice: [] for choice in models}
    with progress.stage("runs", rounds * len(models)) as step:
        for _ in range(rounds):
            for choice, path in models.items():
                began = time.perf_counter()
                bench(path, BenchPlan(prefill=1, decode=1, threads=threads, repeats=1), Progress(quiet=True))
                start_s = time.perf_counter() - began
                report = bench(path, BenchPlan(prefill=512, decode=32, threads=threads), Progress(quiet=True))
                found[choice].append({**report, "start_s": start_s})
                step(choice)
    keys = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_mb", "start_s")
    return [
        {
            "kernels": choice,
            "file_mb": models[choice].stat().st_size / 1e6,
            **{
                key: {
                    "median": statistics.median(s[key] for s in samples),
                    "low": min(s[key] for s in samples),
                    "high": max(s[key] for s in samples),
                }
                for key in keys
            },
        }
        for choice, samples in found.items()
    ]


def show(name: str, threads: int, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}, {threads} threads: medians (low-high); prefill of 512 tokens, decode of 32 behind it")
    heads = f"{'prefill tok/s':>22} {'decode tok/s':>22} {'peak RSS MB':>12} {'start s':>8} {'file MB':>8}"
    print(f"  {'kernels':<20} {heads}")
    for row in rows:
        rates = [row[key] for key in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        cells = [f"{r['median']:.1f} ({r['low']:.0f}-{r['high']:.0f})" for r in rates]
        print(
            f"  {row['kernels']:<20} {cells[0]:>22} {cells[1]:>22} {row['peak_rss_mb']['median']:>12.0f} "
            f"{row['start_s']['median']:>8.2f} {row['file_mb']:>8.0f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--models", default="mobilellm-pro", help="shipped specs, separated by commas")
    parser.add_argument("--layers", type=int, help="fewer layers than the spec says, for a quick look")
    parser.add_argument("--choices", default=",".join(CHOICES), help="of: " + ", ".join(CHOICES))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    choices = [c.strip() for c in options.choices.split(",")]
    if unknown := [c for c in choices if c not in CHOICES]:
        parser.error(f"no such choice: {unknown[0]}; choose from {', '.join(CHOICES)}")
    progress = Progress()
    results = {}
    try:
        for name in options.models.split(","):
            models = {c: compiled(name, c, options.layers, options.out / "roles", progress) for c in choices}
            results[name] = measure(models, options.threads, options.rounds, progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, rows in results.items():
        show(name, options.threads, rows)
    (options.out / "roles.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
