"""Attention over INT8 caches: a reference computes it as the artifact's target does, in integers or in floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec.analysis.verify.artifact import computed_scheme, layer_reference
from moec.analysis.verify.foreign import GraphReference, before_target
from moec.analysis.verify.interpret import WeightCache
from moec.analysis.verify.metrics import row_errors
from moec.analysis.verify.rounding import attention_of
from moec.checkpoints import open_store, synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.spec import Spec
from moec.compiler.target import find_target
from moec.compiler.trust import trusting

# One layer and float activations: nothing but the cache rounds, and no error of a layer before moves a key to another
# code. What is left between right sides is the order of fp32 sums; between wrong ones, 2^-16 of queries and weights.
MODEL = {
    "architecture": "mobilellm", "layers": 1, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32,
    "vocab_size": 300, "context": 320, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "ffn_width": 96,
}  # fmt: skip
QUANTIZATION = {"weights": "int4", "group_size": 32, "activations": "fp32", "kv_cache": "int8"}
TARGETS = {"xnnpack": {}, "onnx": {}, "metal": {"dtype": "float32"}, "mlir": {"max_tokens": 320}}
NEEDS = {"xnnpack": "torch", "onnx": "onnxruntime", "metal": "mlx.core", "mlir": "torch_mlir"}
IDS = np.random.default_rng(3).integers(0, 300, 300).tolist()  # more than one chunk of 256 positions


@pytest.fixture(scope="module", params=["xnnpack", "onnx", "metal", pytest.param("mlir", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Spec, Path]:
    pytest.importorskip(NEEDS[request.param], reason=f"needs the extra of the target {request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    raw = {"name": "a", "model": MODEL, "quantization": QUANTIZATION, "targets": TARGETS}
    spec = Spec.model_validate(raw)
    checkpoint = synthesize(spec, folder / "checkpoint", seed=6)
    return build.compile(spec, target=request.param, checkpoint=checkpoint, out=folder / "artifact"), spec, checkpoint


def test_the_references_compute_it_as_the_target_does(
    compiled: tuple[Artifact, Spec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, spec, checkpoint = compiled
    target = find_target(artifact.manifest.target)
    assert target.integer_attention == (target.name == "xnnpack")
    store, program = open_store(checkpoint, spec.model), build.program_and_passes  # type: ignore[arg-type]
    last = before_target(*program(spec, store, target.name))
    with trusting(True), build.load_exact(artifact) as session:  # compiled here
        found = session.prefill(IDS, "all")
    errors = {}
    for integers in (True, False):
        monkeypatch.setattr(type(target), "integer_attention", integers)
        own = layer_reference(artifact, spec, store, computed_scheme(artifact.manifest, spec))
        assert own is not None
        graph = GraphReference(last, WeightCache(), attention_of(target))
        for name, reference in (("own", own), ("graph", graph)):
            logits = reference.run({"": IDS})[""]
            errors[name, integers] = float(np.median(row_errors(logits, found)))
    right = target.name == "xnnpack"
    for name in ("own", "graph"):
        assert errors[name, right] < errors[name, not right] / 3, errors
        assert errors[name, right] < 1e-5, errors
