"""The products of the experts on rows sorted by expert, in three implementations, timed by bench_training.py.

R rows in all, E experts held here, D d_model, F expert width, C rows of the fullest expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Compute = Literal["auto", "grouped", "loop", "padded"]
COMPUTES: tuple[Compute, ...] = ("grouped", "loop", "padded")
Rounding = Callable[[Tensor], Tensor]

_ALIGNMENT = 16  # bytes that the rows of grouped_mm's operands must be a multiple of


_FEW = 32  # experts up to which a loop is at least as fast on the CPU; measured at 16 (loop) and 60 (grouped)


def chosen(compute: Compute, experts: int, device: str) -> Compute:
    """What `auto` stands for: the fastest by bench_training.py on the CPU, grouped on anything else."""
    if compute != "auto":
        return compute
    return "loop" if device == "cpu" and experts <= _FEW else "grouped"


def expert_products(
    compute: Compute,
    rows_RD: Tensor,
    counts_E: Tensor,
    gate_up_ED2F: Tensor,
    down_EFD: Tensor,
    round_hidden: Rounding | None = None,
) -> Tensor:
    """down(round(silu(gate) * up)) of every row by its expert, [R, D], differentiable.

    The rows of expert e are the counts_E[e] (int64) rows behind those of the experts before it. `round_hidden` stands
    for the rounding of the down projection's input, if there is any.
    """
    if rows_RD.shape[0] == 0:  # keeps the weights in the graph, with gradients of zero
        return rows_RD + (gate_up_ED2F.sum() + down_EFD.sum()) * 0

    def hidden(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        h = F.silu(gate) * up
        return h if round_hidden is None else round_hidden(h)

    compute = chosen(compute, counts_E.shape[0], rows_RD.device.type)
    if compute == "padded":
        return _padded(rows_RD, counts_E, gate_up_ED2F, down_EFD, hidden)
    if compute == "loop" or not _aligned(rows_RD.element_size(), *gate_up_ED2F.shape[1:], *down_EFD.shape[1:]):
        return _loop(rows_RD, counts_E, gate_up_ED2F, down_EFD, hidden)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    h_RF = hidden(F.grouped_mm(rows_RD, gate_up_ED2F, offs=ends_E))
    return F.grouped_mm(h_RF, down_EFD, offs=ends_E)


def _aligned(size: int, *widths: int) -> bool:
    return all(width * size % _ALIGNMENT == 0 for width in widths)


def _loop(rows_RD: Tensor, counts_E: Tensor, up: Tensor, down: Tensor, hidden: Rounding) -> Tensor:
    pieces = rows_RD.split(counts_E.tolist())
    # unbind once: indexing each expert would add a gradient of the whole stack for every one of them
    return torch.cat([hidden(x @ u) @ d for x, u, d in zip(pieces, up.unbind(0), down.unbind(0), strict=True)])


def _padded(rows_RD: Tensor, counts_E: Tensor, up: Tensor, down: Tensor, hidden: Rounding) -> Tensor:
    """Every expert gets the room of the fullest, so that one bmm does all."""
    experts, most = counts_E.shape[0], int(counts_E.max())
    starts_E = counts_E.cumsum(0) - counts_E
    slot_C = torch.arange(most, device=rows_RD.device)
    row_EC = (starts_E.unsqueeze(1) + slot_C).clamp(max=rows_RD.shape[0] - 1)
    x_ECD = rows_RD[row_EC.flatten()].view(experts, most, -1)
    y_ECD = torch.bmm(hidden(torch.bmm(x_ECD, up)), down)
    return y_ECD.flatten(0, 1)[(slot_C < counts_E.unsqueeze(1)).flatten()]
