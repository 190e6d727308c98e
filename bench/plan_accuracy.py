"""Planned beside measured: weight bytes, peak memory and decoding rate of compiled models on this machine.

    python bench/plan_accuracy.py [--artifact DIR ...] [--device FILE] [--threads N] [--rounds N] [--json FILE]

Without --artifact: the specs of --specs are synthesized and compiled into --folder first (kept there). Without
--device, the machine is measured before and after, and the better of each rate counts: the plan is for the machine at
its best, and so is the measurement (the fastest of several short runs). Ends with status 1 when a limit is missed:
weights 1%, peak memory 10%, decoding rate 25%.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from moec.analysis.plan.devices import load_device
from moec.analysis.plan.memory import memory, weight_bytes
from moec.analysis.plan.planner import model_of
from moec.analysis.plan.roofline import decode, prefill
from moec.checkpoints import synthesize
from moec.cli.device_cmd import measured_device
from moec.cli.output import table
from moec.compiler import build
from moec.compiler.artifact import Manifest, read_manifest
from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.device import Device, Figure, KernelRates
from moec.runtime import machine

LIMITS = {"weights": 0.01, "peak memory": 0.10, "decode": 0.25}
PROMPT, DECODE = 512, 32
SPECS = ("mobilemoe-tiny", "mobilemoe-s", "mobilellm-pro")


def artifact_of(name: str, folder: Path, progress: Progress) -> Path:
    """A compiled artifact of the shipped spec `name` with random weights."""
    out = folder / name
    if (out / "manifest.json").exists():
        return out
    spec = load_spec(Path(__file__).parent.parent / "specs" / "models" / f"{name}.yaml")
    synthesize(spec, folder / f"{name}-checkpoint", seed=1, qat=True, progress=progress)
    build.compile(spec, "xnnpack", folder / f"{name}-checkpoint", out, progress)
    shutil.rmtree(folder / f"{name}-checkpoint")
    return out


def better(a: Device, b: Device) -> Device:
    """The higher of each measured rate (the lower of the times)."""
    assert a.kernels is not None
    assert b.kernels is not None

    def pick(key: str, x: Figure, y: Figure) -> Figure:
        least = key.endswith("_us") or key == "runtime_mb"
        return min(x, y, key=lambda f: f.number) if least else max(x, y, key=lambda f: f.number)

    def merged(x: Any, y: Any) -> dict[str, Any]:
        pairs = {k: (getattr(x, k), getattr(y, k)) for k in type(x).model_fields}
        return {k: pick(k, *p) for k, p in pairs.items() if all(isinstance(f, Figure) for f in p)}

    kernels: KernelRates = a.kernels.model_copy(update=merged(a.kernels, b.kernels))
    return a.model_copy(update={**merged(a, b), "kernels": kernels})


def measured(folder: Path, threads: int, rounds: int) -> dict[str, float]:
    """The fastest of `rounds` processes, each with two repeats; the smallest peak, which others do not inflate."""
    context = read_manifest(folder).model.context
    prompt = min(PROMPT, context - DECODE)
    best: dict[str, float] = {}
    for _ in range(rounds):
        report = machine.run_model(folder / "model.pte", prompt=prompt, decode=DECODE, threads=threads, repeats=2)
        now = {
            "decode": DECODE / min(report["decode_s"]),
            "prefill": prompt / min(report["prefill_s"]),
            "peak": -report["peak_rss_mb"] * 1e6,
        }
        best = {key: max(value, best.get(key, value)) for key, value in now.items()}
    return {**best, "peak": -best["peak"], "prompt": prompt}


def compare(folder: Path, device: Device, threads: int, seen: dict[str, float]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    spec = Spec.model_validate(_spec_of(manifest))
    options = spec.targets["xnnpack"].model_copy(update={"threads": threads})
    model = model_of(spec, "xnnpack", options)
    used = round(seen["prompt"]) + DECODE
    rates = model.footprint.rates(device, None)
    step = decode(model, device, rates, used - DECODE // 2)
    whole = prefill(model, device, rates, round(seen["prompt"]))
    stored = sum(n for role, n in manifest.sizes_by_role.items() if role != "constant")
    assert step.expected_tokens_per_s is not None
    assert whole.expected_tokens_per_s is not None
    return {
        "name": spec.name,
        "weights": (weight_bytes(model), stored),
        "peak memory": (memory(model, used).peak, seen["peak"]),
        "decode": (step.expected_tokens_per_s, seen["decode"]),
        "prefill": (whole.expected_tokens_per_s, seen["prefill"]),
        "parts_ms": {k: v * 1e3 for k, v in step.parts.items()},
    }


def _spec_of(manifest: Manifest) -> dict[str, Any]:
    raw = dict(manifest.spec)
    raw.pop("checkpoint", None)
    return raw


def main() -> int:
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, nargs="*", default=[])
    parser.add_argument("--specs", nargs="*", default=list(SPECS))
    parser.add_argument("--folder", type=Path, default=Path("build/plan"))
    parser.add_argument("--device", help="a measured device file; default: measure")
    parser.add_argument("--threads", type=int, default=sum(machine.cores()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    progress = Progress()
    folders = options.artifact or [artifact_of(name, options.folder, progress) for name in options.specs]
    before = load_device(options.device) if options.device else None
    first = before or measured_device("this-machine", options.threads, options.rounds, progress)
    seen = [measured(f, options.threads, options.rounds) for f in folders]
    device = before or better(first, measured_device("this-machine", options.threads, options.rounds, progress))
    found = [compare(f, device, options.threads, s) for f, s in zip(folders, seen, strict=True)]
    rows, missed = [], []
    for entry in found:
        for key in ("weights", "peak memory", "decode", "prefill"):
            planned, real = entry[key]
            error, limit = planned / real - 1, LIMITS.get(key)
            unit = 1e6 if key in ("weights", "peak memory") else 1
            if limit is not None and abs(error) > limit:
                missed.append(f"{entry['name']}: {key} {error:+.1%}")
            asked = "" if limit is None else f"{limit:.0%}"
            rows.append((entry["name"], key, f"{planned / unit:,.1f}", f"{real / unit:,.1f}", f"{error:+.1%}", asked))
    title = f"{options.threads} threads, prompt {PROMPT}, {DECODE} tokens decoded; MB and tokens/s"
    table(title, ["model", "", "planned", "measured", "error", "limit"], rows, right=[2, 3, 4, 5])
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"device": device.model_dump(mode="json"), "models": found}, indent=1))
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
