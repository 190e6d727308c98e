"""Splitting one feed-forward block into a shared expert, routed experts and a router, from what it computed on text.

    dense      y = sum over all neurons f of h_f down_f
    mixture    y = shared(x) + sum over the chosen experts e of w_e expert_e(x),   w_e = k s_e / sum of the chosen s

Nothing is lost but the experts that are not chosen: weights w_e stay near 1, since s is a sigmoid of small logits. The
router predicts, by ridge regression from the block's input, the size of what each expert would add; its offset is the
selection bias. Then the second products are fitted anew, by least squares, to the dense block's output as the chosen
experts can give it, where that is nearer to the output of text that was held out.

T tokens, D width of the model, F neurons, E experts, W neurons of an expert, S neurons of the shared expert, K chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.sources.decoder.config import MoeConfig
from moec.training.upcycle.neurons import group, most_used, sizes

_HELD_OUT = 8  # one of so many tokens, the last ones, judges the refit
_RIDGE = 1e-3  # of the mean of the diagonal
_SPREAD = 0.1  # standard deviation of a logit: combine weights are within about a tenth of 1
_GROUPED = 8192  # tokens that co-activation is counted on
_ROWS = 4096  # tokens at a time
_CENTRE_ROUNDS = 10  # of k-means
_LEAST_ROWS = 2  # rows of text for each unknown of the refit


@dataclass(frozen=True)
class Block:
    """A dense block's weights: gate and up [F, D], down [D, F]."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What its second product reads, [T, F]."""
        return F.silu(x_TD @ self.gate_FD.T) * (x_TD @ self.up_FD.T)


@dataclass
class Mixture:
    """The weights of one layer in the layout of `sources/decoder`, and what is known of it (`report`)."""

    router_ED: Tensor
    bias_E: Tensor
    gate_up_EDW: Tensor
    down_EWD: Tensor
    shared: Block | None
    report: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        """By their names behind the layer's `feed_forward.`."""
        found = {
            "router.weight": self.router_ED,
            "expert_bias": self.bias_E,
            "experts.gate_up_proj": self.gate_up_EDW,
            "experts.down_proj": self.down_EWD,
        }
        if self.shared is not None:
            found |= {
                "shared_expert.gate_proj.weight": self.shared.gate_FD,
                "shared_expert.up_proj.weight": self.shared.up_FD,
                "shared_expert.down_proj.weight": self.shared.down_DF,
            }
        return found


def split(block: Block, x_TD: Tensor, moe: MoeConfig, generator: torch.Generator, *, refit: bool) -> Mixture:
    """The mixture `moe` of a block that read `x_TD`. With all experts chosen it computes what the block computes."""
    hidden_TF = torch.cat([block.hidden(part) for part in x_TD.split(_ROWS)])
    shared_S, routed_N = most_used(hidden_TF, block.down_DF, moe.shared_width)
    size_TN = sizes(hidden_TF[:_GROUPED, routed_N], block.down_DF[:, routed_N])
    group_N = group(size_TN, moe.experts, generator)
    neurons_EW = torch.stack([routed_N[group_N == e] for e in range(moe.experts)])
    added_TE = torch.stack([_added(hidden_TF[:, n], block.down_DF[:, n]) for n in neurons_EW], dim=1)
    if moe.top_k == moe.experts:  # nothing is chosen: equal scores are weights of exactly 1
        router_ED, bias_E = torch.zeros(moe.experts, x_TD.shape[1]), torch.zeros(moe.experts)
    else:
        router_ED, bias_E = _router(x_TD, added_TE)
    weight_TE = chosen_weights(x_TD, router_ED, bias_E, moe)
    best_TE = torch.zeros_like(added_TE).scatter_(-1, added_TE.topk(moe.top_k, dim=-1).indices, 1.0)
    held = len(x_TD) - max(1, len(x_TD) // _HELD_OUT)
    down_DF, seen = block.down_DF, _Seen(hidden_TF, neurons_EW, block.down_DF)
    report: dict[str, Any] = {
        "tokens_per_expert": (weight_TE > 0).sum(0).tolist(),
        "error": seen.error(weight_TE, down_DF, held),
        # what a perfect router of this kind could reach: each token's experts of largest size
        "error_of_best_choice": seen.error(best_TE, down_DF, held),
        "refitted": False,
    }
    if refit and moe.top_k < moe.experts and held >= _LEAST_ROWS * hidden_TF.shape[1]:
        fitted_DF = seen.least_squares(weight_TE, held)
        error = seen.error(weight_TE, fitted_DF, held)
        if error < report["error"]:
            down_DF, report["refitted"], report["error"] = fitted_DF, True, error
    gate_up = torch.stack([torch.cat((block.gate_FD[n], block.up_FD[n])).T for n in neurons_EW])
    shared = Block(block.gate_FD[shared_S], block.up_FD[shared_S], down_DF[:, shared_S]) if len(shared_S) else None
    down_EWD = torch.stack([down_DF[:, n].T for n in neurons_EW])
    return Mixture(router_ED, bias_E, gate_up, down_EWD, shared, report)


def copy(block: Block, x_TD: Tensor, moe: MoeConfig, generator: torch.Generator) -> Mixture:
    """Every expert begins as the block, so that any choice computes what the block computes. The router sends tokens
    to the nearest of E centres of the block's inputs (k-means on the sphere), of which the bias evens out the loads."""
    unit_TD = F.normalize(x_TD - x_TD.mean(0), dim=1)
    centre_ED = unit_TD[torch.randperm(len(unit_TD), generator=generator)[: moe.experts]]
    centre_ED = F.normalize(centre_ED + 1e-3 * torch.randn(moe.experts, x_TD.shape[1], generator=generator), dim=1)
    for _ in range(_CENTRE_ROUNDS):
        nearest_T = (unit_TD @ centre_ED.T).argmax(1)
        summed = torch.zeros_like(centre_ED).index_add_(0, nearest_T, unit_TD)
        empty = summed.norm(dim=1, keepdim=True) == 0
        centre_ED = F.normalize(torch.where(empty, centre_ED, summed), dim=1)
    logits_TE = x_TD @ centre_ED.T
    router_ED = centre_ED * (_SPREAD / logits_TE.std().clamp(min=1e-12))
    bias_E = _even(torch.sigmoid(x_TD @ router_ED.T), moe.top_k)
    weight_TE = chosen_weights(x_TD, router_ED, bias_E, moe)
    gate_up = torch.cat((block.gate_FD, block.up_FD)).T
    report = {"tokens_per_expert": (weight_TE > 0).sum(0).tolist(), "error": 0.0, "refitted": False}
    stacked = (gate_up.expand(moe.experts, -1, -1), block.down_DF.T.expand(moe.experts, -1, -1))
    return Mixture(router_ED, bias_E, *stacked, None, report)


def _even(score_TE: Tensor, top_k: int) -> Tensor:
    """Selection biases under which every expert is chosen about as often: those of Wang et al. 2024, with a step that
    shrinks until it no longer matters."""
    bias_E, step = torch.zeros(score_TE.shape[1]), float(score_TE.std())
    if top_k == score_TE.shape[1]:
        return bias_E
    for _ in range(100):
        load_E = torch.zeros_like(bias_E)
        for part in score_TE.split(_ROWS):
            load_E += torch.bincount((part + bias_E).topk(top_k).indices.flatten(), minlength=len(bias_E))
        bias_E += step * (1 - load_E / load_E.mean()).clamp(-1, 1)
        step *= 0.95
    return bias_E


def chosen_weights(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor, moe: MoeConfig) -> Tensor:
    """Combine weights [T, E] as the decoder computes them, 0 for experts that are not chosen."""
    score_TE = torch.sigmoid(x_TD @ router_ED.T)
    index_TK = (score_TE + bias_E).topk(moe.top_k, dim=-1).indices
    weight_TK = score_TE.gather(-1, index_TK)
    weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True) * moe.scale
    return torch.zeros_like(score_TE).scatter_(-1, index_TK, weight_TK)


