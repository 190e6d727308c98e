"""Checkpoints: a folder with one safetensors file, inspected and its tensors listed."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from moec.checkpoints.folder import read_tensors
from moec.compiler.errors import UserError
from moec.sources.inspection import inspect
from tests.fuzz.mutate import flip


class Safetensors:
    name = "safetensors"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        rng = np.random.default_rng(0)
        tensors = {f"layers.{i}.weight": rng.normal(size=(3, 4)).astype(np.float32) for i in range(3)}
        return [save({**tensors, "codes": np.arange(6, dtype=np.uint8)}), save({"x": np.zeros((0, 2), np.float16)})]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = rng.choice(seeds)
        length = struct.unpack_from("<Q", data)[0]
        if rng.random() < 0.4:
            return flip(rng, data)
        header = flip(rng, data[8 : 8 + length])  # with the length that it then has
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    def run(self, data: bytes, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(data)
        try:
            inspect(folder)
            read_tensors(folder, [])
        except UserError:
            return


TARGET = Safetensors()
