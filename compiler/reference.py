"""What an artifact is verified against: its model in eager PyTorch, computed and rounded as the artifact should.

`ModelSource.reference` gives one that can follow an artifact layer by layer. For a source without one, verification
runs the exported program instead, and compares each fused node on the artifact's own input.

T tokens, D model width, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from moec.compiler.target import MoeTrace

# Relative, per element: what an fp32 sum of about a thousand terms (a norm, a dot product) loses by its order.
NOISE = 5e-7
# The same of our kernels on unrounded activations, which add products one after the other. Measured against float64:
# 1.2e-7 to 6.8e-7 (K of 384 to 1536, groups along either axis; tests/runtime/test_kernel_linear.py).
FLOAT_NOISE = 7e-7

Prompts = Mapping[str, Sequence[int]]  # token ids by the name of the prompt
Selections = Mapping[str, Sequence[np.ndarray]]  # by prompt and MoE layer: expert indices, int [T, K]


@dataclass(frozen=True)
class Routed:
    """What a router did with T tokens.

    scores_TE: what top-k saw, float32, so that ties can be found. indices_TK: the free selection, int64, best first.
    weights_TK: combine weights, float32, of the selection that was forced if one was, else of the free one.
    """

    scores_TE: np.ndarray
    indices_TK: np.ndarray
    weights_TK: np.ndarray


@dataclass(frozen=True)
class Followed:
    """One MoE layer of one prompt: `x_TD`, the block's input as the reference computes it from the artifact's previous
    layer, and `y_TD`, the block's output for the artifact's own input and routing."""

    x_TD: np.ndarray
    y_TD: np.ndarray


@dataclass(frozen=True)
class Replay:
    """One prompt through the artifact: all logits [T, V] and one trace per MoE layer, in order, over all T tokens."""

    ids: tuple[int, ...]
    logits_TV: np.ndarray
    layers: tuple[MoeTrace, ...]


class ReferenceBlock(Protocol):
    """One MoE layer with its weights loaded."""

    def route(self, x_TD: np.ndarray, forced_TK: np.ndarray | None = None) -> Routed:
        """Select freely; the combine weights are those of `forced_TK` if it is given."""
        ...


OnLayer = Callable[[int, Any, Mapping[str, Routed]], None]
OnFollowed = Callable[[int, ReferenceBlock, Mapping[str, Followed]], None]


class Reference(Protocol):
    """The model on its own, from token ids to logits."""

    def run(
        self, prompts: Prompts, on_layer: OnLayer | None = None, *, routing: Selections | None = None
    ) -> Mapping[str, np.ndarray]:
        """Logits float32 [T, V] by prompt, each from position 0.

        `on_layer(n, block, routed)` is called once for the n-th MoE layer, with the selections that it makes of each
        prompt's tokens. `routing`: the experts of every token, used instead of those.
        """
        ...

    def perturbed(
        self,
        prompts: Prompts,
        on_layer: OnLayer | None = None,
        *,
        routing: Selections | None = None,
        relative: float = NOISE,
    ) -> Mapping[str, np.ndarray]:
        """`run` with noise of `relative` its size in what every norm puts out, the same at every call: how far two
        correct implementations drift apart."""
        ...


class LayerReference(Reference, Protocol):
    """A reference that can also follow an artifact."""

    def follow(self, replays: Mapping[str, Replay], on_layer: OnFollowed) -> Mapping[str, np.ndarray]:
        """Logits [T, V] by prompt. Every part starts from the artifact's own values: attention from the stream that the
        artifact's previous layer left, each MoE block from the artifact's input and routing, the head from the last.
        """
        ...
