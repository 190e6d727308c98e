"""Training throughput: how the experts are multiplied, in one run. `make bench-training`.

Each case is a whole optimizer step (forward, backward, clipping, AdamW) of a small MobileMoE, or one MoE layer forward
and backward at other shapes. The contenders take turns, in an order that rotates, each on its own copy of the same
model; medians and the middle 80% over the rounds. Results: build/bench/training.json.

    grouped  one grouped_mm a projection
    loop     one product an expert, over the stacked weights unbound once
    padded   every expert padded to the fullest, one bmm a projection

The default chooses between the first two by the number of experts and the type; each case says how far behind the best
it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.training import TrainingStage
from moec.sources.decoder.config import MoeConfig
from moec.training.checkpoints import initial_weights, load_weights
from moec.training.data.batches import Batch
from moec.training.experts import COMPUTES, Compute, chosen
from moec.training.model import TrainingDecoder
from moec.training.moe import MoeBlock
from moec.training.parallel import World
from moec.training.stage import Trainer

SPEC = Path(__file__).parent.parent / "specs/models/mobilemoe-nano.yaml"
_INPUTS = 16  # of a layer: more than the default rounds

# one layer, (experts, top_k, d_model, expert width, tokens): the nano model's, its finer and wider relatives
LAYERS = {
    "layer: 16 experts of 128, top 2": (16, 2, 192, 128, 4096),
    "layer: 60 experts of 64, top 4": (60, 4, 192, 64, 4096),
    "layer: 16 experts of 384, top 2": (16, 2, 384, 384, 2048),
}


class RandomBatches:
    """Documents of random tokens. Routers of a fresh model spread them about as text is spread after balancing."""

    def __init__(self, stage: TrainingStage, vocab: int) -> None:
        self._stage, self._vocab = stage, vocab

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        rows, length = self._stage.rows, self._stage.context
        tokens = torch.randint(0, self._vocab, (rows, length + 1), generator=torch.Generator().manual_seed(step))
        documents = torch.arange(length).div(100, rounding_mode="floor").expand(rows, length).int()
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, length), documents, ("web",) * rows)


def step_case(spec: Spec, stage: TrainingStage, compute: Compute) -> tuple[Callable[[], Any], int]:
    """(one optimizer step, its tokens)."""
    model = TrainingDecoder(spec.model, None, compute)  # type: ignore[arg-type]
    load_weights(model, initial_weights(spec.model, 0))  # type: ignore[arg-type]
    trainer = Trainer(model, stage, RandomBatches(stage, spec.model.vocab_size), World())  # type: ignore[arg-type, union-attr]
    return trainer.step, stage.rows * stage.context


def layer_case(shape: tuple[int, ...], compute: Compute, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """(one MoE layer forward and backward without its shared expert, its tokens)."""
    experts, top_k, width, hidden, tokens = shape
    moe = MoeConfig(experts=experts, top_k=top_k, expert_width=hidden, scale=2.5)
    block = MoeBlock(width, moe, None, compute).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    # other tokens each time, so that experts get other numbers of rows, as they do in training
    inputs = [torch.randn(tokens, width, generator=generator, requires_grad=True) for _ in range(_INPUTS)]
    upstream = torch.randn(tokens, width, generator=generator)
    turn = itertools.count()

    def run() -> None:
        x = inputs[next(turn) % _INPUTS]
        x.grad = None
        block.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = block(x)[0]
        (y.float() * upstream).sum().backward()

    return run, tokens


def measure(cases: dict[Compute, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, Any]:
    """Seconds of each contender, interleaved; the first round is not counted."""
    seconds: dict[Compute, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            cases[name][0]()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    found = {}
    for name, spent in seconds.items():
        ordered, cut = sorted(spent), len(spent) // 10
        found[name] = {
            "median_ms": 1e3 * statistics.median(spent),
            "low_ms": 1e3 * ordered[cut],
            "high_ms": 1e3 * ordered[-1 - cut],
            "tokens_per_s": cases[name][1] / statistics.median(spent),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", default="", help="cases whose name holds this, such as 'step' or 'layer: 60'")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    spec = load_spec(SPEC)
    assert spec.training is not None
    first, last = spec.training.stages[0], spec.training.stages[2]
    exact = last.model_copy(update={"precision": "fp32"})
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "cases": {},
    }
    makers: dict[str, Callable[[Compute], tuple[Callable[[], Any], int]]] = {
        f"step: {spec.name}, drop and pad, bf16": lambda c: step_case(spec, first, c),
        f"step: {spec.name}, dropless, bf16": lambda c: step_case(spec, last, c),
        f"step: {spec.name}, dropless, fp32": lambda c: step_case(spec, exact, c),
    }
    for title, shape in LAYERS.items():
        makers[f"{title}, bf16"] = lambda c, s=shape: layer_case(s, c, torch.bfloat16)  # type: ignore[misc]
        makers[f"{title}, fp32"] = lambda c, s=shape: layer_case(s, c, torch.float32)  # type: ignore[misc]
    print(f"{report['threads']} threads, medians of {options.rounds} rounds, ms (tokens/s)")
    for title, make in ((title, make) for title, make in makers.items() if options.only in title):
        found = measure({name: make(name) for name in COMPUTES}, options.rounds)
        best = min(found, key=lambda name: found[name]["median_ms"])
        dtype = torch.bfloat16 if title.endswith("bf16") else torch.float32
        default = chosen("auto", 60 if "60 experts" in title else 16, "cpu", dtype)
        behind = found[default]["median_ms"] / found[best]["median_ms"] - 1
        report["cases"][title] = {
            "contenders": found,
            "best": best,
            "default": default,
            "default_behind_best": behind,
        }
        shown = "   ".join(f"{n} {v['median_ms']:8.1f} ({v['tokens_per_s']:,.0f})" for n, v in found.items())
        print(f"{title:52}{shown}   best {best}, default ({default}) {behind:+.1%}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
