"""Weights for checking graphs when there is no checkpoint: random, reproducible, and adversarial.

Adversarial means that nothing which a wrong rewrite could drop is neutral: selection biases and norms differ from 0 and
1, router logits are spread enough to select unevenly, experts are large enough for clamps to act.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

import torch

from moec.compiler.program import LazyWeight, Program, Role

# Standard deviation of `weight @ x` for a normalised x, by role: how adversarial the weights are.
_SPREAD = {Role.ROUTER: 1.5, Role.EXPERT: 1.5, Role.SHARED: 1.2}


def adversarial_weights(
    shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, Role], *, seed: int = 0
) -> dict[str, LazyWeight]:
    """A float32 weight of each shape, made when it is loaded; equal seeds and names give equal weights.

    Vectors of norms are spread around 1, other vectors (biases) around 0 by 0.3. Matrices are normal with a deviation
    that keeps activations of order one: spread / sqrt(inputs), the inputs being the last dimension, or the middle one
    of stacked experts.
    """
    return {
        name: LazyWeight(tuple(shape), torch.float32, _maker(name, tuple(shape), roles.get(name, Role.OTHER), seed))
        for name, shape in shapes.items()
    }


def with_random_weights(program: Program) -> Program:
    """The program with adversarial weights of its shapes, by its roles; constants and caches stay as they are."""
    kept = (Role.CONSTANT, Role.CACHE)
    shapes = {n: w.shape for n, w in program.weights.items() if program.roles[n] not in kept}
    # before any pass only our decoders know their norms by role: a vector that scales lies around 1
    roles = {
        n: Role.NORM if program.roles[n] == Role.OTHER and len(shape) == 1 and "norm" in n else program.roles[n]
        for n, shape in shapes.items()
    }
    return replace(program, weights={**program.weights, **adversarial_weights(shapes, roles)})


def _maker(name: str, shape: tuple[int, ...], role: Role, seed: int):  # type: ignore[no-untyped-def]
    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        value = torch.randn(shape, generator=generator)
        if role == Role.NORM:
            return 1.0 + 0.2 * value
        if len(shape) < 2:
            return 0.3 * value
        inputs = shape[-2] if len(shape) == 3 else shape[-1]
        return value * (_SPREAD.get(role, 1.0) * max(inputs, 1) ** -0.5)

    return make
