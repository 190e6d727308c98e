"""Runs an artifact's session on prompts and keeps what it computed: logits, and the inputs, routing and outputs of MoE
layers.

T tokens, V vocabulary, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moec.compiler.errors import ArtifactError
from moec.compiler.target import MoeTrace, Session


@dataclass(frozen=True)
class Replay:
    """One prompt through the artifact: all logits [T, V] and one trace per MoE layer, in order, over all T tokens."""

    ids: tuple[int, ...]
    logits_TV: np.ndarray
    layers: tuple[MoeTrace, ...]


def replay_prompt(session: Session, ids: Sequence[int], moe_layers: int) -> Replay:
    """Prefill `ids` into an empty cache with traces on. ArtifactError if the artifact leaves any of them out."""
    session.reset()
    session.trace(True)
    session.take_traces()
    try:
        logits_TV = np.asarray(session.prefill(list(ids), logits="all"))
        traces = joined_traces(session.take_traces())
    finally:
        session.trace(False)
    if logits_TV.shape[0] != len(ids):
        raise ArtifactError(f"{logits_TV.shape[0]} rows of logits for {len(ids)} tokens", remedy="compile it again")
    if [t.layer for t in traces] != list(range(moe_layers)):
        raise ArtifactError(
            f"traced MoE layers {[t.layer for t in traces]}, the manifest lists {moe_layers}", remedy="compile it again"
        )
    for t in traces:
        if len(t.x_TD) != len(ids):
            raise ArtifactError(f"MoE layer {t.layer} ran on {len(t.x_TD)} of {len(ids)} tokens")
    return Replay(tuple(ids), logits_TV, traces)


def joined_traces(traces: Sequence[MoeTrace]) -> tuple[MoeTrace, ...]:
    """One trace per layer from those of successive calls, tokens in the order they ran."""
    by_layer: dict[int, list[MoeTrace]] = {}
    for t in traces:
        by_layer.setdefault(t.layer, []).append(t)
    return tuple(
        MoeTrace(
            layer=layer,
            x_TD=np.concatenate([t.x_TD for t in parts]),
            indices_TK=np.concatenate([t.indices_TK for t in parts]),
            weights_TK=np.concatenate([t.weights_TK for t in parts]),
            y_TD=np.concatenate([t.y_TD for t in parts]),
        )
        for layer, parts in sorted(by_layer.items())
    )


def decode_tail(session: Session, ids: Sequence[int], steps: int) -> np.ndarray:
    """The last `steps` rows of logits, [steps, V], computed one token at a time after a prefill of the rest."""
    head = list(ids[: len(ids) - steps])
    session.reset()
    if head:
        session.prefill(head, logits="last")
    return np.stack([np.asarray(session.decode(int(token))) for token in ids[len(head) :]])


def prefill_in_chunks(session: Session, ids: Sequence[int], cuts: Sequence[int]) -> np.ndarray:
    """All logits [T, V], prefilled in several calls that start at 0 and each of `cuts`."""
    session.reset()
    bounds = [0, *sorted({c for c in cuts if 0 < c < len(ids)}), len(ids)]
    parts = [session.prefill(list(ids[a:b]), logits="all") for a, b in pairwise(bounds)]
    return np.concatenate([np.asarray(p) for p in parts])


def odd_cuts(tokens: int) -> list[int]:
    """Boundaries that no kernel likes: a single token, an odd piece, a piece that ends one before a power of two."""
    return [c for c in (1, 8, 71) if c < tokens]


def experts_used(replays: Mapping[str, Replay], layer: int) -> int:
    """How many different experts of a layer any token of any prompt selected."""
    return len(np.unique(np.concatenate([r.layers[layer].indices_TK.ravel() for r in replays.values()])))
