"""A LoRA adapter: its configuration and its tensors, read and merged into a small model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from moec.compiler.errors import UserError
from tests.fuzz.configured import joined, mutated, parted

_Q = "base_model.model.model.layers.0.self_attn.q_proj"
_EXPERTS = "base_model.model.model.layers.0.mlp.experts"


def _adapter(tensors: dict[str, torch.Tensor], **config: object) -> bytes:
    """An adapter_config.json and a safetensors file."""
    return joined({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}, tensors)


class Lora:
    name = "lora"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        linear = {f"{_Q}.lora_A.weight": torch.ones(2, 8), f"{_Q}.lora_B.weight": torch.ones(6, 2)}
        stacked = {f"{_EXPERTS}.lora_A.weight": torch.ones(6, 8), f"{_EXPERTS}.lora_B.weight": torch.ones(4, 6)}
        return [
            _adapter(linear, rank_pattern={"q_proj": 2}, alpha_pattern={"self_attn.q_proj": 3}),
            _adapter({**linear, f"{_Q}.lora_magnitude_vector": torch.ones(6)}, use_dora=True),
            _adapter(stacked, use_rslora=True),
        ]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        return mutated(rng, seeds, 0.4)

    def run(self, data: bytes, folder: Path) -> None:
        from moec.checkpoints.lora import read_adapter

        config, file = parted(data)
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter_model.safetensors").write_bytes(file)
        try:
            found = read_adapter(folder)
            found.about()
            found.digest()
            for update in found.updates:
                if update.stacked == 1:
                    update.merged(torch.zeros(update.shape))
                else:
                    outputs, inputs = update.shape
                    update.merged_stack(torch.zeros(update.stacked, outputs, inputs), first=False)
                    update.merged_stack(torch.zeros(update.stacked, inputs, outputs), first=True)
        except UserError:
            return


TARGET = Lora()
