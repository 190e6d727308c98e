"""Codes whose errors compensate each other: GPTQ's feedback, descent by single codes, and scales for given codes.

With the second moments H = sum x x^T / T of the inputs, a little added to its diagonal, the error of a product is
tr(dW H dW^T). These functions need H only, not the inputs.

Shape suffixes: N rows (outputs), K reduction (inputs), G groups, g elements of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moec.compiler.levels import Grid
from moec.compiler.quantizer import Inputs, Moments

_BLOCK = 64  # columns whose feedback is gathered before it reaches the rest: one product instead of many
_DAMPING = 0.01  # of the mean diagonal of H, as in the paper of GPTQ
_SHRINK = 0.1  # additional damping at as many tokens as there are inputs: few tokens say little about correlations
_REFIT = 1 << 22  # elements of a temporary of `refitted`


def has_seen(inputs: Inputs | None) -> bool:
    """Whether any input was observed."""
    return isinstance(inputs, Moments) and inputs.tokens > 0 and float(inputs.energy_K.sum()) > 0


def damped(inputs: Moments) -> Tensor:
    """H [K, K] with its diagonal made larger. It is not to be changed."""
    return inputs.derived("damped", lambda: _damped(inputs))


def _damped(inputs: Moments) -> Tensor:
    h_KK = inputs.moments_KK / inputs.tokens
    more = _DAMPING + _SHRINK * min(1.0, len(h_KK) / inputs.tokens)
    h_KK.diagonal().add_(more * h_KK.diagonal().mean())
    return h_KK


def inverse_factor(inputs: Moments) -> Tensor:
    """U [K, K], upper triangular with H^-1 = U^T U. It is not to be changed."""
    return inputs.derived("inverse factor", lambda: _inverse_factor(damped(inputs)))


def _inverse_factor(h_KK: Tensor) -> Tensor:
    more = _DAMPING * h_KK.diagonal().mean()
    while True:  # rounding can leave H not positive definite: a larger diagonal makes it so
        # with the order of inputs reversed, H = V V^T for an upper V, and H^-1 = V^-T V^-1
        factor, failed = torch.linalg.cholesky_ex(h_KK.flip(0, 1))
        if not int(failed):
            break
        h_KK = h_KK + torch.diag(more.expand(len(h_KK)))
    return torch.linalg.solve_triangular(factor.flip(0, 1), torch.eye(len(h_KK)), upper=True)


def with_feedback(w_NK: Tensor, s_NK: Tensor, grid: Grid, u_KK: Tensor) -> Tensor:
    """int8 values of the grid [N, K]; the error of a column is spread over those after it (GPTQ, arXiv 2210.17323,
    Algorithm 1).

    A scale of 0 gives codes of 0. u_KK: of `inverse_factor`.
    """
    # columns are worked on one by one: rows of the transpose, which lie together
    w_KN = w_NK.t().clone(memory_format=torch.contiguous_format)
    s_KN = s_NK.t().contiguous()
    inverse_KN = torch.where(s_KN == 0, 0.0, 1.0 / torch.where(s_KN == 0, 1.0, s_KN))
    diagonal = u_KK.diagonal().tolist()
    k = w_KN.shape[0]
    errors_KN = torch.empty(min(_BLOCK, k), w_KN.shape[1])
    for a in range(0, k, _BLOCK):
        b = min(a + _BLOCK, k)
        with one_thread():  # operations of a column are shorter than the time that threads wait for each other
            for i in range(a, b):
                column, error = w_KN[i], errors_KN[i - a]
                q = grid.nearest_(column * inverse_KN[i])
                torch.addcmul(column, q, s_KN[i], value=-1, out=error)
                error /= diagonal[i]
                w_KN[i] = q  # nobody reads the float again
                w_KN[i + 1 : b].addr_(u_KK[i, i + 1 : b], error, alpha=-1)
        w_KN[b:].addmm_(u_KK[a:b, b:].t(), errors_KN[: b - a], alpha=-1)
    return w_KN.to(torch.int8).t()


def descended(w_NK: Tensor, q_NK: Tensor, s_NK: Tensor, grid: Grid, h_KK: Tensor) -> Tensor:
    """Values of less error than `q_NK`: each column in turn takes the codes that are best beside all others.

    With the gradient R = H (W - S Q) the best value of column k is what it has plus R_k / H_kk (QuantEase,
    arXiv 2309.01885). The error never grows, as the nearest code to the least of a parabola is its best.
    """
    q_KN = q_NK.t().to(torch.float32).contiguous()
    s_KN = s_NK.t().contiguous()
    inverse_KN = torch.where(s_KN == 0, 0.0, 1.0 / torch.where(s_KN == 0, 1.0, s_KN))
    r_KN = h_KK @ torch.addcmul(w_NK.t(), q_KN, s_KN, value=-1)
    curvature = h_KK.diagonal().clamp(min=1e-30).tolist()
    k = len(r_KN)
    changes_KN = torch.empty(min(_BLOCK, k), r_KN.shape[1])
    for a in range(0, k, _BLOCK):
        b = min(a + _BLOCK, k)
        with one_thread():
            for i in range(a, b):
                change = changes_KN[i - a]
                best = (q_KN[i] * s_KN[i]).add_(r_KN[i], alpha=1.0 / curvature[i])
                grid.nearest_(best.mul_(inverse_KN[i]))
                torch.sub(best, q_KN[i], out=change).mul_(s_KN[i])
                q_KN[i] = best
                r_KN[i + 1 : b].addr_(h_KK[i, i + 1 : b], change, alpha=-1)
        r_KN[b:].addmm_(h_KK[b:, a:b], changes_KN[: b - a], alpha=-1)  # what is before is not looked at again
    return q_KN.to(torch.int8).t()


def refitted(w_NK: Tensor, q_NK: Tensor, scales_NG: Tensor, h_KK: Tensor) -> Tensor:
    """Scales float32 [N, G] of least error for given codes, groups along K; groups of zeros, and of scale 0, keep
    their own.

    Each row is a system of G equations: sum_h (q_g^T H_gh q_h) s_h = q_g^T H_g w.
    """
    count = scales_NG.shape[-1]
    h_GgK = h_KK.unflatten(0, (count, -1))
    pieces = []
    step = max(1, _REFIT // (count * len(h_KK)))
    for w, q, s in zip(w_NK.split(step), q_NK.split(step), scales_NG.split(step), strict=True):
        q_nGg = q.to(torch.float32).unflatten(-1, (count, -1))
        qh_nGK = torch.einsum("ngi,gik->ngk", q_nGg, h_GgK)
        a_nGG = (qh_nGK.unflatten(-1, (count, -1)) * q_nGg.unsqueeze(1)).sum(-1)
        b_nG = (qh_nGK @ w.unsqueeze(-1)).squeeze(-1)
        diagonal = a_nGG.diagonal(dim1=-2, dim2=-1)
        empty = (diagonal <= 0) | (s == 0)
        a_nGG = a_nGG + torch.diag_embed(torch.where(empty, 1.0, 1e-6 * diagonal))
        found, failed = torch.linalg.solve_ex(a_nGG, b_nG)
        bad = empty | (failed != 0).unsqueeze(-1) | ~torch.isfinite(found)
        pieces.append(torch.where(bad, s.to(torch.float32), found))
    return torch.cat(pieces)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
