"""How far the predictions of two models are apart, token by token, and what that is over a text.

KL divergence of a position: sum over the vocabulary of p (log p - log q), p the reference's prediction there, in nats;
0 for equal models. Perplexity: exp of the mean of -log of what was predicted for the token that follows.

T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_ROWS = 64  # whose probabilities are in memory at a time


@dataclass(frozen=True)
class Rows:
    """One chunk. `kld_T` and `top1_T` (the same likeliest token) of every position; -log p of each token that follows,
    by the reference and by the model under test, of all positions but the last. A row that is not finite: inf, False.
    """

    domain: str
    kld_T: np.ndarray
    top1_T: np.ndarray
    reference_nll: np.ndarray
    nll: np.ndarray


def compare(domain: str, ids: Sequence[int], reference_TV: np.ndarray, actual_TV: np.ndarray) -> Rows:
    """Logits of both models for `ids`, float32. Their log-probabilities are float32 and good to some 1e-6."""
    if reference_TV.shape != actual_TV.shape or len(reference_TV) != len(ids):
        raise ValueError(f"logits {reference_TV.shape} and {actual_TV.shape} of {len(ids)} tokens")
    next_T = torch.tensor([*ids[1:], 0])  # nothing follows the last
    parts = []
    for start in range(0, len(ids), _ROWS):
        piece = slice(start, start + _ROWS)
        p, q = (torch.from_numpy(x[piece]).float().log_softmax(-1) for x in (reference_TV, actual_TV))
        finite = torch.isfinite(p).all(-1) & torch.isfinite(q).all(-1)
        kld = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).clamp(min=0)
        following = next_T[piece].unsqueeze(-1)
        losses = [-x.gather(-1, following)[:, 0].double() for x in (p, q)]
        worst = torch.tensor(torch.inf, dtype=torch.float64)
        row = [torch.where(finite, value, worst) for value in (kld, *losses)]
        parts.append([*row, (p.argmax(-1) == q.argmax(-1)) & finite])
    kld_T, reference, own, top1_T = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Rows(domain, kld_T, top1_T, reference[:-1], own[:-1])


@dataclass(frozen=True)
class Divergence:
    """Over `tokens` positions, in nats. `error`: standard error of the mean, from the means of the chunks (the
    positions of a chunk are not independent); nan for a single chunk."""

    tokens: int
    kld: float
    error: float
    median: float
    p95: float
    p99: float
    worst: float
    top1: float
    perplexity: float
    reference_perplexity: float

    @staticmethod
    def of(chunks: Sequence[Rows]) -> Divergence:
        """All chunks together."""
        kld = np.concatenate([c.kld_T for c in chunks])
        means = np.array([c.kld_T.mean() for c in chunks])
        with np.errstate(over="ignore", invalid="ignore"):
            error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
            own, reference = (
                float(np.exp(np.concatenate(losses).mean()))
                for losses in ([c.nll for c in chunks], [c.reference_nll for c in chunks])
            )
        # "higher": a percentile between a finite and an infinite row would be nan
        median, p95, p99 = (float(np.percentile(kld, at, method="higher")) for at in (50, 95, 99))
        return Divergence(
            tokens=len(kld),
            kld=float(kld.mean()),
            error=error,
            median=median,
            p95=p95,
            p99=p99,
            worst=float(kld.max()),
            top1=float(np.concatenate([c.top1_T for c in chunks]).mean()),
            perplexity=own,
            reference_perplexity=reference,
        )

    def to_json(self) -> dict[str, Any]:
        """Fields by name; numbers that JSON does not have become strings."""
        return {k: v if np.isfinite(v) else str(v) for k, v in vars(self).items()}


def by_domain(chunks: Sequence[Rows]) -> Mapping[str, Divergence]:
    """The chunks of each domain, in the order they come."""
    return {
        name: Divergence.of([c for c in chunks if c.domain == name]) for name in dict.fromkeys(c.domain for c in chunks)
    }
