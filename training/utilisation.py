"""Which experts serve which text: counts by (layer, expert, domain), and how far apart the domains are.

For a layer, p_d is how the selections of domain d are spread over the experts. Entropy H(p_d) in bits says how many
experts a domain uses (2^H of them, were they used evenly). The Jensen-Shannon divergence of the domains,
JSD = H(mean_d p_d) - mean_d H(p_d) in bits, is 0 when all use the experts alike and log2(number of domains) when no two
share one. It is above 0 for any finite sample: the control gives the same rows of text shuffled domain labels and
measures again, so that only what lies above the control is specialisation.

R rows of text, L MoE layers, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from moec.training.data.shards import Corpus
    from moec.training.model import TrainingDecoder

_SHUFFLES = 200


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts [..., E] as shares of their sum, float64; rows without a selection are even."""
    counts = np.asarray(counts, np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), 1 / counts.shape[-1])


def entropy(p: np.ndarray) -> np.ndarray:
    """In bits, over the last axis."""
    p = np.asarray(p, np.float64)
    return -np.where(p > 0, p * np.log2(np.where(p > 0, p, 1)), 0.0).sum(axis=-1)


def divergence(p_DxE: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits of the distributions along the first axis: [D, ..., E] gives [...]."""
    return np.maximum(entropy(p_DxE.mean(axis=0)) - entropy(p_DxE).mean(axis=0), 0.0)


def by_domain(counts_RLE: np.ndarray, labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Counts of the rows of each domain together, [D, L, E]."""
    chosen = np.asarray(labels)
    return np.stack([counts_RLE[chosen == name].sum(axis=0) for name in names])


def shuffled_divergences(
    counts_RLE: np.ndarray, labels: Sequence[str], names: Sequence[str], seed: int, shuffles: int = _SHUFFLES
) -> np.ndarray:
    """The divergence of each layer with labels dealt at random to the rows, [shuffles, L]."""
    random = np.random.default_rng(seed)
    dealt = (random.permutation(np.asarray(labels)) for _ in range(shuffles))
    return np.stack([divergence(frequencies(by_domain(counts_RLE, d.tolist(), names))) for d in dealt])


def summary(counts_RLE: np.ndarray, labels: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Everything a report shows, as plain values: frequencies [D][L][E], entropy and effective experts [D][L],
    divergence [L] with the control's mean and largest, and the divergence of each pair of domains, mean of the layers.

    `p_value` is the share of shuffles (the observation counted among them) whose mean divergence reaches the
    observed one.
    """
    names = sorted(set(labels))
    p_DLE = frequencies(by_domain(counts_RLE, labels, names))
    observed_L = divergence(p_DLE)
    control_SL = shuffled_divergences(counts_RLE, labels, names, seed)
    reached = int((control_SL.mean(axis=1) >= observed_L.mean()).sum())
    return {
        "domains": names,
        "rows": len(labels),
        "selections": int(np.asarray(counts_RLE).sum()),
        "frequency": p_DLE.tolist(),
        "entropy": entropy(p_DLE).tolist(),
        "divergence": observed_L.tolist(),
        "divergence_mean": float(observed_L.mean()),
        "control_mean": float(control_SL.mean()),
        "control_largest": float(control_SL.mean(axis=1).max()),
        "control_by_layer": control_SL.mean(axis=0).tolist(),
        "p_value": (reached + 1) / (len(control_SL) + 1),
        "pairs": [[float(divergence(np.stack([a, b])).mean()) for b in p_DLE] for a in p_DLE],
    }


def from_loads(loads: Mapping[str, Sequence[Sequence[int]]]) -> tuple[list[str], np.ndarray]:
    """The `expert_load` of an evaluation in metrics.jsonl as (domains, counts [D, L, E])."""
    names = sorted(loads)
    return names, np.asarray([loads[name] for name in names], np.int64)


def expert_rows(model: TrainingDecoder, corpus: Corpus, *, context: int, rows: int) -> tuple[np.ndarray, list[str]]:
    """Selections of each held-out row by layer and expert, int64 [R, L, E], and the domain of each row.

    Up to `rows` rows of `context` tokens of every domain; padding is counted with its row.
    """
    import torch

    from moec.training.data.batches import heldout
    from moec.training.model import Forward

    counts, labels = [], []
    model.eval()
    with torch.no_grad():
        for domain in corpus.domains:
            for batch in heldout(corpus, domain, context, rows * context):
                for row in range(len(batch.domains_B)):
                    part = slice(row, row + 1)
                    parts = (batch.tokens_BT, batch.documents_BT, batch.targets_BT, batch.loss_mask_BT)
                    out = Forward(*model(*(tensor[part] for tensor in parts)))
                    counts.append(out.load_LE.numpy())
                    labels.append(domain)
    return np.stack(counts), labels
