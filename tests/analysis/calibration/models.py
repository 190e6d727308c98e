"""A small mixture at stage FUSED, with random weights, and token ids to run it on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moec.analysis.verify.weights import adversarial_weights
from moec.compiler.pipeline import run_passes
from moec.compiler.program import LazyWeight, Program
from moec.compiler.source import NamedWeights
from moec.compiler.spec import Spec
from moec.compiler.spec.sources import source_of
from moec.passes.pipelines import fusion
from moec.sources.decoder.layout import weight_layout

MODEL: dict[str, Any] = {
    "architecture": "mobilemoe",
    "layers": 2,
    "d_model": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 97,
    "context": 64,
    "norm_eps": 1.0e-5,
    "qk_norm": True,
    "tied_embeddings": True,
    "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {
        "experts": 6,
        "top_k": 2,
        "expert_width": 32,
        "shared_width": 64,
        "score": "sigmoid",
        "selection_bias": True,
        "normalize": True,
        "scale": 1.5,
    },
    "bos_id": 0,
    "eos_ids": [1],
}
TEXTS = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (37, 8, 1, 64)]


def spec_of(model: Mapping[str, Any] | None = None, **quantization: Any) -> Spec:
    return Spec.model_validate(
        {
            "name": "small",
            "model": {**MODEL, **(model or {})},
            "quantization": {"weights": "int4", **quantization},
            "targets": ["xnnpack"],
        }
    )


def weights_of(spec: Spec, *, seed: int = 0) -> dict[str, LazyWeight]:
    layout = weight_layout(spec.model)  # type: ignore[arg-type]
    roles = {name: info.role for name, info in layout.items()}
    return adversarial_weights({name: info.shape for name, info in layout.items()}, roles, seed=seed)


def float_program(model: Mapping[str, Any] | None = None, *, seed: int = 0) -> Program:
    spec = spec_of(model)
    weights = NamedWeights(weights_of(spec, seed=seed))
    program = source_of(spec.model).export(spec, weights, max_tokens=32)
    return run_passes(program, fusion())
