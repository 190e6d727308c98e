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

# experts up to which a loop is as fast on the CPU: in bfloat16 at 128 (not at 256), in float32 at 16 (not at 60)
_FEW = {torch.bfloat16: 128, torch.float32: 32}


def chosen(compute: Compute, experts: int, device: str, dtype: torch.dtype) -> Compute:
    """What `auto` stands for: the faster of loop and grouped on the CPU, grouped on anything else."""
    if compute != "auto":
        return compute
    return "loop" if device == "cpu" and experts <= _FEW.get(dtype, 0) else "grouped"


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

    compute = chosen(compute, counts_E.shape[0], rows_RD.device.type, rows_RD.dtype)
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
    counts = counts_E.tolist()
    pieces = rows_RD.split(counts)
    if rows_RD.dtype == torch.bfloat16 and rows_RD.device.type == "cpu":
        pieces = [F.pad(x, (0, 0, 0, few_shapes(len(x)) - len(x))) for x in pieces]
    # unbind once: indexing each expert would add a gradient of the whole stack for every one of them
    products = [hidden(x @ u) @ d for x, u, d in zip(pieces, up.unbind(0), down.unbind(0), strict=True)]
    return torch.cat([y[:count] for y, count in zip(products, counts, strict=True)])


def few_shapes(rows: int) -> int:
    """The number of rows that a product of `rows` rows is computed with: at most 16 or an eighth more.

    On the CPU torch compiles a kernel for every shape of a product in bfloat16, which takes ten times as long as a
    product of a small expert, and experts get another number of rows in every layer of every step. With eight sizes for
    each power of two the kernels are there already.
    """
    step = max(16, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def _padded(rows_RD: Tensor, counts_E: Tensor, up: Tensor, down: Tensor, hidden: Rounding) -> Tensor:
    """Every expert gets the room of the fullest, so that one bmm does all."""
    experts, most = counts_E.shape[0], int(counts_E.max())
    starts_E = counts_E.cumsum(0) - counts_E
    slot_C = torch.arange(most, device=rows_RD.device)
    row_EC = (starts_E.unsqueeze(1) + slot_C).clamp(max=rows_RD.shape[0] - 1)
    x_ECD = rows_RD[row_EC.flatten()].view(experts, most, -1)
    y_ECD = torch.bmm(hidden(torch.bmm(x_ECD, up)), down)
    return y_ECD.flatten(0, 1)[(slot_C < counts_E.unsqueeze(1)).flatten()]
