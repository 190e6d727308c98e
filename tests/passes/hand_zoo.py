"""MoE blocks as people write them: no helper of a library, any of the usual ways to route and to dispatch.

Each function is the forward of one block over h [1, T, D]; `block` has every weight that one of them reads.
D model width, F expert width, E experts, K experts per token; all sizes differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Program, Role
from tests.harness import VOCABULARY, export_toy
from tests.passes.moe_zoo import parameter

D, FF, E, K = 12, 7, 5, 2
Block = Any
Forward = Callable[[Block, Tensor], Tensor]
FUSED: dict[str, Forward] = {}
REFUSED: dict[str, tuple[Forward, str]] = {}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = (nn.Linear(*s, bias=False) for s in ((D, FF), (D, FF), (FF, D)))
        self.net = nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class HandWritten(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = forward
        self.router, self.router_in_out, self.router_bias = parameter(E, D), parameter(D, E), parameter(E)
        self.gate = nn.Linear(D, E)
        self.w13, self.w2 = parameter(E, D, 2 * FF), parameter(E, FF, D)
        self.w1, self.w3, self.w2_out_in = parameter(E, D, FF), parameter(E, D, FF), parameter(E, D, FF)
        self.b13, self.b2, self.scale = parameter(E, 2 * FF), parameter(E, D), parameter(E)
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(self, h: Tensor) -> Tensor:
        return self._forward(self, h)


class Toy(nn.Module):
    def __init__(self, blocks: Mapping[str, Forward]) -> None:
        super().__init__()
        self.embed, self.head = parameter(VOCABULARY, D), parameter(VOCABULARY, D)
        self.blocks = nn.ModuleDict({name: HandWritten(forward) for name, forward in blocks.items()})

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        h = total = F.embedding(tokens, self.embed)
        for block in self.blocks.values():
            total = total + block(h)
        return F.linear(total, self.head)


def zoo(blocks: Mapping[str, Forward]) -> Program:
    """The canonical program of named blocks that all read the same tokens."""
    named = {f"is_{name}": forward for name, forward in blocks.items()}
    return export_toy(lambda: Toy(named), {"embed": Role.EMBEDDING, "head": Role.HEAD})


def fused(forward: Forward) -> Forward:
    FUSED[forward.__name__] = forward
    return forward


def refused(reason: str) -> Callable[[Forward], Forward]:
    def add(forward: Forward) -> Forward:
        REFUSED[forward.__name__] = forward, reason
        return forward

    return add


def topk(s: Block, x: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    weights, indices = F.linear(x, s.router).softmax(-1).topk(k, -1)
    return weights / weights.sum(-1, keepdim=True), indices


def rows(h: Tensor) -> Tensor:
    return h.reshape(-1, D)


def gathered(s: Block, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    gate, up = torch.einsum("nd,nkdf->nkf", x, s.w13[indices]).chunk(2, -1)
    out = torch.einsum("nkf,nkfd->nkd", F.silu(gate) * up, s.w2[indices])
    return torch.einsum("nkd,nk->nd", out, weights)


def scattered(x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], E).scatter(1, indices, weights)


def dense_loop(s: Block, x: Tensor, weights: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(E):
        y = y + s.experts[e](x) * weights[..., e : e + 1]
    return y


# --------------------------------------------------------------------------------------------------------- how to route


@fused
def router_matmul(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = (x @ s.router_in_out).softmax(-1).topk(K, -1)
    return gathered(s, x, weights, indices).view_as(h)


@fused
def router_matmul_transposed(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = torch.matmul(x, s.router.t()).softmax(-1).topk(K, -1)
    return gathered(s, x, weights, indices).view_as(h)


@fused
def router_einsum(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = torch.einsum("nd,de->ne", x, s.router_in_out).softmax(-1).topk(K, -1)
    return gathered(s, x, weights, indices).view_as(h)


@fused
def router_plus_bias(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = (F.linear(x, s.router) + s.router_bias).softmax(-1).topk(K, -1)
    return gathered(s, x, weights, indices).view_as(h)


@fused
def sorted_scores(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    values, order = F.linear(x, s.router).softmax(-1).sort(-1, descending=True)
    return gathered(s, x, values[:, :K], order[:, :K]).view_as(h)


@fused
def normalized_by_norm(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    values, indices = F.linear(x, s.router).sigmoid().topk(K, -1)
    return gathered(s, x, F.normalize(values, p=1, dim=-1), indices).view_as(h)


@fused
def divided_and_scaled(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = topk(s, x)
    return gathered(s, x, weights / 2.0 * 3.0, indices).view_as(h)


@fused
def scale_of_experts(s: Block, h: Tensor) -> Tensor:
    """Gemma 4: each expert's output has a scale of its own."""
    x = rows(h)
    weights, indices = topk(s, x)
    return gathered(s, x, weights * s.scale[indices], indices).view_as(h)


