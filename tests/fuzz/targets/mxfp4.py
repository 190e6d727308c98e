"""Experts in MXFP4: blocks and scales of a safetensors file under a config.json that declares them, read as codes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from moec.compiler.errors import UserError
from tests.fuzz.targets.safetensors import TARGET as HEADER

_CONFIG = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
_EXPERTS = "model.layers.0.mlp.experts"


class Mxfp4:
    name = "mxfp4"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        rng = np.random.default_rng(0)
        found = []
        for shape in ((2, 4, 1, 16), (1, 2, 3, 16)):
            blocks = rng.integers(0, 256, shape, dtype=np.uint8)
            scales = rng.integers(110, 140, shape[:-1], dtype=np.uint8)
            pair = {f"{_EXPERTS}.down_proj_blocks": blocks, f"{_EXPERTS}.down_proj_scales": scales}
            found.append(save({**pair, "model.norm.weight": np.ones(4, np.float32)}))
        return found

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        return HEADER.mutate(rng, seeds)

    def run(self, data: bytes, folder: Path) -> None:
        from moec.sources.transformers_model import TransformersStore

        (folder / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        (folder / "model.safetensors").write_bytes(data)
        try:
            store = TransformersStore(folder)
            for name, entry in store._entries.items():
                store.weight(name, entry.shape)
        except UserError:
            return


TARGET = Mxfp4()
