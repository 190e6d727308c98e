"""Checkpoints in other people's formats of codes, packed here by what those formats are documented to be.

Every packer takes codes and scales of a linear [N, K] and gives (stored tensors by the end of their names, the values
that a reader of the format computes, float32). Nothing of moec is used: bits go into words by arithmetic on integers,
one code at a time, so that a mistake of order in the reader is not made here again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.sources import field_checkpoints as healthy

Packed = tuple[dict[str, Tensor], Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs in the nibbles of a word, the lowest first


@dataclass
class Random:
    """Codes q [N, K] (unsigned), zero points [N, G], scales [N, G] and the group of each input."""

    rows: int
    width: int
    bits: int = 4
    group: int = 32
    zero_points: bool = False
    scale_type: torch.dtype = torch.float16
    seed: int = 0
    group_of: np.ndarray | None = None
    q: np.ndarray = field(init=False)
    zeros: np.ndarray = field(init=False)
    scales: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        groups = -(-self.width // self.group)
        self.q = rng.integers(0, 1 << self.bits, (self.rows, self.width))
        middle = 1 << (self.bits - 1)
        self.zeros = rng.integers(1, 1 << self.bits, (self.rows, groups)) if self.zero_points else (
            np.full((self.rows, groups), middle)
        )  # fmt: skip
        spread = 2.0 / (1 << self.bits) / self.width**0.5
        self.scales = torch.from_numpy(rng.uniform(0.5, 1.5, (self.rows, groups)) * spread).to(self.scale_type)
        if self.group_of is None:
            self.group_of = np.arange(self.width) // self.group

    @property
    def values(self) -> Tensor:
        steps = torch.from_numpy(self.q - self.zeros[:, self.group_of]).float()
        return steps * self.scales.float()[:, torch.from_numpy(self.group_of)]


def words(values: np.ndarray, bits: int) -> Tensor:
    """int32 [.., ceil(L * bits / 32)] of unsigned values [.., L], the first in the lowest bits."""
    per = 32 // bits
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per)])
    grouped = padded.reshape(*padded.shape[:-1], -1, per).astype(np.uint64)
    packed = sum(grouped[..., i] << np.uint64(bits * i) for i in range(per))
    return torch.from_numpy(np.asarray(packed).astype(np.uint32).view(np.int32).copy())


def gptq(made: Random, *, less: int = 1) -> Packed:
    return {
        "qweight": words(made.q.T.copy().T, made.bits).T.contiguous(),
        "qzeros": words(made.zeros.T - less, made.bits),
        "scales": made.scales.t().contiguous(),
        "g_idx": torch.from_numpy(np.asarray(made.group_of).astype(np.int32)),
    }, made.values


def awq(made: Random) -> Packed:
    def shuffled(values: np.ndarray) -> Tensor:
        """[.., N] -> words, each of 8 outputs in AWQ's order."""
        eights = values.reshape(values.shape[0], -1, 8)
        return words(np.stack([eights[..., i] for i in AWQ_ORDER], -1).reshape(values.shape), 4)

    return {
        "qweight": shuffled(made.q.T.copy()),
        "qzeros": shuffled(made.zeros.T.copy()),
        "scales": made.scales.t().contiguous(),
    }, made.values


def pack_quantized(made: Random) -> Packed:
    tensors = {
        "weight_packed": words(made.q, made.bits),
        "weight_scale": made.scales,
        "weight_shape": torch.tensor([made.rows, made.width]),
    }
    if made.zero_points:
        tensors["weight_zero_point"] = words(made.zeros.T, made.bits).T.contiguous()
    return tensors, made.values


def int_quantized(made: Random) -> Packed:
    codes = torch.from_numpy(made.q - 128).to(torch.int8)
    return {"weight": codes, "weight_scale": made.scales}, made.values


def fp8_blocks(rows: int, width: int, block: int, seed: int, *, scale: str = "weight_scale_inv") -> Packed:
    """Blocks of `block` rows and columns; the last ones are cut where the weight ends."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randn(rows, width, generator=generator) * 100).to(torch.float8_e4m3fn)
    shape = (-(-rows // block), -(-width // block))
    scales = torch.rand(shape, generator=generator) / (100 * width**0.5)
    spread = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :width]
    return {"weight": codes, scale: scales}, codes.float() * spread


def write(
    folder: Path,
    config: dict[str, Any],
    quantization_config: dict[str, Any],
    pack: Callable[[int, int, int], Packed],
) -> Path:
    """`folder`/coded and `folder`/floats: a random model whose linears `pack(rows, width, seed)` gives, and the same
    model with their values as floats."""
    tensors = healthy.healthy(folder / "floats", config)
    stored: dict[str, Tensor] = {}
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        if not healthy.is_linear(name, tensor):
            stored[name] = tensor
            continue
        packed, tensors[name] = pack(*tensor.shape, seed)
        stored |= {f"{name.removesuffix('weight')}{end}": t for end, t in packed.items()}
    healthy.save(folder / "floats", tensors)
    coded = folder / "coded"
    coded.mkdir()
    healthy.save(coded, stored)
    raw = json.loads((folder / "floats" / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization_config}))
    return coded
