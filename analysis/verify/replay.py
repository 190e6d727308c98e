"""Makes a `Replay`: runs an artifact's session on a prompt and records logits and traces of every MoE layer.

T tokens, V vocabulary, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from moec.compiler.errors import ArtifactError
from moec.compiler.reference import Replay
from moec.compiler.session import joined_layer
from moec.compiler.target import MoeTrace, Session


def replay_prompt(session: Session, ids: Sequence[int], moe_layers: int) -> Replay:
    """Prefill `ids` into an empty cache with traces on. ArtifactError if the artifact leaves any of them out."""
    return _traced(session, ids, moe_layers, lambda: session.prefill(list(ids), logits="all"))


def replay_in_pieces(session: Session, ids: Sequence[int], moe_layers: int, steps: int) -> Replay:
    """The same, in odd chunks and then `steps` single tokens, as a chat does: chunk boundaries may be wrong."""

    def run() -> np.ndarray:
        head = len(ids) - steps
        parts = [session.prefill(list(ids[a:b]), logits="all") for a, b in pairwise(bounds(head))]
        return np.concatenate([*parts, *(np.asarray(session.decode(int(t)))[None] for t in ids[head:])])

    return _traced(session, ids, moe_layers, run)


def _traced(session: Session, ids: Sequence[int], moe_layers: int, run: Callable[[], np.ndarray]) -> Replay:
    session.reset()
    session.trace(True)
    session.take_traces()
    try:
        logits_TV = np.asarray(run())
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
    return tuple(joined_layer(parts) for _, parts in sorted(by_layer.items()))


def bounds(tokens: int) -> list[int]:
    """Ends of chunks that are hard for kernels: a single token, odd lengths, none a power of two."""
    return [0, *(c for c in (1, 8, 71) if c < tokens), tokens] if tokens else [0]


def experts_used(replays: Mapping[str, Replay], layer: int) -> int:
    """How many different experts of a layer any token of any prompt selected."""
    return len(np.unique(np.concatenate([r.layers[layer].indices_TK.ravel() for r in replays.values()])))
