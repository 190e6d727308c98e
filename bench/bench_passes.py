"""How long the passes take on a model of 64 layers with 256 experts, and whether that is linear in the layers.

    python bench/bench_passes.py [--layers 64] [--experts 256] [--limit 10]

Shapes only, no weight is read; `total`, `traced` and `export` are CPU seconds of this process, those by pass are wall.
The limit is for the passes of the largest model together, but for canonicalize (`traced`), in which torch traces the
whole graph anew. The time by layer of the largest model may be at most twice that of the smallest. Exit status 1 when
one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from moec.compiler.export import export_program
from moec.compiler.model import weight_layout
from moec.compiler.pipeline import PipelineLog, run_passes
from moec.compiler.program import LazyWeight
from moec.compiler.spec.model import DecoderConfig, Spec
from moec.passes.pipelines import pipeline


def spec(layers: int, experts: int) -> Spec:
    """A MobileMoE of tiny widths: passes see nodes, not elements."""
    model = {
        "architecture": "mobilemoe", "layers": layers, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32,
        "vocab_size": 512, "context": 256, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
        "moe": {"experts": experts, "top_k": 8, "expert_width": 32, "shared_width": 64, "scale": 2.5},
    }  # fmt: skip
    return Spec.model_validate({"name": "bench", "model": model, "quantization": {"weights": "int4"}})


def unread() -> torch.Tensor:
    raise AssertionError("a pass read a weight")


def measure(layers: int, experts: int) -> dict[str, float]:
    """Seconds by pass, `total` and `export`, and the number of `nodes`."""
    what = spec(layers, experts)
    assert isinstance(what.model, DecoderConfig)
    weights = {n: LazyWeight(i.shape, torch.float32, unread) for n, i in weight_layout(what.model).items()}
    started = time.process_time()
    program = export_program(what, weights)
    exported = time.process_time()
    log = PipelineLog()
    first, *others = pipeline(what.quantization)
    program = run_passes(program, [first], log=log)
    traced = time.process_time()
    done = run_passes(program, others, log=log)
    total = time.process_time() - traced
    fused = sum("fused_moe_q" in str(n.target) for n in done.graph.nodes)
    assert fused == layers, f"{fused} of {layers} blocks were fused"
    seconds = {r.name: round(r.seconds, 3) for r in log.records}
    nodes = len(program.graph.nodes)
    times = {"total": total, "traced": traced - exported, "export": exported - started}
    return {"layers": layers, "nodes": nodes, **seconds, **times}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds for all passes of the largest model")
    options = parser.parse_args()
    measure(1, 8)  # the first export and the first fake values load much of torch
    rows = [measure(max(2, options.layers // part), options.experts) for part in (4, 1)]
    for row in rows:
        print(json.dumps({k: round(v, 2) for k, v in row.items()}))
    small, large = (row["total"] / row["layers"] for row in rows)
    total, traced = rows[-1]["total"], rows[-1]["traced"]
    print(
        f"{options.layers} layers, {options.experts} experts: {total:.2f} s, and {traced:.2f} s in canonicalize; "
        f"by layer {large / small:.2f} x a model of a quarter"
    )
    return int(total > options.limit or large > 2 * small)


if __name__ == "__main__":
    sys.exit(main())
