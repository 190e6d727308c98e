"""Whether training on a GPU gives the CPU's numbers: at most eight minutes. `make gpu-check`.

It trains mobilemoe-nano on made-up text for some steps, each part in a process of its own, and compares losses:

    cpu, cpu-bf16           the torch backend on the CPU, in float32 and bfloat16: what the others are compared with
    cpu-order               the same in micro-batches: another order of sums, a control for what order alone does
    torch, torch-bf16       the torch backend on the device; experts by grouped GEMM
    mesh                    the torch backend as one rank of a process group (NCCL on CUDA): FSDP2, an expert mesh
    titan, titan-bf16       the torchtitan backend, which is one rank of a process group by itself
    products                grouped GEMM against a loop over the experts and a padded bmm, forward and backward
    collectives             all-reduce, and the all-to-all of experts, on one rank

OUT/gpu-check.json holds device, versions, losses, tokens/s and every comparison with its tolerance, OUT/gpu-check.txt
the same for people. Exit status 0, 1 when something differs or did not run, 2 for what the user must mend (no CUDA, no
torchtitan). `--device cpu` runs the same with gloo, where there is no GPU: it tests the check itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moec.compiler.progress import Progress
from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.training import Training
from moec.sources.decoder.config import decoder_of
from moec.training.data.shards import INDEX, Corpus, write_tokens
from moec.training.experts import COMPUTES, Compute, expert_products
from moec.training.parallel import AllToAll, World
from moec.training.run import train
from moec.training.stages import Plan, Run, check

SPEC = Path(__file__).resolve().parent.parent / "specs" / "models" / "mobilemoe-nano.yaml"
STEPS, LIMIT = 24, 480.0
PARTS = (
    "cpu", "cpu-order", "cpu-bf16", "torch", "torch-bf16", "mesh", "titan", "titan-bf16", "products", "collectives",
)  # fmt: skip
RECORD, SUMMARY = "gpu-check.json", "gpu-check.txt"
NEVER = "Never run on CUDA so far: no GPU was at hand where this was written, and only --device cpu was run."

# Training is chaotic at its beginning: which experts a token goes to and the sign by which a bias moves are
# discontinuous. Two orders of the same sums on the CPU (float32, parts cpu and cpu-order) differed by at most 6e-5 nats
# up to the eighth step, 1e-3 up to the twelfth, and 0.2 from the sixteenth on. So the first steps are compared, and of
# the rest whether it learns. A device differs from the CPU in every product, not in one order alone: the tolerance is
# eighty times what order did. The first loss has equal weights; float32 rounds at 6e-8 of its 9 nats.
COMPARED, COMPARED_BF16 = 8, 4  # steps
FIRST, LATER = 1e-4, 5e-3  # nats
FIRST_BF16, LATER_BF16 = 2e-2, 5e-2  # products round at 4e-3 of themselves, and not alike in two libraries
LEARNT = 0.05  # of the first loss, which must be gone: parts that all learn nothing would agree (9.0 to 4.8 on the CPU)
PRODUCTS = {"float32": 2e-5, "bfloat16": 2e-2}  # of the largest value of the loop's float32 result


@dataclass(frozen=True)
class Comparison:
    """One difference beside what it may be; a missing part has none."""

    what: str
    difference: float | None
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference is not None and self.difference <= self.tolerance  # false for nan


# --- the parts: each gives plain values -----------------------------------------------------------------------------


def corpus_in(folder: Path, vocabulary: int, tokens: int) -> Corpus:
    """Made-up text of four domains: half of the ids follow from the one before, the others are drawn by Zipf's law."""
    if (folder / INDEX).exists():
        return Corpus.open(folder)
    texts: dict[str, Any] = {}
    for number, name in enumerate(("web", "knowledge", "code", "math")):
        random = np.random.default_rng(number)
        texts[name] = {
            split: [_document(random, vocabulary, 3 + 2 * number) for _ in range(max(4, count // 250))]
            for split, count in (("train", tokens), ("heldout", 4096))
        }
    return write_tokens(folder, texts, vocab_size=vocabulary, eos_id=1)


def _document(random: np.random.Generator, vocabulary: int, factor: int) -> list[int]:
    ids = [0]
    drawn = 2 + np.minimum(random.zipf(1.3, 250), vocabulary - 2) - 1
    for word, follows in zip(drawn.tolist(), random.random(250) < 0.5, strict=True):
        ids.append(2 + (ids[-1] * factor + 7) % (vocabulary - 2) if follows else int(word))
    return [*ids, 1]


def spec_for(spec: Spec, steps: int, *, precision: str, micro: bool) -> Spec:
    """The spec's first stage for `steps` steps, each of them logged, without a warm-up that they would not leave."""
    assert spec.training is not None
    first = spec.training.stages[0]
    step = first.rows * first.context
    changes = {
        "tokens": steps * step,
        "learning_rate": first.learning_rate.model_copy(update={"warmup": 4 * step, "shape": "constant"}),
        "precision": precision,
        "micro_batch_tokens": max(first.context, step // 2) if micro else None,
        "dispatch": first.dispatch.model_copy(update={"kind": "dropless", "capacity_factor": None}),
        "log_every": 1,
        "eval_every": None,
        "eval_tokens": 2048,
        "checkpoint_every": 10 * steps,
    }
    section = Training(stages=(first.model_copy(update=changes),), seed=spec.training.seed)
    return spec.model_copy(update={"training": section})


def trained(spec: Spec, corpus: Corpus, out: Path, device: str, part: str, steps: int) -> dict[str, Any]:
    """Losses by step, held-out losses before the first, tokens/s (the median of the second half), peak memory of a
    GPU in bytes."""
    on_cpu = part.startswith("cpu")
    where = "cpu" if on_cpu else device
    chosen = spec_for(spec, steps, precision="bf16" if part.endswith("bf16") else "fp32", micro=part == "cpu-order")
    if part == "mesh":
        _one_rank(chosen, corpus, out, torch.device(where))
    else:
        backend: Any = "torchtitan" if part.startswith("titan") else "torch"
        train(chosen, data=corpus, out=out, device=where, backend=backend)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "lm_loss" in line]
    peak = torch.cuda.max_memory_allocated() if where == "cuda" else None
    return {
        "device": where,
        "losses": [line["loss"] for line in logged],
        "grad_norms": [line["grad_norm"] for line in logged],
        "heldout": next(line["heldout"] for line in lines if "heldout" in line),  # before the first step
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in logged[len(logged) // 2 :]),
        "peak_memory": peak,
    }


@contextmanager
def _group(device: torch.device) -> Iterator[None]:
    """A process group of this process alone: NCCL on CUDA, gloo on a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _one_rank(spec: Spec, corpus: Corpus, out: Path, device: torch.device) -> None:
    """The run that each of many processes does, in one: FSDP2 and a mesh of experts, which one process leaves out."""
    assert spec.training is not None
    plan = Plan(
        spec, decoder_of(spec, "trained"), spec.training, corpus, out, None, False, None, spec.training.seed, None,
        "auto", "torch",
    )  # fmt: skip
    check(plan)
    out.mkdir(parents=True, exist_ok=True)
    with _group(device):
        mesh = init_device_mesh(device.type, (1, 1), mesh_dim_names=("copies", "experts"))
        Run(plan, World(0, 1, device, mesh), Progress(quiet=True)).stages()


def products(device: str) -> dict[str, Any]:
    """Largest differences of outputs and gradients from a loop in float32, as a part of its largest value, by case.

    Rows are uneven, one expert has none; the last shape is one that grouped GEMM cannot take, which is then a loop.
    """
    found: dict[str, Any] = {}
    for experts, rows, width, hidden in ((16, 4096, 192, 128), (60, 2048, 192, 64), (7, 333, 64, 24), (5, 100, 36, 20)):
        generator = torch.Generator().manual_seed(experts)
        counts = torch.multinomial(torch.rand(experts, generator=generator) + 0.05, rows, True, generator=generator)
        counts_E = torch.bincount(counts[counts > 0], minlength=experts)
        total = int(counts_E.sum())
        x = torch.randn(total, width, generator=generator)
        up = torch.randn(experts, width, 2 * hidden, generator=generator) * width**-0.5
        down = torch.randn(experts, hidden, width, generator=generator) * hidden**-0.5
        upstream = torch.randn(total, width, generator=generator)

        def run(compute: Compute, dtype: torch.dtype) -> list[torch.Tensor]:
            leaves = [t.clone().to(device, dtype).requires_grad_() for t in (x, up, down)]  # noqa: B023
            y = expert_products(compute, leaves[0], counts_E.to(device), leaves[1], leaves[2])  # noqa: B023
            y.backward(upstream.to(device, dtype))  # noqa: B023
            return [y.detach().float().cpu(), *(t.grad.float().cpu() for t in leaves)]

        wanted = run("loop", torch.float32)
        for compute in COMPUTES:
            for name in PRODUCTS:
                got = run(compute, getattr(torch, name))
                worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))
                found[f"{compute}, {experts} experts of {width} x {hidden}, {name}"] = worst
    return found


def collectives(device: str) -> dict[str, Any]:
    """One rank: a sum over it is the value itself, and rows that travel to themselves come back, gradients too."""
    where = torch.device(device)
    with _group(where):
        mesh = init_device_mesh(where.type, (1, 1), mesh_dim_names=("copies", "experts"))
        generator = torch.Generator().manual_seed(1)
        value = torch.randn(1000, generator=generator).to(where)
        summed = value.clone()
        dist.all_reduce(summed)
        counts_E = torch.tensor([5, 0, 7, 3], device=where)
        rows = torch.randn(15, 8, generator=generator).to(where)
        scale = torch.rand(4, generator=generator).to(where).repeat_interleave(counts_E).unsqueeze(1)
        leaves = [rows.clone().requires_grad_() for _ in range(2)]
        through = AllToAll(mesh["experts"])(lambda x, _: x * scale, leaves[0], counts_E)
        through.square().sum().backward()
        direct = leaves[1] * scale
        direct.square().sum().backward()
        gradients = [leaf.grad for leaf in leaves]
        assert gradients[0] is not None
        assert gradients[1] is not None
        return {
            "backend": dist.get_backend(),
            "all_reduce": float((summed - value).abs().max()),
            "all_to_all": float((through - direct).detach().abs().max()),
            "all_to_all_gradient": float((gradients[0] - gradients[1]).abs().max()),
        }


def part_result(spec: Spec, part: str, device: str, out: Path, steps: int) -> dict[str, Any]:
    """What a part measured."""
    torch.set_float32_matmul_precision("highest")  # no TF32: it would hide what is looked for
    if part == "products":
        return products(device)
    if part == "collectives":
        return collectives(device)
    corpus = corpus_in(out / "corpus", decoder_of(spec, "trained").vocab_size, 1 << 16)
    return trained(spec, corpus, out / "runs" / part, device, part, steps)


# --- what they say --------------------------------------------------------------------------------------------------


def comparisons(parts: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """Every comparison of the parts that ran, and of those that did not, without a difference."""
    found = []
    exact, rounded = (FIRST, LATER, COMPARED), (FIRST_BF16, LATER_BF16, COMPARED_BF16)
    for part, reference, (first, later, steps) in (
        ("torch", "cpu", exact),
        ("mesh", "torch", exact),
        ("titan", "torch", exact),
        ("torch-bf16", "cpu-bf16", rounded),
        ("titan-bf16", "torch-bf16", rounded),
    ):
        a, b = parts.get(part), parts.get(reference)
        for what, tolerance, difference in (
            ("first loss", first, lambda a, b: _losses(a, b, 1)),
            (f"losses of {steps} steps", later, lambda a, b, n=steps: _losses(a, b, n)),
            ("held-out losses before the first", first, _heldout),
        ):
            seen = None if a is None or b is None else difference(a, b)
            found.append(Comparison(f"{part} and {reference}: {what}", seen, tolerance))
    for part in ("torch", "torch-bf16", "mesh", "titan", "titan-bf16"):
        ran = parts.get(part)
        left = None if ran is None else statistics.fmean(ran["losses"][-3:]) / ran["losses"][0]
        found.append(Comparison(f"{part}: its last losses as a part of its first", left, 1 - LEARNT))
    cases = parts.get("products")
    for name, tolerance in PRODUCTS.items():
        worst = None if cases is None else max(v for case, v in cases.items() if case.endswith(name))
        found.append(
            Comparison(f"grouped GEMM, loop and bmm, {name}: worst of outputs and gradients", worst, tolerance)
        )
    for key in ("all_reduce", "all_to_all", "all_to_all_gradient"):
        ran = parts.get("collectives")
        found.append(Comparison(f"one rank: {key}", None if ran is None else ran[key], 0.0))
    return found


def _losses(a: Mapping[str, Any], b: Mapping[str, Any], steps: int) -> float:
    """The largest difference up to a step; nan if one of them is."""
    return float(np.abs(np.array(a["losses"][:steps]) - np.array(b["losses"][:steps])).max())


def _heldout(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    return max(abs(float(a["heldout"][domain] - b["heldout"][domain])) for domain in b["heldout"])


def machine(device: str) -> dict[str, Any]:
    """Where this ran."""
    names = ("moec", "torch", "torchao", "torchtitan", "numpy", "triton")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    found: dict[str, Any] = {
        "device": device, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "versions": versions,
    }  # fmt: skip
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": about.name,
            "capability": f"{about.major}.{about.minor}",
            "memory": about.total_memory,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "bf16": torch.cuda.is_bf16_supported(),
        }
    return found


def summary(record: Mapping[str, Any]) -> str:
    """The record for people."""
    where = record["machine"]
    lines = [f"device: {where['device']}" + (f", {where['gpu']}" if "gpu" in where else f" ({where['cpu']})")]
    lines.append("versions: " + ", ".join(f"{name} {number}" for name, number in where["versions"].items()))
    if where["device"] != "cuda":
        lines.append("NOTHING of this ran on CUDA: --device cpu tests the check itself, with gloo")
    lines.append(f"\n{'part':14}{'seconds':>9}{'tokens/s':>11}{'first loss':>12}{'last loss':>11}")
    for name, part in record["parts"].items():
        head = f"{name:14}{part['seconds']:9.1f}"
        if "fault" in part:
            lines.append(f"{head}  did not run: {part['fault']}")
        elif "losses" in part:
            losses = part["losses"]
            lines.append(f"{head}{part['tokens_per_s']:11,.0f}{losses[0]:12.5f}{losses[-1]:11.5f}")
        else:
            lines.append(head)
    lines.append(f"\n{'':4}{'difference':>12}{'tolerance':>11}")
    for c in record["comparisons"]:
        shown = "missing" if c["difference"] is None else f"{c['difference']:.2e}"
        lines.append(f"{'ok' if c['holds'] else 'NO':4}{shown:>12}{c['tolerance']:11.3g}  {c['what']}")
    control = record["order_alone"]
    shown = "not measured" if control is None else f"{control:.1e} nats"
    lines.append(f"\norder of sums alone, on the CPU, {COMPARED} steps: {shown}")
    lines.append(f"verdict: {record['verdict']}, {record['seconds']:.0f} s")
    return "\n".join(lines) + "\n"


# --- the check ------------------------------------------------------------------------------------------------------


def run_part(options: argparse.Namespace, part: str, left: float) -> dict[str, Any]:
    """A part in a process of its own: torchtitan stays with a device, a process group with its backend."""
    file = options.out / "parts" / f"{part}.json"
    file.unlink(missing_ok=True)
    shutil.rmtree(options.out / "runs" / part, ignore_errors=True)
    words = [sys.executable, "-W", "ignore", __file__, "--part", part, "--device", options.device]
    words += ["--out", str(options.out), "--steps", str(options.steps), "--spec", str(options.spec)]
    began = time.perf_counter()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=max(1.0, left))
        fault = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        if fault:
            (options.out / "parts" / f"{part}.txt").write_text(done.stdout + done.stderr)
    except subprocess.TimeoutExpired:
        fault = f"the limit of {options.limit:.0f} s is reached"
    spent = {"seconds": round(time.perf_counter() - began, 1)}
    return spent | ({"fault": fault[:300]} if fault else json.loads(file.read_text()))


def checked(options: argparse.Namespace, part: Callable[[str, float], dict[str, Any]]) -> dict[str, Any]:
    """Run all parts by `part(name, seconds left)` and compare: the record."""
    began = time.perf_counter()
    parts: dict[str, dict[str, Any]] = {}
    for name in PARTS:
        left = options.limit - (time.perf_counter() - began)
        reached = {"seconds": 0.0, "fault": f"the limit of {options.limit:.0f} s is reached"}
        parts[name] = part(name, left) if left > 0 else reached
        print(
            f"{name}: {parts[name].get('fault', 'done')}, {parts[name]['seconds']:.1f} s", file=sys.stderr, flush=True
        )
    ran = {name: values for name, values in parts.items() if "fault" not in values}
    found = comparisons({name: {k: v for k, v in values.items() if k != "seconds"} for name, values in ran.items()})
    control = _losses(ran["cpu-order"], ran["cpu"], COMPARED) if {"cpu", "cpu-order"} <= set(ran) else None
    missing = any(c.difference is None for c in found)
    verdict = "as on the CPU" if all(c.holds for c in found) else ("incomplete" if missing else "DIFFERENT")
    return {
        "machine": machine(options.device),
        "steps": options.steps,
        "never_run_on_cuda": NEVER if options.device != "cuda" else None,
        "parts": parts,
        "comparisons": [asdict(c) | {"holds": c.holds} for c in found],
        "order_alone": control,
        "verdict": verdict,
        "seconds": round(time.perf_counter() - began, 1),
    }


def refusal(device: str) -> str | None:
    """What the user must mend first."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA that this torch can use; --device cpu tests the check itself (BENCH_ARGS='--device cpu')"
    if importlib.util.find_spec("torchtitan") is None:
        return "torchtitan is not installed; pip install 'moec[titan]'"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"))
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of all parts together")
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (fault := refusal(options.device)) is not None:
        print(fault, file=sys.stderr)
        return 2
    if options.part is not None:
        found = part_result(load_spec(options.spec), options.part, options.device, options.out, options.steps)
        (options.out / "parts" / f"{options.part}.json").write_text(json.dumps(found))
        return 0
    for name in ("parts", "runs"):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    record = checked(options, lambda part, left: run_part(options, part, left))
    (options.out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    text = summary(record)
    (options.out / SUMMARY).write_text(text)
    print(text, end="")
    return 0 if record["verdict"] == "as on the CPU" else 1


if __name__ == "__main__":
    sys.exit(main())
