"""Cross entropy of a language model without storing its logits: the gradient is computed for a piece of rows at a time.

The logits of N tokens over V words are most of a small model's memory and, in separate passes, a third of its time.
Here a piece of rows is multiplied, normalised, turned into its gradient in place and multiplied back. The sums are
those of the plain form in another order.

N tokens, D d_model, V vocabulary, C rows of a piece.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 512  # of a piece: with a vocabulary of 8,192 its logits stay in cache


def token_losses(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, mask_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sums, float32 []: of mask * -log softmax(h head^T)[target], and of the mask where the target is the likeliest.

    The second is 0 while gradients are recorded. Under autocast the products are in its type, all else in float32.
    """
    if torch.is_autocast_enabled(h_ND.device.type):
        dtype = torch.get_autocast_dtype(h_ND.device.type)
        h_ND, head_VD = h_ND.to(dtype), head_VD.to(dtype)
    if torch.is_grad_enabled() and h_ND.requires_grad:
        return _Losses.apply(h_ND, head_VD, targets_N, mask_N), torch.zeros((), device=h_ND.device)
    nll, hits = torch.zeros((), device=h_ND.device), torch.zeros((), device=h_ND.device)
    for h, targets, mask in zip(*(t.split(_ROWS) for t in (h_ND, targets_N, mask_N)), strict=True):
        logits = F.linear(h, head_VD).float()
        nll += (F.cross_entropy(logits, targets, reduction="none") * mask).sum()
        hits += ((logits.argmax(-1) == targets) * mask).sum()
    return nll, hits


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, mask_N: Tensor) -> Tensor:
        nll = torch.zeros((), device=h_ND.device)
        grad_h = torch.zeros_like(h_ND)
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(h_ND.device.type, enabled=False):
            for first in range(0, h_ND.shape[0], _ROWS):
                part = slice(first, first + _ROWS)
                h_CD, target_C1, mask_C1 = h_ND[part], targets_N[part].unsqueeze(1), mask_N[part].unsqueeze(1)
                x_CV = F.linear(h_CD, head_VD).float()
                lse_C1 = x_CV.logsumexp(-1, keepdim=True)
                nll += ((lse_C1 - x_CV.gather(1, target_C1)) * mask_C1).sum()
                x_CV.sub_(lse_C1).exp_()  # the softmax; less one at the target, it is the gradient
                x_CV.scatter_(1, target_C1, x_CV.gather(1, target_C1) - 1)
                grad_CV = x_CV.mul_(mask_C1).to(h_ND.dtype)
                grad_h[part] = grad_CV @ head_VD
                if grad_head is not None:
                    grad_head += grad_CV.T @ h_CD
        ctx.save_for_backward(grad_h, None if grad_head is None else grad_head.to(head_VD.dtype))
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        return *_gradients(ctx, grads[0]), None, None


@dataclass(frozen=True)
class Taught:
    """What a teacher says of the same rows: its last hidden states [N, D'] and head [V, D'], and the losses' weights.

    lm_weight, kl_weight: of the cross entropy of the text and of the divergence, which is at `temperature`.
    """

    h_ND: Tensor
    head_VD: Tensor
    lm_weight: float
    kl_weight: float
    temperature: float


@dataclass(frozen=True)
class Lesson:
    """What a teacher computed for some tokens: of each layer what its feed-forward block read and gave, [B, T, D]
    (empty if blocks are not learnt), and what its predictions are (None if they are not)."""

    blocks: tuple[tuple[Tensor, Tensor], ...]
    taught: Taught | None


def taught_losses(
    h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, mask_N: Tensor, taught: Taught
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, float32 []: (the loss to minimise, mask * -log p(target), mask * t^2 KL(teacher || model)).

    The loss is the two sums times their weights; gradients flow through it alone. Both predictions of the KL
    divergence are at temperature t; it is 0 where they are equal.
    """
    if torch.is_autocast_enabled(h_ND.device.type):
        dtype = torch.get_autocast_dtype(h_ND.device.type)
        h_ND, head_VD = h_ND.to(dtype), head_VD.to(dtype)
        taught = replace(taught, h_ND=taught.h_ND.to(dtype), head_VD=taught.head_VD.to(dtype))
    return _TaughtLosses.apply(h_ND, head_VD, targets_N, mask_N, taught)


class _TaughtLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, mask_N: Tensor, taught: Taught
    ) -> tuple[Tensor, Tensor, Tensor]:
        nll, kld = torch.zeros((), device=h_ND.device), torch.zeros((), device=h_ND.device)
        grad_h = torch.zeros_like(h_ND)
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        t = taught.temperature
        with torch.autocast(h_ND.device.type, enabled=False):
            for first in range(0, h_ND.shape[0], _ROWS):
                part = slice(first, first + _ROWS)
                h_CD, target_C1, mask_C1 = h_ND[part], targets_N[part].unsqueeze(1), mask_N[part].unsqueeze(1)
                x_CV, wanted_CV = F.linear(h_CD, head_VD).float(), F.linear(taught.h_ND[part], taught.head_VD).float()
                lse_C1 = x_CV.logsumexp(-1, keepdim=True)
                nll += ((lse_C1 - x_CV.gather(1, target_C1)) * mask_C1).sum()
                soft_CV: Tensor | None = None
                if taught.lm_weight:
                    soft_CV = (x_CV - lse_C1).exp_()
                    soft_CV.scatter_(1, target_C1, soft_CV.gather(1, target_C1) - 1)
                if t != 1.0:
                    x_CV, wanted_CV = x_CV.div_(t), wanted_CV.div_(t)
                    lse_C1 = x_CV.logsumexp(-1, keepdim=True)
                # in place: a piece is hundreds of megabytes, and each pass over it counts
                x_CV, p_CV = x_CV.sub_(lse_C1), wanted_CV.sub_(wanted_CV.logsumexp(-1, keepdim=True))  # logarithms
                apart_CV = p_CV - x_CV
                p_CV.exp_()
                kld += (torch.linalg.vecdot(p_CV, apart_CV).unsqueeze(-1) * mask_C1).sum() * t * t
                grad_CV = x_CV.exp_().sub_(p_CV).mul_(mask_C1 * (taught.kl_weight * t))
                if soft_CV is not None:
                    grad_CV.addcmul_(soft_CV, mask_C1, value=taught.lm_weight)
                operand_CV = grad_CV.to(h_ND.dtype)
                grad_h[part] = operand_CV @ head_VD
                if grad_head is not None:
                    grad_head += operand_CV.T @ h_CD
        ctx.save_for_backward(grad_h, None if grad_head is None else grad_head.to(head_VD.dtype))
        ctx.mark_non_differentiable(nll, kld)
        return taught.lm_weight * nll + taught.kl_weight * kld, nll, kld

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        return *_gradients(ctx, grads[0]), None, None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the rows, and of the head unless it is not trained, whose product is then never computed."""
    grad_h, grad_head = ctx.saved_tensors
    return grad_h * grad, None if grad_head is None else grad_head * grad
