"""The caches that a transformers model is exported with: buffers of ours behind the interface of its cache objects.

Every layer of the model gets buffers by its type: keys and values of all positions, the last inputs of convolutions,
recurrent states, or none. Their shapes are learnt from one call with fake values; the exported call then reads and
writes the buffers it is given. A call at position 0 starts a sequence: states are read as zero, and masks hide old rows
of the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    get_layer_types_and_kwargs,
)

CONVOLUTION, RECURRENCE = "conv", "state"


class StateLayer(LinearAttentionLayer):
    """The states of one layer. Without `held` buffers it notes their shapes: see `shapes`."""

    def __init__(self, number_of_states: int = 1) -> None:
        super().__init__(number_of_states)
        self.shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        self.held: dict[tuple[str, int], Tensor] = {}
        self.anew: Tensor | None = None  # bool [1], whether this call begins a sequence

    def content(self, kind: str, index: int) -> Tensor | None:
        """What a call goes on from, None while shapes are learnt."""
        held = self.held.get((kind, index))
        if held is None or self.anew is None:
            return None
        return torch.where(self.anew, torch.zeros((), dtype=held.dtype), held)

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """[1, C, T] -> [1, C, K-1+T]: the inputs before those of this call in front; the last K-1 are kept."""
        if conv_kernel_size is None:
            raise ValueError("it updates a convolution's state without saying how many taps the convolution has")
        keep = conv_kernel_size - 1
        if keep == 0:
            return conv_states
        before = self.content(CONVOLUTION, state_idx)
        if before is None:
            self.shapes[CONVOLUTION, state_idx] = (*conv_states.shape[:-1], keep)
            return pad(conv_states, (keep, 0))
        every = torch.cat((before, conv_states), -1)
        self.held[CONVOLUTION, state_idx].copy_(every[..., -keep:])
        return every

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        held = self.held.get((RECURRENCE, state_idx))
        if held is None:
            self.shapes[RECURRENCE, state_idx] = tuple(recurrent_states.shape)
            return recurrent_states
        held.copy_(recurrent_states)
        return recurrent_states


class StateAndAttentionLayer(StateLayer, StaticLayer):  # type: ignore[misc, override]
    """A layer that has both: states, and keys and values."""

    def __init__(self, length: int, number_of_states: int = 1) -> None:
        StaticLayer.__init__(self, length)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        StaticLayer.lazy_initialization(self, *args, **kwargs)


class HeldCache(StaticCache):
    """A layer for each of the model's, by the types that its config gives them."""

    def __init__(self, config: Any, length: int) -> None:
        text = config.get_text_config(decoder=True)
        kinds, given = get_layer_types_and_kwargs(text)
        layers = [_layer(kind, more, length) for kind, more in zip(kinds, given, strict=True)]
        Cache.__init__(self, layers=layers)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """None, upon which a model goes through `update_conv_state`, for one token as for many."""
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self.layers[layer_idx]
        return layer.content(RECURRENCE, state_idx) if isinstance(layer, StateLayer) else None

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        if not any(isinstance(layer, StaticLayer) for layer in self.layers):
            return 0  # nothing has positions, and nothing masks
        return super().get_seq_length(layer_idx)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each buffer, after a call that taught them."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StaticLayer) and layer.is_initialized:
                yield f"cache_k_{index}", tuple(layer.keys.shape)
                yield f"cache_v_{index}", tuple(layer.values.shape)
            if isinstance(layer, StateLayer):
                for (kind, state), shape in layer.shapes.items():
                    yield _name(kind, index, state), shape

    def hold(self, buffers: dict[str, Tensor], start_pos: Tensor) -> None:
        """Read and write `buffers`, of the names and shapes of `shapes`, from position `start_pos` [1] on."""
        anew = start_pos == 0
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StaticLayer) and f"cache_k_{index}" in buffers:
                layer.keys, layer.values = buffers[f"cache_k_{index}"], buffers[f"cache_v_{index}"]
                layer.dtype, layer.device = torch.float32, layer.keys.device
                layer.batch_size, layer.num_heads = layer.keys.shape[:2]
                layer.k_head_dim, layer.v_head_dim = layer.keys.shape[-1], layer.values.shape[-1]
                layer.cumulative_length = start_pos[0].clone()
                layer.is_initialized = True
            if isinstance(layer, StateLayer):
                layer.anew = anew
                for kind in (CONVOLUTION, RECURRENCE):
                    for state in range(layer.number_of_states):
                        if _name(kind, index, state) in buffers:
                            layer.held[kind, state] = buffers[_name(kind, index, state)]


def _name(kind: str, layer: int, state: int) -> str:
    return f"cache_{kind}_{layer}" + (f"_{state}" if state else "")


def _layer(kind: str, given: dict[str, Any], length: int) -> Any:
    """What a layer of a type keeps. A sliding layer keeps every position, too: its rolling buffer has control flow that
    cannot be captured; the mask hides the rest."""
    states = given.get("number_of_states", 1)
    if kind in ("conv", "linear_attention"):
        return StateLayer(states)
    if kind in ("hybrid", "hybrid_sliding"):
        return StateAndAttentionLayer(length, states)
    return DummyLayer() if kind == "dummy" else StaticLayer(length)
