"""Dispatch: which rows each expert computes, and how tokens get to their experts and results back.

A pair is a token and one of its K experts. Rows are the pairs that are computed, sorted by expert. Both ways are
gathers in forward and in backward: no scattered additions, whose order would differ from run to run.

N tokens, K experts per token, R rows, E experts, D d_model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """token_R: the token of each row. pair_R: its pair n * K + k. slots_NK: the row of each pair, 0 where dropped.

    counts_E: rows of each expert; load_E: pairs that selected it, dropped ones among them. kept_NK is None if no pair
    is dropped. Integers are int64.
    """

    token_R: Tensor
    pair_R: Tensor
    slots_NK: Tensor
    counts_E: Tensor
    load_E: Tensor
    kept_NK: Tensor | None


def capacity(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """Rows that an expert may compute: factor * N * K / E, rounded up."""
    return math.ceil(factor * tokens * top_k / experts)


@torch.no_grad()
def plan(indices_NK: Tensor, weights_NK: Tensor, experts: int, capacity_factor: float | None) -> Plan:
    """Sort the pairs by expert. With a capacity factor, an expert that is over capacity drops its lowest weights."""
    tokens, top_k = indices_NK.shape
    expert_P = indices_NK.flatten()
    load_E = torch.bincount(expert_P, minlength=experts)
    if capacity_factor is None:
        pair_R = torch.argsort(expert_P, stable=True)
        return Plan(pair_R // top_k, pair_R, _inverse(pair_R, indices_NK), load_E, load_E, None)
    # by expert, and by falling weight within an expert: weights are below 1 once divided by their largest. A weight
    # that is not finite, as in a run that diverges, counts as 0: the order must stay one by expert
    weight_P = weights_NK.flatten().double().nan_to_num(0.0, 0.0, 0.0)
    order_P = torch.argsort(expert_P.double() - weight_P / (2 * weight_P.max()).clamp(min=1e-300), stable=True)
    place_P = torch.arange(expert_P.numel(), device=expert_P.device) - (load_E.cumsum(0) - load_E)[expert_P[order_P]]
    room = capacity(tokens, top_k, experts, capacity_factor)
    pair_R = order_P[place_P < room]
    kept_P = torch.zeros_like(expert_P, dtype=torch.bool)
    kept_P[pair_R] = True
    slots_NK = _inverse(pair_R, indices_NK)
    return Plan(pair_R // top_k, pair_R, slots_NK, load_E.clamp(max=room), load_E, kept_P.view(tokens, top_k))


def _inverse(pair_R: Tensor, indices_NK: Tensor) -> Tensor:
    slots_P = torch.zeros_like(indices_NK).flatten()
    slots_P[pair_R] = torch.arange(pair_R.numel(), device=pair_R.device)
    return slots_P.view_as(indices_NK)


def to_rows(x_ND: Tensor, plan: Plan) -> Tensor:
    """The input of each row, [R, D]."""
    return _ToRows.apply(x_ND, plan)


def from_rows(y_RD: Tensor, weights_NK: Tensor, plan: Plan) -> Tensor:
    """y_n = sum_k weights[n, k] * y[row of (n, k)], [N, D] in the type of y; dropped pairs add nothing."""
    if plan.kept_NK is not None:
        weights_NK = weights_NK.masked_fill(~plan.kept_NK, 0.0)
    return _FromRows.apply(y_RD, weights_NK, plan)


def reordered(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """rows_RD[order_R] for a permutation whose inverse is at hand."""
    return _Reordered.apply(rows_RD, order_R, inverse_R)


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.inverse_R = inverse_R
        return rows_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse_R), None, None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x_ND.index_select(0, plan.token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_RD, plan = grads[0], ctx.plan
        if grad_RD.shape[0] == 0:
            return grad_RD.new_zeros(plan.slots_NK.shape[0], grad_RD.shape[1]), None
        total_ND: Tensor | None = None  # in float32, however the rows' gradients are stored
        for k in range(plan.slots_NK.shape[1]):
            part_ND = grad_RD.index_select(0, plan.slots_NK[:, k])
            if plan.kept_NK is not None:
                part_ND = part_ND.masked_fill_(~plan.kept_NK[:, k : k + 1], 0.0)
            total_ND = part_ND.float() if total_ND is None else total_ND.add_(part_ND)
        assert total_ND is not None
        return total_ND.to(grad_RD.dtype), None


class _FromRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_NK: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y_RD, weights_NK)
        weights = weights_NK.to(y_RD.dtype)
        total_ND = y_RD.new_zeros(weights.shape[0], y_RD.shape[1])
        if y_RD.shape[0] == 0:
            return total_ND
        for k in range(weights.shape[1]):
            total_ND.addcmul_(y_RD.index_select(0, plan.slots_NK[:, k]), weights[:, k : k + 1])
        return total_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_ND, plan = grads[0], ctx.plan
        y_RD, weights_NK = ctx.saved_tensors
        weight_R = weights_NK.flatten().index_select(0, plan.pair_R).to(y_RD.dtype)
        grad_RD = grad_ND.index_select(0, plan.token_R)
        # one product of each row serves all gradients of weights: rows that were dropped have none
        dots_R = (grad_RD * y_RD).sum(-1, dtype=torch.float32)
        grad_P = weights_NK.new_zeros(weights_NK.numel())
        grad_P[plan.pair_R] = dots_R.to(weights_NK.dtype)
        return grad_RD * weight_R.unsqueeze(-1), grad_P.view_as(weights_NK), None
