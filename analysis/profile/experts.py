"""Which experts a text reaches: selections counted by layer, expert and domain (MobileMoE, appendix D).

L layers, E experts. Counts are int64 [L, E].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np


def counts_array(rows: Sequence[Sequence[int]], experts: int | None = None) -> np.ndarray:
    """Ragged rows, as the runner prints them, as int64 [L, E]; `experts` None: as many as were seen."""
    width = max([len(row) for row in rows], default=0) if experts is None else experts
    counts_LE = np.zeros((len(rows), width), np.int64)
    for layer, row in enumerate(rows):
        counts_LE[layer, : len(row)] = row
    return counts_LE


def entropy(counts_LE: np.ndarray) -> np.ndarray:
    """Normalised entropy of each layer's selections, float64 [L]: 0 one expert only, 1 all evenly."""
    if counts_LE.shape[1] < 2:
        return np.zeros(len(counts_LE))
    return _entropy_bits(_shares(counts_LE)) / np.log2(counts_LE.shape[1])


def divergence(a_LE: np.ndarray, b_LE: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of two domains' selections by layer, in bits, float64 [L]: 0 the same, 1 disjoint."""
    p_LE, q_LE = _shares(a_LE), _shares(b_LE)
    mixed = _entropy_bits((p_LE + q_LE) / 2)
    return np.maximum(mixed - (_entropy_bits(p_LE) + _entropy_bits(q_LE)) / 2, 0.0)  # rounding may leave -1e-17


def utilisation(by_domain: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Counts, shares and entropy of each domain, and how far domains are apart, as plain values for JSON."""
    domains = {
        name: {
            "selections": int(counts.sum()),
            "experts_used": int((counts > 0).sum()),
            "experts_used_share": float((counts > 0).mean()) if counts.size else 0.0,
            "entropy": float(entropy(counts).mean()) if len(counts) else 0.0,
            "counts": counts.tolist(),
        }
        for name, counts in by_domain.items()
    }
    apart = {
        f"{a} / {b}": float(divergence(by_domain[a], by_domain[b]).mean())
        for a, b in combinations(by_domain, 2)
        if len(by_domain[a])
    }
    first = next(iter(by_domain.values()))
    return {"layers": first.shape[0], "experts": first.shape[1], "domains": domains, "divergence_bits": apart}


def _shares(counts_LE: np.ndarray) -> np.ndarray:
    totals = counts_LE.sum(axis=1, keepdims=True)
    return counts_LE / np.maximum(totals, 1)


def _entropy_bits(shares_LE: np.ndarray) -> np.ndarray:
    safe = np.where(shares_LE > 0, shares_LE, 1.0)
    return -(shares_LE * np.log2(safe)).sum(axis=1)
