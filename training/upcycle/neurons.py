"""Which neurons of a block go together: the most used ones, and groups of equal size that fire for the same tokens.

What neuron f adds to the output of token t has the size a_tf = |h_tf| |down_f|. The neurons of largest mean square form
the shared expert. The others are grouped by co-activation: the correlation of their sizes over tokens, reduced to its
main directions and grouped by k-means whose groups have equal size (Zhang et al. 2022, arXiv 2110.01786, cluster
weights or activations alike).

T tokens, F neurons, N neurons that are routed, E groups, R directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 20  # of k-means; fifteen were the most needed on SmolLM2's layers
_DIRECTIONS = 64


def sizes(hidden_TF: Tensor, down_DF: Tensor) -> Tensor:
    """a_tf, [T, F]."""
    return hidden_TF.abs() * down_DF.norm(dim=0)


def most_used(hidden_TF: Tensor, down_DF: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(the `count` neurons of largest mean square size, the others), each in the order of their numbers."""
    used_F = hidden_TF.norm(dim=0) * down_DF.norm(dim=0)
    order_F = used_F.argsort(descending=True, stable=True)
    return order_F[:count].sort().values, order_F[count:].sort().values


def group(size_TN: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """The group of each neuron, int64 [N], all of N / groups neurons."""
    count = size_TN.shape[1]
    assert count % groups == 0
    each = count // groups
    if groups == 1 or each == 0:
        return torch.zeros(count, dtype=torch.int64)
    points_NR = _directions(size_TN)
    centre_ER = points_NR[_seeds(points_NR, groups, generator)]
    group_N = torch.full((count,), -1)
    for _ in range(_ROUNDS):
        found_N = _assign(points_NR @ centre_ER.T, each)
        if torch.equal(found_N, group_N):
            break
        group_N = found_N
        centre_ER = torch.zeros_like(centre_ER).index_add_(0, group_N, points_NR)
        centre_ER = torch.nn.functional.normalize(centre_ER, dim=1)
    return group_N


def _directions(size_TN: Tensor) -> Tensor:
    """Neurons as unit vectors [N, R] whose products are close to the correlations of their sizes."""
    x_TN = size_TN - size_TN.mean(0)
    x_TN = x_TN / x_TN.norm(dim=0).clamp(min=1e-12)
    values, vectors = torch.linalg.eigh((x_TN.T @ x_TN).double())
    rank = min(_DIRECTIONS, len(values))
    points = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
    return torch.nn.functional.normalize(points.float(), dim=1)


def _seeds(points_NR: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """k-means++ on the sphere: each next seed is likelier the less it is like those before."""
    chosen = [int(torch.randint(len(points_NR), (1,), generator=generator))]
    far_N = (1 - points_NR @ points_NR[chosen[0]]).clamp(min=0)
    while len(chosen) < groups:
        weight_N = far_N.clone()
        weight_N[chosen] = 0
        if float(weight_N.sum()) <= 0:  # all alike: any other will do
            weight_N = torch.ones_like(far_N)
            weight_N[chosen] = 0
        chosen.append(int(torch.multinomial(weight_N, 1, generator=generator)))
        far_N = torch.minimum(far_N, (1 - points_NR @ points_NR[chosen[-1]]).clamp(min=0))
    return torch.tensor(chosen)


def _assign(like_NE: Tensor, each: int) -> Tensor:
    """Groups [N] of `each` neurons: those that would lose most by their second choice choose first, and again among
    the groups that have room."""
    count, groups = like_NE.shape
    group_N = torch.full((count,), -1)
    room = [each] * groups
    left, like = torch.arange(count), like_NE.clone()
    while len(left):
        open_groups = [g for g in range(groups) if room[g]]
        best = like[left][:, open_groups]
        if len(open_groups) == 1:
            group_N[left] = open_groups[0]
            break
        top = best.topk(2, dim=1)
        regret = top.values[:, 0] - top.values[:, 1]
        wish = torch.tensor(open_groups)[top.indices[:, 0]]
        for g in open_groups:
            mine = (wish == g).nonzero().flatten()
            mine = mine[regret[mine].argsort(descending=True, stable=True)[: room[g]]]
            group_N[left[mine]] = g
            room[g] -= len(mine)
        left = left[group_N[left] < 0]
    return group_N
