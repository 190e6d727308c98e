"""A model of more than 2 GB: beyond what one protobuf can hold, exported and run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the onnx extra: pip install 'moec[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the onnx extra: pip install 'moec[onnx]'")

import onnx

from moec.cli import main as cli
from moec.compiler import build
from moec.compiler.artifact import Artifact
from tests.targets.metal_models import Shape, make_weights, program_of

LARGE = Path(__file__).parents[2] / "specs" / "models" / "mobilemoe-l.yaml"
LIMIT = 1 << 31
# runs its arguments and prints the peak memory of that process: in kB, and in bytes on macOS
PEAK = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


@pytest.mark.slow
def test_mobilemoe_l(tmp_path: Path) -> None:
    """3 GB of INT4: compiled in little memory, valid by path, and run once by ONNX Runtime."""
    spec = tmp_path / "l.yaml"
    spec.write_text(LARGE.read_text().replace("targets: [xnnpack]", "targets: [onnx]"))
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "artifact"
    arguments = ["checkpoint", "synthesize", str(spec), "--out", str(checkpoint), "--qat", "--quiet"]
    assert cli.run(arguments) == 0
    command = [sys.executable, "-m", "moec", "compile", str(spec), "--quiet"]
    # started by a small program: a process remembers the peak of the one that starts it, and this one may be large
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *command, "--checkpoint", str(checkpoint), "--out", str(out)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    peak = int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    assert 1e8 < peak < 1e9, "weights are streamed: one expert stack at a time"
    artifact = Artifact.open(out)
    assert artifact.path("model.onnx.data").stat().st_size > LIMIT
    assert artifact.path("model.onnx").stat().st_size < 1 << 24
    onnx.checker.check_model(str(artifact.path("model.onnx")))
    with build.load(artifact) as session:  # type: ignore[attr-defined]
        logits = session.prefill([128000, 791, 6864])
        again = session.decode(int(logits.argmax()))
    assert np.isfinite(logits).all()
    assert np.isfinite(again).all()


def test_the_file_never_passes_through_protobuf(tmp_path: Path) -> None:
    """Offsets beyond 2 GB and 4 GB are plain numbers: the graph of a model is as small whatever its weights weigh."""
    from moec.targets.onnx.lower import build as build_model
    from moec.targets.onnx.options import Options

    program = program_of(make_weights(Shape(layers=1, width=32, heads=2, kv_heads=1, head=16, vocab=37, context=24)))
    name = next(n for n in program.weights if n.endswith("w13_codes"))
    small, _ = build_model(program, Options())
    stored = program.weights[name]
    shape = (stored.shape[0] * (1 << 22), *stored.shape[1:])
    grown = replace(program, weights={**program.weights, name: replace(stored, shape=shape)})
    large, c = build_model(grown, Options())
    assert c.weights.bytes > 2 * LIMIT
    last = large.graph.initializer[-1]
    offsets = [int(e.value) for i in large.graph.initializer for e in i.external_data if e.key == "offset"]
    assert max(offsets) > 2 * LIMIT
    assert last.data_location == onnx.TensorProto.EXTERNAL
    assert abs(large.ByteSize() - small.ByteSize()) < 10_000
