"""The trained MoE block: routing in float32, dispatch, experts, and the sums that balancing and the z-loss need.

    s = sigmoid(W x);  chosen = top-k of s + bias;  w_k = scale * s_k / sum of the chosen s;  y = sum_k w_k expert_k(x)

The bias changes the selection only and is updated by load, not by gradients (Wang et al. 2024, arXiv 2408.15664). The
z-loss is the mean of logsumexp(W x)^2 (Zoph et al. 2022, arXiv 2202.08906, Eq. 5).

N tokens, D d_model, E experts, F expert width, K experts per token, R rows; B rows of T tokens of text, N = B * T.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Role
from moec.sources.decoder.config import MoeConfig
from moec.training.dispatch import from_rows, plan, to_rows
from moec.training.experts import Compute, expert_products
from moec.training.locality import locality
from moec.training.parts import GatedMlp, as_operand, parameter
from moec.training.rounding import Rounding, round_to_bfloat16


class Exchange(Protocol):
    """Carries rows to the processes that hold their experts and their outputs back (`training/parallel.py`)."""

    def __call__(self, experts: Experts, rows_RD: Tensor, counts_E: Tensor) -> Tensor: ...


class Router(nn.Module):
    """Logits in float32, whatever autocast says: bfloat16 would change which experts are chosen."""

    def __init__(self, d_model: int, experts: int) -> None:
        super().__init__()
        self.weight = parameter(experts, d_model)

    def forward(self, x_ND: Tensor) -> Tensor:
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.float(), self.weight.float())


class Experts(nn.Module):
    """The experts of a layer that this process holds, stacked: all of them, or an even share."""

    def __init__(self, d_model: int, moe: MoeConfig, rounding: Rounding | None, compute: Compute) -> None:
        super().__init__()
        self.gate_up_proj = parameter(moe.experts, d_model, 2 * moe.expert_width)
        self.down_proj = parameter(moe.experts, moe.expert_width, d_model)
        self.compute = compute
        self.rounding = rounding.weight(Role.EXPERT) if rounding else None
        self._round_input = rounding.activations(Role.EXPERT) if rounding else None

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if self.rounding is not None:
            up, down = self.rounding(up), self.rounding(down)
        if self._round_input is not None:
            rows_RD = self._round_input(rows_RD)
        if torch.is_autocast_enabled(rows_RD.device.type):
            dtype = torch.get_autocast_dtype(rows_RD.device.type)
            rows_RD, up, down = rows_RD.to(dtype), up.to(dtype), down.to(dtype)
        return expert_products(self.compute, rows_RD, counts_E, up, down, self._round_input)


class MoeBlock(nn.Module):
    """Routed experts plus the shared expert. See `training/model.py` for `capacity_factor` and `local`."""

    expert_bias: Tensor | None
    usage: Tensor

    def __init__(self, d_model: int, moe: MoeConfig, rounding: Rounding | None, compute: Compute) -> None:
        super().__init__()
        self.moe = moe
        self.capacity_factor: float | None = None
        self.local = False
        self.exchange: Exchange | None = None
        self.router = Router(d_model, moe.experts)
        self.register_buffer("expert_bias", torch.zeros(moe.experts) if moe.selection_bias else None)
        # the experts' shares of the selections of the last steps; a state of training with a loss of locality
        self.register_buffer("usage", torch.full((moe.experts,), 1 / moe.experts), persistent=False)
        self.experts = Experts(d_model, moe, rounding, compute)
        self.shared_expert = GatedMlp(d_model, moe.shared_width, Role.SHARED, rounding) if moe.shared_width else None
        self._stored = rounding is not None

    def route(self, logits_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what experts are selected by, [N, E]; the selected ones, int64 [N, K]; combine weights, float32 [N, K])."""
        scores_NE = values_NE = logits_NE.sigmoid()
        if self.expert_bias is not None:
            values_NE = scores_NE + (round_to_bfloat16(self.expert_bias) if self._stored else self.expert_bias)
        indices_NK = values_NE.detach().topk(self.moe.top_k, dim=-1).indices
        weights_NK = scores_NE.gather(-1, indices_NK)
        if self.moe.normalize:
            weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        return values_NE, indices_NK, weights_NK * self.moe.scale

    def forward(
        self, x_ND: Tensor, ends_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(y [N, D], sum of squared logsumexp [], load int64 [E], dropped pairs int64 [], both sums of `locality`).

        ends_BT: where windows of the text end (`window_ends`); without it the last two are 0.
        """
        logits_NE = self.router(x_ND)
        values_NE, indices_NK, weights_NK = self.route(logits_NE)
        planned = plan(indices_NK, weights_NK, self.moe.experts, self.capacity_factor if self.training else None)
        if self._stored:  # experts round their rows in float32
            rows_RD, shared_ND = to_rows(x_ND, planned), x_ND
        else:
            shared_ND = as_operand(x_ND)
            rows_RD = to_rows(shared_ND, planned)
        if self.exchange is None:
            rows_RD = self.experts(rows_RD, planned.counts_E)
        else:
            rows_RD = self.exchange(self.experts, rows_RD, planned.counts_E)
        y_ND = from_rows(rows_RD, weights_NK, planned)
        if self.shared_expert is not None:
            y_ND = y_ND + self.shared_expert(shared_ND)
        z = logits_NE.logsumexp(-1).square().sum()
        dropped = planned.load_E.sum() - planned.counts_E.sum()
        if ends_BT is None:
            return y_ND, z, planned.load_E, dropped, torch.zeros_like(z), torch.zeros_like(dropped)
        spread, distinct = locality(values_NE, indices_NK, ends_BT, self.usage, with_loss=self.local and self.training)
        return y_ND, z, planned.load_E, dropped, spread, distinct
