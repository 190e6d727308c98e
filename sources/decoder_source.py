"""`model: {architecture: mobilemoe | mobilellm, ...}`: a decoder of moec's own, described by its sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.errors import CheckpointError
from moec.compiler.source import Checkpoint, ModelSource, Weights, register
from moec.compiler.spec.strict import Fault
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import group_faults, parameter_counts

if TYPE_CHECKING:
    from moec.compiler.architecture import Architecture
    from moec.compiler.program import Program, Role
    from moec.compiler.reference import LayerReference
    from moec.compiler.spec.model import Spec
    from moec.compiler.spec.quantization import Quantization


class DecoderSource(ModelSource[DecoderConfig]):
    """The weights are a checkpoint in the released layout, which the spec or the user names."""

    key = "architecture"
    default = True
    section = DecoderConfig

    def quantization_faults(self, model: DecoderConfig, quantization: Quantization) -> Iterator[Fault]:
        return group_faults(model, quantization)

    def parameters(self, model: DecoderConfig) -> Mapping[str, int]:
        return parameter_counts(model)

    def smaller(self, model: DecoderConfig) -> Iterator[tuple[str, DecoderConfig]]:
        """Half the experts, half the layers, half the dense width, a tied head."""
        moe = model.moe
        if moe is not None and moe.experts // 2 >= moe.top_k:
            fewer = moe.model_copy(update={"experts": moe.experts // 2})
            yield f"{moe.experts // 2} experts instead of {moe.experts}", model.model_copy(update={"moe": fewer})
        if model.layers > 1:
            half = model.layers // 2
            yield f"{half} layers instead of {model.layers}", model.model_copy(update={"layers": half})
        if model.ffn_width is not None and model.ffn_width >= 512:
            half = model.ffn_width // 2
            yield f"ffn_width {half} instead of {model.ffn_width}", model.model_copy(update={"ffn_width": half})
        if not model.tied_embeddings:
            yield "tied_embeddings: true", model.model_copy(update={"tied_embeddings": True})

    def single_layer(self, model: DecoderConfig) -> DecoderConfig:
        return model.model_copy(update={"layers": 1})

    def has_weights(self, spec: Spec) -> bool:
        return False

    def open(self, spec: Spec, checkpoint: Path | None) -> Checkpoint:
        from moec.checkpoints import open_store

        if checkpoint is None:
            raise CheckpointError(
                "the spec names no checkpoint",
                place=spec.name,
                remedy="give --checkpoint DIR, or make a random one with `moec checkpoint synthesize`",
            )
        return open_store(checkpoint, self.model(spec))

    def export(self, spec: Spec, weights: Weights | None, *, max_tokens: int) -> Program:
        from moec.sources.decoder.export import export_decoder

        return export_decoder(self.model(spec), spec.name, weights, max_tokens=max_tokens)

    def architecture(self, spec: Spec) -> Architecture:
        from moec.sources.decoder.architecture import architecture_of

        tensors = () if spec.quantization is None else spec.quantization.tensors
        return architecture_of(self.model(spec), spec.name, by_tensor=bool(tensors))

    def reference(
        self,
        spec: Spec,
        checkpoint: Checkpoint,
        quantization: Quantization | None,
        *,
        asymmetric_roles: Collection[Role] = (),
        integer_attention: bool = False,
    ) -> LayerReference:
        from moec.checkpoints import WeightStore
        from moec.sources.decoder.following import DecoderReference

        assert isinstance(checkpoint, WeightStore), "`open` gives one"
        return DecoderReference(
            self.model(spec),
            checkpoint,
            quantization,
            asymmetric_roles=asymmetric_roles,
            integer_attention=integer_attention,
        )


register(DecoderSource())
