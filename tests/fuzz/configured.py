"""Seeds of two files: a config in JSON, and the safetensors file that it describes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save

from tests.fuzz.mutate import flip
from tests.fuzz.targets.safetensors import TARGET as HEADER


def joined(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The length of the config, the config, and a safetensors file."""
    return _joined(json.dumps(config).encode(), save(dict(tensors)))


def parted(data: bytes) -> tuple[bytes, bytes]:
    """(config, safetensors file)"""
    length = struct.unpack_from("<I", data)[0]
    return data[4 : 4 + length], data[4 + length :]


def mutated(rng: random.Random, seeds: Sequence[bytes], of_config: float) -> bytes:
    """One of `seeds` with a change, which is in the config with probability `of_config`."""
    config, file = parted(rng.choice(seeds))
    if rng.random() < of_config:
        config = flip(rng, config)
    else:
        file = HEADER.mutate(rng, [file])
    return _joined(config, file)


def _joined(config: bytes, file: bytes) -> bytes:
    return struct.pack("<I", len(config)) + config + file
