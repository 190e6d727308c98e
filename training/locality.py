"""Locality of routing: how many different experts a stretch of text uses, and a loss that makes it fewer.

A phone holds some of the experts in memory and reads the others when tokens select them, so what counts is not which
experts a token selects but whether its neighbours select the same ones. A window is WINDOW consecutive tokens of one
document. With c_te = 1 where token t selects expert e, one of K of E, p_e = sum_t c_te / (K WINDOW) the share that the
expert has of a window's selections, and u_e its share of the selections of the last steps,

    S = log(E / K) - sum_e p_e log(p_e / u_e)

is small where windows select few experts and not those that others select: the mean of the sum over windows estimates
the mutual information of place and expert. Without u, the entropy of p alone, routers collapse: K experts of a layer
serve everything, however the load is balanced (tried: in ten steps). With even u, S is the logarithm of the number of
experts that a window uses (the exponential of an entropy counts kinds by their shares: Hill 1973) over the K that it
needs at least. The loss is the mean of S over windows and layers. Selections have no gradient; it is taken as if each
were

    q_te = sigmoid((v_te - b_t) / (TAU d_t)),

v_te what experts are selected by (score and bias), b_t the middle between the last that is selected and the first that
is not, d_t the standard deviation of a token's v, a constant. As K experts are always selected, b_t follows the v_te so
that sum_e q_te stays: db_t / dv_te = q'_te / sum_e q'_te. So S makes it likelier that a token selects what its
neighbours selected more than others, and less likely that it selects anything else, most where a little decides; it
does not move the level of a token's scores, and does not depend on their scale.

Of published forms the nearest is ReMoE's (arXiv 2605.27081), which prefers recently selected experts.

B rows, T tokens of a row, N = B * T, E experts, K experts per token, W windows of a row: one for each token that may
end one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 16  # tokens
TAU = 0.5  # width of the border of a selection, in standard deviations


@torch.no_grad()
def window_ends(documents_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Whether a token is the last of WINDOW consecutive ones of its document, bool [B, T].

    Padding has no windows: it is a document without a target (`mask_BT` 0 throughout).
    """
    ends_BT = torch.zeros_like(documents_BT, dtype=torch.bool)
    if documents_BT.shape[1] < WINDOW:
        return ends_BT
    number_BT = documents_BT.long()
    targets = mask_BT.new_zeros(len(documents_BT), int(number_BT.max()) + 1).scatter_add_(1, number_BT, mask_BT)
    behind = WINDOW - 1
    same_BW = number_BT[:, behind:] == number_BT[:, : number_BT.shape[1] - behind]
    ends_BT[:, behind:] = same_BW & (targets.gather(1, number_BT)[:, behind:] > 0)
    return ends_BT


def locality(
    values_NE: Tensor, indices_NK: Tensor, ends_BT: Tensor, usage_E: Tensor, *, with_loss: bool
) -> tuple[Tensor, Tensor]:
    """(sum of S over windows, float32 [], 0 without `with_loss`; sum over windows of the experts they use, int64 []).

    values_NE: what experts are selected by; indices_NK: the selected ones; usage_E: u. Only `values_NE` has a gradient.
    """
    (rows, tokens), experts = ends_BT.shape, values_NE.shape[-1]
    top_k = indices_NK.shape[-1]
    none = torch.zeros((), device=values_NE.device)
    if tokens < WINDOW:
        return none, none.long()
    ended_B1W = ends_BT[:, WINDOW - 1 :].unsqueeze(1)

    def windows(x_NE: Tensor) -> Tensor:
        """Means over windows, [B, E, W]."""
        return F.avg_pool1d(x_NE.view(rows, tokens, experts).transpose(1, 2), WINDOW, stride=1)

    with torch.autocast(values_NE.device.type, enabled=False):
        with torch.no_grad():
            p_BEW = windows(torch.zeros_like(values_NE, dtype=torch.float32).scatter_(1, indices_NK, 1.0)) / top_k
            distinct = ((p_BEW > 0) & ended_B1W).sum()
            if not with_loss or top_k == experts:
                return none, distinct
            least = 0.5 / (WINDOW * top_k)  # of an expert that nobody selected: as if half a selection were there
            log_usage_E1 = usage_E.float().clamp(min=least).log().unsqueeze(1)
            apart = ((torch.xlogy(p_BEW, p_BEW) - p_BEW * log_usage_E1) * ended_B1W).sum()
            entropy = math.log(experts / top_k) * ended_B1W.sum() - apart
            slope_BEW = (log_usage_E1 - p_BEW.clamp(min=least).log()) * ended_B1W
        stand_in = (windows(_near(values_NE.float(), top_k)) * slope_BEW).sum() / top_k
        return entropy + (stand_in - stand_in.detach()), distinct


def _near(values_NE: Tensor, top_k: int) -> Tensor:
    """q of the module's docstring: near 1 for what is selected, near 0 for what is not. [N, E]."""
    with torch.no_grad():
        best = values_NE.topk(top_k + 1, dim=-1).values
        border_N1 = best[:, top_k - 1 :].mean(dim=-1, keepdim=True)
        width_N1 = TAU * values_NE.std(dim=-1, keepdim=True).clamp(min=1e-12)
        q_NE = ((values_NE - border_N1) / width_N1).sigmoid()
        slope_NE = q_NE * (1 - q_NE)
        share_NE = slope_NE / slope_NE.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    followed_N1 = (share_NE * values_NE).sum(dim=-1, keepdim=True)
    border_N1 = border_N1 + (followed_N1 - followed_N1.detach())
    return ((values_NE - border_N1) / width_N1).sigmoid()