@fused
def scores_times_mask(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    logits = F.linear(x, s.router)
    mask = torch.zeros_like(logits).scatter(1, logits.topk(K, -1).indices, 1.0)
    weights = logits.softmax(-1) * mask
    return dense_loop(s, x, weights / weights.sum(-1, keepdim=True)).view_as(h)


@fused
def masked_logits(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    logits = F.linear(x, s.router)
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(K, -1).indices, True)
    return dense_loop(s, x, logits.masked_fill(~mask, -torch.inf).softmax(-1)).view_as(h)


@fused
def scattered_logits(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    logits = F.linear(x, s.router)
    values, indices = logits.topk(K, -1)
    weights = torch.full_like(logits, -torch.inf).scatter(-1, indices, values).softmax(-1)
    y = torch.zeros_like(x)
    for e in range(E):
        tokens = (indices == e).any(-1).nonzero().squeeze(-1)
        y = y.index_add(0, tokens, s.experts[e](x[tokens]) * weights[tokens, e].unsqueeze(1))
    return y.view_as(h)


@fused
def switch_by_max(s: Block, h: Tensor) -> Tensor:
    """Switch: one expert a token."""
    x = rows(h)
    weights, indices = F.linear(x, s.router).softmax(-1).max(-1)
    y = torch.zeros_like(x)
    for e in range(E):
        tokens = torch.where(indices == e)[0]
        y = y.index_add(0, tokens, s.experts[e](x[tokens]) * weights[tokens, None])
    return y.view_as(h)


@fused
def switch_by_argmax(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    scores = F.linear(x, s.router).softmax(-1)
    indices = scores.argmax(-1)
    weights = scores.gather(1, indices[:, None])
    y = torch.zeros_like(x)
    for e in range(E):
        tokens = (indices == e).nonzero().squeeze(-1)
        y = y.index_add(0, tokens, s.experts[e](x[tokens]) * weights[tokens])
    return y.view_as(h)


@fused
def switch_by_topk(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = (t.squeeze(-1) for t in F.linear(x, s.router).softmax(-1).topk(1, -1))
    y = torch.zeros_like(x)
    for e in range(E):
        y = y + s.experts[e](x) * (weights * (indices == e)).unsqueeze(-1)
    return y.view_as(h)


# -------------------------------------------------------------------------------------------------- a batch of one kept


@fused
def batched_dense(s: Block, h: Tensor) -> Tensor:
    weights, indices = topk(s, h)
    y = torch.zeros_like(h)
    for e in range(E):
        y = y + (weights * (indices == e)).sum(-1, keepdim=True) * s.experts[e](h)
    return y


@fused
def batched_places(s: Block, h: Tensor) -> Tensor:
    weights, indices = topk(s, h)
    y = torch.zeros_like(h)
    for e in range(E):
        b, t, k = torch.where(indices == e)
        y[b, t] += weights[b, t, k].unsqueeze(-1) * s.experts[e](h[b, t])
    return y


@fused
def batched_masks(s: Block, h: Tensor) -> Tensor:
    """The loop of a much copied tutorial: masked logits, rows picked and written by boolean masks."""
    logits = F.linear(h, s.router)
    values, indices = logits.topk(K, -1)
    weights = torch.full_like(logits, -torch.inf).scatter(-1, indices, values).softmax(-1)
    y, flat, flat_weights = torch.zeros_like(h), h.view(-1, D), weights.view(-1, E)
    for e in range(E):
        mask = (indices == e).any(-1)
        picked = mask.view(-1)
        y[mask] += s.experts[e](flat[picked]) * flat_weights[picked, e].unsqueeze(1)
    return y


# -------------------------------------------------------------------------------------------- every expert, every token


@fused
def all_einsum(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    gate, up = torch.einsum("nd,edf->nef", x, s.w13).chunk(2, -1)
    out = torch.einsum("nef,efd->ned", F.silu(gate) * up, s.w2)
    return (out * scattered(x, *topk(s, x)).unsqueeze(-1)).sum(1).view_as(h)


@fused
def all_einsum_combined(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    gate, up = (torch.einsum("nd,edf->enf", x, w) for w in (s.w1, s.w3))
    out = torch.einsum("enf,efd->end", F.silu(gate) * up, s.w2)
    return torch.einsum("end,ne->nd", out, scattered(x, *topk(s, x))).view_as(h)


@fused
def all_bmm(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    gate, up = torch.bmm(x.unsqueeze(0).expand(E, -1, -1), s.w13).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, s.w2)
    return (out * scattered(x, *topk(s, x)).t().unsqueeze(-1)).sum(0).view_as(h)


@fused
def all_bmm_biased(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    gate, up = (torch.bmm(x.repeat(E, 1).view(E, -1, D), s.w13) + s.b13[:, None]).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, s.w2) + s.b2[:, None]
    return (out * scattered(x, *topk(s, x)).transpose(0, 1).view(E, -1)[..., None]).sum(0).view_as(h)


@fused
def all_matmul(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    gate, up = torch.matmul(x, s.w13).chunk(2, -1)
    out = torch.matmul(F.silu(gate) * up, s.w2)
    return (out * scattered(x, *topk(s, x)).t()[..., None]).sum(0).view_as(h)


@fused
def all_then_gathered(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = topk(s, x)
    gate, up = torch.einsum("nd,edf->nef", x, s.w13).chunk(2, -1)
    out = torch.einsum("nef,efd->ned", F.silu(gate) * up, s.w2)
    return (out.gather(1, indices[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1).view_as(h)


@fused
def weighted_before(s: Block, h: Tensor) -> Tensor:
    """Llama 4: the rows are multiplied by sigmoid weights, which are zero for experts not chosen."""
    x = rows(h)
    logits = F.linear(x, s.router)
    values, indices = logits.topk(1, 1)
    scores = torch.full_like(logits, -torch.inf).scatter_(1, indices, values).sigmoid()
    routed = (x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)).reshape(E, x.shape[0], D)
    gate, up = torch.bmm(routed, s.w13).chunk(2, -1)
    return torch.bmm(up * F.silu(gate), s.w2).sum(0).view_as(h)


# ----------------------------------------------------------------------------------------------------- other dispatches


@fused
def module_loop(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = topk(s, x)
    y, mask = torch.zeros_like(x), F.one_hot(indices, E).permute(2, 1, 0)
    for e in range(E):
        ranks, tokens = torch.where(mask[e])
        y.index_add_(0, tokens, s.experts[e](x[None, tokens].reshape(-1, D)) * weights[tokens, ranks, None])
    return y.view_as(h)


@fused
def sequential_experts(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = s.gate(x).softmax(-1).topk(K, -1)
    y = torch.zeros_like(x)
    for e in range(E):
        tokens, ranks = torch.where(indices == e)
        y.index_add_(0, tokens, s.experts[e].net(x[tokens]) * weights[tokens, ranks, None])
    return y.view_as(h)


@fused
def matmul_of_gathered(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = topk(s, x)
    gate, up = (x[:, None, None, :] @ s.w13[indices]).squeeze(2).chunk(2, -1)
    out = ((F.silu(gate) * up)[:, :, None, :] @ s.w2[indices]).squeeze(2)
    return (out * weights[..., None]).sum(1).view_as(h)


# ------------------------------------------------------------------------------------------------ what is no such block


@refused("not those which select one expert|not combined|do not come from|selects")
def expert_choice(s: Block, h: Tensor) -> Tensor:
    """The experts choose their tokens."""
    x = rows(h)
    weights, tokens = F.linear(x, s.router).softmax(-1).topk(1, 0)
    y = torch.zeros_like(x)
    for e in range(E):
        y = y.index_add(0, tokens[:, e], s.experts[e](x[tokens[:, e]]) * weights[:, e, None])
    return y.view_as(h)


@refused("no topk over a router's scores")
def by_threshold(s: Block, h: Tensor) -> Tensor:
    """As many experts as score above a number: the rows of each are picked by value."""
    x = rows(h)
    scores = F.linear(x, s.router).sigmoid()
    y = torch.zeros_like(x)
    for e in range(E):
        tokens = (scores[:, e] > 0.5).nonzero().squeeze(-1)
        y = y.index_add(0, tokens, s.experts[e](x[tokens]) * scores[tokens, e, None])
    return y.view_as(h)


@refused("not summed over the experts|is not one expert times its weight")
def capacity(s: Block, h: Tensor) -> Tensor:
    """Tokens beyond an expert's capacity are dropped."""
    x = rows(h)
    weights, indices = topk(s, x)
    chosen = F.one_hot(indices, E).sum(1)
    kept = (chosen.cumsum(0) * chosen <= 2) * chosen
    y = torch.zeros_like(x)
    for e in range(E):
        y = y + ((weights * (indices == e)).sum(-1) * kept[:, e])[:, None] * s.experts[e](x)
    return y.view_as(h)


@refused("not summed over the experts|is not one expert times its weight")
def threshold(s: Block, h: Tensor) -> Tensor:
    """Everything not below the K-th score: more than K where scores tie."""
    x = rows(h)
    scores = F.linear(x, s.router).softmax(-1)
    kept = scores >= scores.topk(K, -1).values[:, -1:]
    return dense_loop(s, x, scores * kept).view_as(h)


@refused("not summed over the experts|is not one expert times its weight")
def mask_of_others(s: Block, h: Tensor) -> Tensor:
    """The experts that topk did not choose."""
    x = rows(h)
    scores = F.linear(x, s.router).softmax(-1)
    mask = torch.ones_like(scores).scatter(1, scores.topk(K, -1).indices, 0.0)
    return dense_loop(s, x, scores * mask).view_as(h)


@refused("not summed over the experts|is not one expert times its weight")
def normalized_before_mask(s: Block, h: Tensor) -> Tensor:
    """Masked with a number that softmax still sees."""
    x = rows(h)
    logits = F.linear(x, s.router)
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(K, -1).indices, True)
    return dense_loop(s, x, logits.masked_fill(~mask, -3.0).softmax(-1)).view_as(h)


@refused("not multiplied by the weight that selected them")
def ranks_of_another_order(s: Block, h: Tensor) -> Tensor:
    """Tokens listed by token, ranks listed by rank: the pairs do not belong together."""
    x = rows(h)
    weights, indices = topk(s, x)
    y = torch.zeros_like(x)
    for e in range(E):
        tokens = torch.where(indices == e)[0]
        ranks = torch.where((indices == e).t())[0]
        y = y.index_add(0, tokens, s.experts[e](x[tokens]) * weights[tokens, ranks, None])
    return y.view_as(h)


@refused("this step from scores to combine weights")
def scale_of_another_expert(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = topk(s, x)
    return gathered(s, x, weights * s.scale[E - 1 - indices], indices).view_as(h)


@refused("this step from scores to combine weights|divided by their own sum")
def scale_before_the_sum(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = F.linear(x, s.router).softmax(-1).topk(K, -1)
    weights = weights * s.scale[indices]
    return gathered(s, x, weights / weights.sum(-1, keepdim=True), indices).view_as(h)


@refused("a scale of their own")
def scale_before_the_experts(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = topk(s, x)
    weighted = x[:, None, :] * (weights * s.scale[indices])[..., None]
    gate, up = torch.einsum("nkd,nkdf->nkf", weighted, s.w13[indices]).chunk(2, -1)
    return torch.einsum("nkf,nkfd->nkd", F.silu(gate) * up, s.w2[indices]).sum(1).view_as(h)


@refused("not multiplied by weights scattered")
def weights_of_the_others(s: Block, h: Tensor) -> Tensor:
    """Expert e gets the weight of expert E - 1 - e."""
    x = rows(h)
    gate, up = torch.einsum("nd,edf->nef", x, s.w13).chunk(2, -1)
    out = torch.einsum("nef,efd->ned", F.silu(gate) * up, s.w2)
    return (out * scattered(x, *topk(s, x)).flip(-1).unsqueeze(-1)).sum(1).view_as(h)


@refused("do not have the same|not a bias of each expert")
def bias_of_tokens(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    gate, up = torch.bmm(x.unsqueeze(0).expand(E, -1, -1), s.w13).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, s.w2) + s.b2[:1, None]
    return (out * scattered(x, *topk(s, x)).t().unsqueeze(-1)).sum(0).view_as(h)


@refused("router's logits do not come from a linear")
def two_layer_router(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = torch.tanh(F.linear(x, s.router)).softmax(-1).topk(K, -1)
    return gathered(s, x, weights, indices).view_as(h)


@refused("router's weight is computed")
def cosine_router(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    weights, indices = F.linear(F.normalize(x, dim=-1), F.normalize(s.router, dim=-1)).softmax(-1).topk(K, -1)
    return gathered(s, x, weights, indices).view_as(h)
