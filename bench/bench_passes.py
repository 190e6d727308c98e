"""How long the passes take on a model of 64 layers with 256 experts, and whether that is linear in the layers.

    python bench/bench_passes.py [--layers 64] [--experts 256] [--limit 10]

Shapes only, no weight is read; `total` and `export` are CPU seconds of this process, those by pass are wall. The limit
is for all passes of the largest model together, canonicalize to quantize. The time by node of the largest model may be
at most 1.5 times that of the smallest: linear, but for noise. Exit status 1 when one is missed.
"""

from __future__ import annotations

import argparse
import sys
import time

from moec.compiler.pipeline import PipelineLog, run_passes
from moec.compiler.spec.model import Spec
from moec.passes.pipelines import pipeline
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.export import export_decoder


def spec(layers: int, experts: int) -> Spec:
    """A MobileMoE of tiny widths: passes see nodes, not elements."""
    model = {
        "architecture": "mobilemoe", "layers": layers, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32,
        "vocab_size": 512, "context": 256, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
        "moe": {"experts": experts, "top_k": 8, "expert_width": 32, "shared_width": 64, "scale": 2.5},
    }  # fmt: skip
    return Spec.model_validate({"name": "bench", "model": model, "quantization": {"weights": "int4"}})


def measure(layers: int, experts: int) -> dict[str, float]:
    """Seconds by pass, `total` and `export`, and the number of `nodes`."""
    what = spec(layers, experts)
    assert isinstance(what.model, DecoderConfig)
    started = time.process_time()
    program = export_decoder(what.model, what.name, None)
    exported = time.process_time()
    log = PipelineLog()
    done = run_passes(program, pipeline(what.quantization), log=log)
    total = time.process_time() - exported
    fused = sum("fused_moe_q" in str(n.target) for n in done.graph.nodes)
    assert fused == layers, f"{fused} of {layers} blocks were fused"
    seconds = {r.name: r.seconds for r in log.records}
    nodes = len(program.graph.nodes)
    return {"layers": layers, "nodes": nodes, **seconds, "total": total, "export": exported - started}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds for all passes of the largest model")
    options = parser.parse_args()
    measure(1, 8)  # the first export and the first fake values load much of torch
    rows = [measure(max(2, options.layers // part), options.experts) for part in (8, 4, 2, 1)]
    width = max(map(len, rows[0]))
    for key in rows[0]:
        cells = (f"{row[key]:10.2f}" if isinstance(row[key], float) else f"{row[key]:10d}" for row in rows)
        print(f"{key:{width}}  " + "".join(cells))
    small, large = (row["total"] / row["nodes"] for row in (rows[0], rows[-1]))
    total, nodes = rows[-1]["total"], rows[-1]["nodes"]
    print(
        f"{options.layers} layers, {options.experts} experts, {nodes} nodes: {total:.2f} s for all passes (limit "
        f"{options.limit:g}); a node costs {large / small:.2f} x what it does in a model of an eighth"
    )
    return int(total > options.limit or large > 1.5 * small)


if __name__ == "__main__":
    sys.exit(main())
