"""GPTQ, AWQ, compressed-tensors and FP8: the tensors of a safetensors file under a config.json that declares them, read
as codes and as values."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from moec.compiler.errors import UserError
from tests.fuzz.configured import joined, mutated, parted
from tests.sources import coded_checkpoints as coded
from tests.sources.coded_checkpoints import Packed, Random

_LINEAR = "model.layers.0.self_attn.q_proj"


def _form(method: str, packed: Packed, **section: object) -> bytes:
    """A config.json and a safetensors file."""
    tensors = {f"{_LINEAR}.{end}": t.contiguous() for end, t in packed[0].items()} | {
        "model.norm.weight": torch.ones(4)
    }
    return joined({"model_type": "llama", "quantization_config": {"quant_method": method, **section}}, tensors)


class Codes:
    name = "codes"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        gptq = {"bits": 4, "group_size": 32}
        ordered = Random(8, 64, group_of=(torch.arange(64) // 32).flip(0).numpy())
        return [
            _form("gptq", coded.gptq(Random(8, 64)), **gptq, sym=True),
            _form("gptq", coded.gptq(Random(8, 64, zero_points=True)), **gptq, sym=False),
            _form("gptq", coded.gptq(ordered), **gptq, desc_act=True),
            _form("awq", coded.awq(Random(8, 64, zero_points=True)), **gptq),
            _form("compressed-tensors", coded.pack_quantized(Random(8, 64)), format="pack-quantized"),
            _form("compressed-tensors", coded.pack_quantized(Random(8, 64, zero_points=True)), format="pack-quantized"),
            _form("compressed-tensors", coded.int_quantized(Random(8, 64, bits=8, group=64)), format="int-quantized"),
            _form("fp8", coded.fp8_blocks(8, 64, 4, 0), weight_block_size=[4, 4]),
        ]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        return mutated(rng, seeds, 0.3)

    def run(self, data: bytes, folder: Path) -> None:
        from moec.checkpoints.coded import CodedEntry
        from moec.checkpoints.spec_from_config import spec_from_config
        from moec.sources.transformers_model import TransformersStore

        config, file = parted(data)
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes(file)
        with suppress(UserError):
            spec_from_config(folder)
        try:
            held = [e for e in TransformersStore(folder)._entries.values() if isinstance(e, CodedEntry)]
        except UserError:
            return
        for entry in held:
            try:
                value = entry.tensor()
                if entry.format is None:
                    continue
                codes = entry.codes().dequantize()
            except UserError:
                continue
            finite = torch.isfinite(value)  # a scale that is not does not matter where all codes are zero
            assert torch.equal(codes[finite], value[finite])


TARGET = Codes()
