"""Rotary position tables, with llama3 frequency scaling.

Shape suffixes: S positions (the context), P pairs (head_dim / 2).
"""

from __future__ import annotations

import math

import torch

from moec.sources.decoder.config import RopeConfig, RopeScaling


def rope_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angular frequency of each rotary pair, radians per token, float32 [head_dim / 2]."""
    exponents_P = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies_P = 1.0 / (rope.theta**exponents_P)
    return frequencies_P if rope.scaling is None else _scale_llama3(frequencies_P, rope.scaling)


def _scale_llama3(frequencies_P: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """llama3 scaling: short waves stay, long waves are divided by `factor`, those between are interpolated.

    With low_freq_factor == high_freq_factor there is nothing between, and the interpolation, which divides by their
    difference, must not be reached.
    """
    original, low, high = scaling.original_context, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths_P = 2.0 * math.pi / frequencies_P
    slow_P = frequencies_P / scaling.factor
    if low == high:
        return torch.where(wavelengths_P > original / low, slow_P, frequencies_P)
    smooth_P = (original / wavelengths_P - low) / (high - low)
    between_P = (1.0 - smooth_P) * slow_P + smooth_P * frequencies_P
    scaled_P = torch.where(wavelengths_P > original / low, slow_P, between_P)
    return torch.where(wavelengths_P < original / high, frequencies_P, scaled_P)


def rope_tables(rope: RopeConfig, context: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each float32 [context, head_dim / 2]."""
    positions_S = torch.arange(context, dtype=torch.int64).to(torch.float32)
    angles_SP = torch.outer(positions_S, rope_frequencies(rope, head_dim))
    return angles_SP.cos(), angles_SP.sin()
