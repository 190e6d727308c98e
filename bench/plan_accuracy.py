"""Planned beside measured: weight bytes, peak memory and decoding rate of compiled models on this machine.

    python bench/plan_accuracy.py [--families [NAME,...]] [--specs NAME ...] [--artifact DIR ...] [--device FILE]
                                  [--threads N] [--rounds N] [--json FILE] [--prepare] [--again FILE ...]

--families: middle shapes of the families of specs/families (plan_families.py), all or those that are named. Else the
specs of --specs, or the artifacts of --artifact. What is not compiled yet is, with random weights, into --folder, and
kept there; --prepare ends then. Without --device, the machine is measured before and after, and the better of each rate
counts: the plan is for the machine at its best, and so is the measurement (the fastest of several short runs). --again
takes machine and measurements from what --json wrote, and compares them with what the plan says now; of several FILEs
each is of its own machine. Ends with status 1 when a limit is missed: weights 1%, peak memory 10%, decoding rate 25%.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plan_families

from moec.analysis.plan.devices import load_device
from moec.analysis.plan.memory import memory, weight_bytes
from moec.analysis.plan.planner import model_of
from moec.analysis.plan.roofline import decode, prefill
from moec.checkpoints import synthesize
from moec.cli.device_cmd import measured_device
from moec.cli.output import table
from moec.compiler import build
from moec.compiler.artifact import read_manifest
from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.device import Device, Figure, KernelRates
from moec.runtime import machine

LIMITS = {"weights": 0.01, "peak memory": 0.10, "decode": 0.25}
PROMPT, DECODE = 512, 32
SPECS = ("mobilemoe-tiny", "mobilemoe-s", "mobilellm-pro")


@dataclass(frozen=True)
class Case:
    """What is compared: a spec, and the artifact that it became."""

    name: str
    spec: Spec
    folder: Path


def of_spec(name: str, folder: Path, progress: Progress) -> Case:
    """The shipped spec `name` with random weights."""
    out = folder / name
    spec = load_spec(Path(__file__).parent.parent / "specs" / "models" / f"{name}.yaml")
    if not (out / "manifest.json").exists():
        synthesize(spec, folder / f"{name}-checkpoint", seed=1, qat=True, progress=progress)
        build.compile(spec, "xnnpack", folder / f"{name}-checkpoint", out, progress)
        shutil.rmtree(folder / f"{name}-checkpoint")
    return Case(name, spec, out)


def of_family(name: str, folder: Path, progress: Progress) -> Case:
    return Case(name, *plan_families.artifact_of(name, folder, progress))


def of_artifact(folder: Path) -> Case:
    raw = dict(read_manifest(folder).spec)
    raw.pop("checkpoint", None)
    spec: Spec = Spec.model_validate(raw)
    return Case(spec.name, spec, folder)


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
    """The fastest of `rounds` processes, each with two repeats; the smallest peak, which others do not inflate.

    What is decoded is given: the choices of a model with random weights soon repeat themselves, and with them experts,
    which then lie in the cache.
    """
    model = read_manifest(folder).model
    prompt = min(PROMPT, model.context - DECODE)
    ids = random.Random(1).choices(range(model.vocab_size), k=prompt + DECODE)
    best: dict[str, float] = {}
    for _ in range(rounds):
        report = machine.run_model(
            folder / "model.pte", prompt=prompt, decode=DECODE, threads=threads, repeats=2, ids=ids
        )
        now = {
            "decode": DECODE / min(report["decode_s"]),
            "prefill": prompt / min(report["prefill_s"]),
            "peak": -report["peak_rss_mb"] * 1e6,
        }
        best = {key: max(value, best.get(key, value)) for key, value in now.items()}
    return {**best, "peak": -best["peak"], "prompt": prompt}


def compare(case: Case, device: Device, threads: int, seen: dict[str, float]) -> dict[str, Any]:
    options = case.spec.targets["xnnpack"].model_copy(update={"threads": threads})
    model = model_of(case.spec, "xnnpack", options)
    used = round(seen["prompt"]) + DECODE
    rates = model.footprint.rates(device, None)
    step = decode(model, device, rates, used - DECODE // 2)
    whole = prefill(model, device, rates, round(seen["prompt"]))
    stored = sum(n for role, n in read_manifest(case.folder).sizes_by_role.items() if role != "constant")
    assert step.expected_tokens_per_s is not None
    assert whole.expected_tokens_per_s is not None
    return {
        "name": case.name,
        "weights": (weight_bytes(model), stored),
        "peak memory": (memory(model, used).peak, seen["peak"]),
        "decode": (step.expected_tokens_per_s, seen["decode"]),
        "prefill": (whole.expected_tokens_per_s, seen["prefill"]),
        "parts_ms": {k: v * 1e3 for k, v in step.parts.items()},
        "memory_parts": vars(memory(model, used)),
        "seen": seen,
    }


def main() -> int:
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="?", const=",".join(plan_families.SHAPES), metavar="NAME,...")
    parser.add_argument("--artifact", type=Path, nargs="*", default=[])
    parser.add_argument("--specs", nargs="*", default=list(SPECS))
    parser.add_argument("--folder", type=Path, default=Path("build/plan"))
    parser.add_argument("--device", help="a measured device file; default: measure")
    parser.add_argument("--threads", type=int, default=sum(machine.cores()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare", action="store_true", help="compile what is to be measured, and end")
    parser.add_argument("--again", type=Path, nargs="+", metavar="FILE", help="measurements that --json wrote")
    return parser.parse_args()


def chosen(options: argparse.Namespace, progress: Progress) -> list[Case]:
    """What is asked for, compiled. UserError for an unknown family."""
    if options.families is None:
        if options.artifact:
            return [of_artifact(folder) for folder in options.artifact]
        return [of_spec(name, options.folder, progress) for name in options.specs]
    names = options.families.split(",")
    for name in names:
        if name not in plan_families.SHAPES:
            raise UserError(f"unknown family {name!r}", remedy=f"known: {', '.join(plan_families.SHAPES)}")
    return [of_family(name, options.folder, progress) for name in names]


def measure(cases: Sequence[Case], options: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Every case measured and compared; written to --json."""
    before = load_device(options.device) if options.device else None
    first = before or measured_device("this-machine", options.threads, options.rounds, progress)
    seen = [measured(case.folder, options.threads, options.rounds) for case in cases]
    device = before or better(first, measured_device("this-machine", options.threads, options.rounds, progress))
    found = [compare(case, device, options.threads, s) for case, s in zip(cases, seen, strict=True)]
    if options.json is not None:
        record = {"device": device.model_dump(mode="json"), "threads": options.threads, "models": found}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1))
    return found


def again(cases: Sequence[Case], files: Sequence[Path]) -> list[dict[str, Any]]:
    """The plan as it is now against the measurements in `files`, of those of `cases` that they hold."""
    named, found = {case.name: case for case in cases}, []
    for file in files:
        record = json.loads(file.read_text())
        device = Device.model_validate(record["device"])
        entries = [e for e in record["models"] if e["name"] in named]
        found += [compare(named[e["name"]], device, record["threads"], e["seen"]) for e in entries]
    return found


def judge(found: Sequence[dict[str, Any]], title: str) -> list[str]:
    """Print the table; the limits that are missed, in words."""
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
    table(title, ["model", "", "planned", "measured", "error", "limit"], rows, right=[2, 3, 4, 5])
    return missed


def run() -> int:
    options, progress = parsed(), Progress()
    cases = chosen(options, progress)
    if options.prepare:
        return 0
    found = again(cases, options.again) if options.again else measure(cases, options, progress)
    title = f"{options.threads} threads, prompt {PROMPT}, {DECODE} tokens decoded; MB and tokens/s"
    missed = judge(found, title)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
