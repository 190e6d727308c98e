"""A session made of the eager decoder, and a reference with its weights, for tests of the comparison itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moec.analysis.verify.weights import adversarial_weights
from moec.compiler.program import LazyWeight
from moec.compiler.target import MoeTrace
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.decoder import Decoder, MoeBlock
from moec.sources.decoder.following import DecoderReference
from moec.sources.decoder.layout import weight_layout

CONFIG = {
    "architecture": "mobilemoe", "layers": 3, "d_model": 48, "heads": 3, "kv_heads": 1, "head_dim": 16,
    "vocab_size": 211, "context": 64, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 7, "top_k": 3, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip


def decoder(seed: int = 0, **changes: object) -> Decoder:
    config = DecoderConfig.model_validate({**CONFIG, **changes})
    model = Decoder(config, "loop").eval()
    layout = weight_layout(config)
    weights = adversarial_weights(
        {n: i.shape for n, i in layout.items()}, {n: i.role for n, i in layout.items()}, seed=seed
    )
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name].load())
    return model


def blocks(model: Decoder) -> list[MoeBlock]:
    return [m for m in model.modules() if isinstance(m, MoeBlock)]


class FakeSession:
    """The eager model behind the interface of an artifact. `damage` alters the output of each MoE layer."""

    def __init__(self, model: Decoder, damage: Callable[[int, torch.Tensor], torch.Tensor] | None = None) -> None:
        self.model = model
        self.vocab_size, self.context = model.config.vocab_size, model.config.context
        self.position = 0
        self._traces: list[MoeTrace] | None = None
        for layer, block in enumerate(blocks(model)):
            block.register_forward_hook(self._hook(layer, damage))

    def _hook(self, layer: int, damage: Callable[[int, torch.Tensor], torch.Tensor] | None):  # type: ignore[no-untyped-def]
        def hook(block: MoeBlock, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            output = output if damage is None else damage(layer, output)
            if self._traces is not None:
                x_TD = inputs[0].flatten(0, 1)
                indices, weights = block.route(x_TD)
                self._traces.append(
                    MoeTrace(layer, x_TD.numpy(), indices.numpy().astype(np.int32), weights.numpy(), output[0].numpy())
                )
            return output

        return hook

    def prefill(self, ids: Sequence[int], logits: str = "last") -> np.ndarray:
        with torch.no_grad():
            out = self.model(torch.tensor([list(ids)]), torch.tensor([self.position]))[0].numpy()
        self.position += len(ids)
        return out if logits == "all" else out[-1:]

    def decode(self, token: int) -> np.ndarray:
        return self.prefill([token])[0]

    def reset(self) -> None:
        self.position = 0
        self.model.reset()

    def trace(self, enabled: bool) -> None:
        self._traces = [] if enabled else None

    def take_traces(self) -> list[MoeTrace]:
        taken, self._traces = self._traces or [], [] if self._traces is not None else None
        return taken

    def close(self) -> None:
        pass


def reference(model: Decoder) -> DecoderReference:
    """The streamed reference with the weights of `model`, unrounded."""
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    weights = {n: LazyWeight(tuple(w.shape), torch.float32, lambda w=w: w) for n, w in tensors.items()}
    return DecoderReference(model.config, weights, None)
