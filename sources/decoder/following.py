"""The decoder's reference in the three ways that verification runs it.

    free       on its own, from token ids to logits
    following  re-synchronised with an artifact at the input and output of every MoE block: each part starts from what
               the artifact itself computed, so an error shows in the part that made it
    perturbed  free, with what every norm of the stream puts out multiplied by 1 + 5e-7 * noise: how far two *correct*
               implementations drift apart

Why not free alone: dynamic INT8 rounding amplifies. A relative error e of a row of spread s flips about 30 e of its
elements to the next of 127 steps; the flips are an error of about 0.15 sqrt(e) for the next rounding. From fp32's 1e-7
it takes three or four roundings until two runs round independently of each other, whatever the care of either.
`perturbed` measures where that ends for the model at hand, and `following` checks every layer before it begins.

T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from moec.compiler.reference import (
    NOISE,
    Followed,
    OnFollowed,
    OnLayer,
    Prompts,
    ReferenceBlock,
    Replay,
    Routed,
    Selections,
)
from moec.sources.decoder.simulate import LayerRecord, Reference

# Elements whose norm weight is this much smaller than the median say nothing of the stream they came from.
_BLIND = 1e-2


class DecoderReference(Reference):
    """A `Reference` that can also follow an artifact, or be perturbed: the `LayerReference` of
    compiler/reference.py."""

    _replays: Mapping[str, Replay] | None = None
    _predicted: dict[str, np.ndarray]
    _noise: torch.Generator | None = None
    _relative = NOISE

    def follow(self, replays: Mapping[str, Replay], on_layer: OnFollowed) -> dict[str, np.ndarray]:
        """Logits [T, V] by prompt. Every part starts from the artifact's own values: attention from the stream that the
        artifact's previous layer left, each MoE block from the artifact's input and routing, the head from the last."""
        self._replays, self._predicted = replays, {}
        forced = {name: [t.indices_TK for t in replay.layers] for name, replay in replays.items()}
        prompts = {name: replay.ids for name, replay in replays.items()}
        records: list[LayerRecord] = []

        def followed(layer: int, block: ReferenceBlock, _: Mapping[str, Routed]) -> None:
            found = {
                name: Followed(self._predicted[name], record.y_TD)
                for name, record in zip(prompts, records, strict=True)
            }
            records.clear()
            on_layer(layer, block, found)

        try:
            with torch.no_grad():
                return self._run(prompts, followed, forced, records)
        finally:
            self._replays = None

    def perturbed(
        self,
        prompts: Prompts,
        on_layer: OnLayer | None = None,
        *,
        routing: Selections | None = None,
        relative: float = NOISE,
    ) -> dict[str, np.ndarray]:
        """`run` with noise of `relative` its size in every norm's output; the same noise at every call."""
        self._noise, self._relative = torch.Generator().manual_seed(0), relative
        try:
            return self.run(prompts, on_layer, routing=routing)
        finally:
            self._noise = None

    def _normed(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        y_TD = super()._normed(x_TD, weight)
        if self._noise is None:
            return y_TD
        return y_TD * (1 + self._relative * torch.randn(y_TD.shape, generator=self._noise))

    def _block_inputs(
        self, layer: int, streams: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        streams, inputs = super()._block_inputs(layer, streams)
        if self._replays is None:
            return streams, inputs
        self._predicted = {name: x_TD.numpy() for name, x_TD in inputs.items()}
        theirs = {n: torch.from_numpy(np.ascontiguousarray(r.layers[layer].x_TD)) for n, r in self._replays.items()}
        norm_D = self._vector(f"model.layers.{layer}.post_attention_layernorm.weight")
        return {n: stream_of(x_TD, norm_D, streams[n]) for n, x_TD in theirs.items()}, theirs

    def _passed_on(self, layer: int, prompt: str, y_TD: np.ndarray) -> np.ndarray:
        return y_TD if self._replays is None else self._replays[prompt].layers[layer].y_TD


def stream_of(x_TD: Tensor, norm_D: Tensor, like_TD: Tensor) -> Tensor:
    """The residual stream whose RMS norm with weight `norm_D` is `x_TD`: its direction is known, its length is not.

    Each row gets the length that fits `like_TD` best (least squares), an estimate of the stream whose error is mostly
    in direction. Elements that the norm blots out are taken from it.
    """
    seen_D = norm_D.abs() > _BLIND * norm_D.abs().median()
    u_TD = torch.where(seen_D, x_TD / torch.where(seen_D, norm_D, 1.0), 0.0)
    v_TD = torch.where(seen_D, like_TD, 0.0)
    length_T1 = (u_TD * v_TD).sum(-1, keepdim=True) / (u_TD * u_TD).sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.where(seen_D, u_TD * length_T1, like_TD)
