"""Shared by the operators with recurrent states: a state counts as zero where a sequence begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.compiler.ops.call import require


def begins(op: str, start_pos: Tensor) -> bool:
    """Whether a call begins a sequence, upon which its state counts as zero. ValueError for a negative position."""
    start = int(start_pos.reshape(()).item())
    require(start >= 0, op, f"start_pos is {start}")
    return start == 0


def before(op: str, state: Tensor, start_pos: Tensor) -> Tensor:
    """What a call goes on from."""
    return torch.zeros_like(state) if begins(op, start_pos) else state.clone()


def sized(op: str, name: str, value: Any, shape: tuple[Any, ...]) -> None:
    """ValueError unless `value` has the static sizes of `shape`; None stands for any, the token count among them."""
    require(value.dim() == len(shape), op, f"{name} must have {len(shape)} dimensions")
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            require(value.shape[axis] == size, op, f"{name} has {value.shape[axis]} along {axis}, not {size}")
