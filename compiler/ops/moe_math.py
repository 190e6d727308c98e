"""The arithmetic of a MoE block on plain tensors: scores, top-k, combine weights, activation, sum over experts.

The eager float and quantized operators (`moe_call.py`) and verification compute with these functions.

N tokens, D model width, E experts, K experts per token, F expert width, S shared width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moec.compiler.ops.attributes import Experts, Routing

Linear = Callable[[int, Tensor], Tensor]  # (expert, rows [n, in]) -> [n, out]


def score(logits: Tensor, kind: str) -> Tensor:
    """Router score over the last dimension, fp32."""
    if kind == "softmax":
        return torch.softmax(logits, -1)
    if kind == "sigmoid":
        return torch.sigmoid(logits)
    return torch.sqrt(functional.softplus(logits))


def choices(logits: Tensor, selection_bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """(what topk sees, what the weights are gathered from), both [N, E]. See `Routing`, steps 1 to 3."""
    scores = logits if routing.selects_logits else score(logits, routing.score)
    choice = scores
    if selection_bias is not None:
        bias = selection_bias.to(torch.float32)
        if routing.bias_on == "scores" or routing.after_topk:
            choice = scores + bias
        else:
            choice = score(logits + bias, routing.score)
    if routing.groups == 0:
        return choice, scores
    grouped = choice.view(*choice.shape[:-1], routing.groups, -1)
    group_score = grouped.amax(-1) if routing.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(group_score).scatter_(-1, group_score.topk(routing.keep, -1).indices, 1.0).bool()
    fill = 0.0 if routing.fill == "zero" else -torch.inf
    return grouped.masked_fill(~kept.unsqueeze(-1), fill).flatten(-2), scores


def combine_weights(scores: Tensor, indices_NK: Tensor, routing: Routing) -> Tensor:
    """Combine weights [N, K] of given experts. See `Routing`, steps 4 to 7."""
    if routing.score == "sparsemixer":
        weights = near_weights(scores, indices_NK, routing.threshold)
    else:
        weights = scores.gather(-1, indices_NK)
    if routing.after_topk:
        weights = score(weights, routing.score)
    if routing.normalize == "sum":
        total = weights.sum(-1, keepdim=True) + routing.eps
        weights = weights / (total.clamp(min=routing.clamp_min) if routing.clamp_min else total)
    return weights * routing.scale


def near_weights(logits_NE: Tensor, indices_NK: Tensor, threshold: float) -> Tensor:
    """[N, K]: `Routing`, step 5, with sparsemixer. Indices are in the order of selection."""
    places = torch.arange(logits_NE.shape[-1], device=logits_NE.device)
    left_NE, weights = logits_NE, []
    for index_N1 in indices_NK.split(1, -1):
        best_N1 = logits_NE.gather(-1, index_N1)
        far_NE = (best_N1 - logits_NE) / torch.maximum(logits_NE.abs(), best_N1) > threshold
        weights.append(torch.softmax(left_NE.masked_fill(far_NE, -torch.inf), -1).gather(-1, index_N1))
        left_NE = left_NE.masked_fill(places == index_N1, -torch.inf)
    return torch.cat(weights, -1)


def router_logits(router_input_ND: Tensor, router_weight: Tensor, router_bias: Tensor | None) -> Tensor:
    """Float32 [N, E] from router_input [N, D], router_weight [E, D] and router_bias [E]."""
    bias = None if router_bias is None else router_bias.to(torch.float32)
    return functional.linear(router_input_ND.to(torch.float32), router_weight.to(torch.float32), bias)


def route(
    router_input_ND: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    top_k: int,
    routing: Routing,
) -> tuple[Tensor, Tensor]:
    """(indices int64 [N, K], weights float32 [N, K])."""
    logits = router_logits(router_input_ND, router_weight, router_bias)
    choice, scores = choices(logits, selection_bias, routing)
    indices = choice.topk(top_k, -1).indices
    return indices, combine_weights(scores, indices, routing)


def activate(hidden: Tensor, experts: Experts) -> Tensor:
    """[n, 2F] (or [n, F] when not gated) -> [n, F]."""
    if not experts.gated:
        return _activation(hidden.clamp(experts.gate_min, experts.gate_max), experts)
    gate, up = (hidden[..., 0::2], hidden[..., 1::2]) if experts.interleaved else hidden.chunk(2, -1)
    gate = gate.clamp(experts.gate_min, experts.gate_max)
    up = up.clamp(experts.up_min, experts.up_max) + experts.up_offset
    return _activation(gate, experts) * up


def _activation(x: Tensor, experts: Experts) -> Tensor:
    if experts.activation == "silu":
        return x * torch.sigmoid(experts.alpha * x)
    if experts.activation == "relu2":
        return functional.relu(x).square()
    if experts.activation == "relu":
        return functional.relu(x)
    return functional.gelu(x, approximate="tanh" if experts.activation == "gelu_tanh" else "none")


def apply_experts(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, up: Linear, down: Linear, routing: Routing, experts: Experts
) -> Tensor:
    """Sum over the selected experts. Loops over the experts hit; a token's outputs are added in rank order."""
    rows_NK = x_ND.new_zeros((*indices_NK.shape, x_ND.shape[-1]))
    for expert in indices_NK.unique().tolist():
        token, rank = (indices_NK == expert).nonzero(as_tuple=True)
        weight = weights_NK[token, rank].unsqueeze(-1)
        x = x_ND[token]
        if routing.apply == "input":
            x = x * weight
        y = down(expert, activate(up(expert, x), experts))
        rows_NK[token, rank] = y * weight if routing.apply == "output" else y
    return rows_NK.sum(1)


def shared_expert(
    x_ND: Tensor,
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
    shared_gate: Tensor | None,
    experts: Experts,
) -> Tensor:
    """The shared expert, whose gate is the first half of `up` and whose activation is the routed experts'; multiplied
    by sigmoid(shared_gate x) when there is a `shared_gate`. [n, D]."""
    halves = Experts(**{**experts.__dict__, "layout": "out_in", "interleaved": False})
    y = down(activate(up(x_ND), halves))
    if shared_gate is None:
        return y
    return torch.sigmoid(functional.linear(x_ND, shared_gate.to(torch.float32))) * y