def _added(hidden_TW: Tensor, down_DW: Tensor) -> Tensor:
    """|hidden down^T| for each token, [T], without the vectors: h (down^T down) h^T."""
    return ((hidden_TW @ (down_DW.T @ down_DW)) * hidden_TW).sum(-1).clamp(min=0).sqrt()


def _router(x_TD: Tensor, added_TE: Tensor) -> tuple[Tensor, Tensor]:
    """(router, selection bias): logits of small spread in the order of the sizes that a ridge regression predicts."""
    mean_D, mean_E = x_TD.mean(0), added_TE.mean(0)
    x, y = (x_TD - mean_D).double(), (added_TE - mean_E).double()
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight_ED = torch.linalg.solve(gram, x.T @ y).T.float()
    offset_E = mean_E - weight_ED @ mean_D
    logits_TE = x_TD @ weight_ED.T
    factor = _SPREAD / float((logits_TE - logits_TE.mean(0)).std().clamp(min=1e-12))
    # the sigmoid's slope at 0 is 1/4: an offset of logits is a quarter of it in scores. What all have in common
    # changes no choice, and a logit far from 0 would saturate
    return weight_ED * factor, (offset_E - offset_E.mean()) * factor / 4


@dataclass(frozen=True)
class _Seen:
    """What a dense block computed, [T, F], and which neurons are whose; it is copied some rows at a time."""

    hidden_TF: Tensor
    neurons_EW: Tensor
    down_DF: Tensor

    def error(self, weight_TE: Tensor, down_DF: Tensor, first: int) -> float:
        """Squared error of the output on the tokens from `first` on, as a part of the output's square."""
        missed = square = 0.0
        for gated_TF, y_TD in self._parts(weight_TE, first, len(self.hidden_TF)):
            missed += float((gated_TF @ down_DF.T - y_TD).square().sum())
            square += float(y_TD.square().sum())
        return missed / max(square, 1e-30)

    def least_squares(self, weight_TE: Tensor, count: int) -> Tensor:
        """The second product [D, F] of least squared error on the first `count` tokens, with a ridge."""
        neurons, width = self.hidden_TF.shape[1], len(self.down_DF)
        gram_FF = torch.zeros(neurons, neurons, dtype=torch.float64)
        right_FD = torch.zeros(neurons, width, dtype=torch.float64)
        for gated_TF, y_TD in self._parts(weight_TE, 0, count):
            gram_FF += gated_TF.T @ gated_TF
            right_FD += gated_TF.T @ y_TD
        gram_FF.diagonal().add_(_RIDGE * gram_FF.diagonal().mean())
        return torch.linalg.solve(gram_FF, right_FD).T.float()

    def _parts(self, weight_TE: Tensor, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of (activations times their expert's weight, those of the shared expert as they are; the output)."""
        for start in range(first, last, _ROWS):
            rows = slice(start, min(start + _ROWS, last))
            factor_TF = torch.ones_like(self.hidden_TF[rows])
            each = self.neurons_EW.shape[1]
            factor_TF[:, self.neurons_EW.flatten()] = weight_TE[rows].repeat_interleave(each, dim=1)
            yield factor_TF.mul_(self.hidden_TF[rows]), self.hidden_TF[rows] @ self.down_DF.T
