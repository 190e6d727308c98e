"""`model: {transformers: FOLDER}`: a causal language model of the transformers library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from moec.compiler.source import Checkpoint, ModelSource, Weights, register
from moec.compiler.spec.model import LoosePath, Tokens
from moec.compiler.spec.strict import Section

if TYPE_CHECKING:
    from moec.compiler.architecture import Architecture
    from moec.compiler.program import Program
    from moec.compiler.spec.model import Spec


class TransformersModel(Section):
    """A model of the transformers library: a folder with config.json (and weights), or a config.json alone.

    `context`: positions of its KV cache; default: as many as the model was trained for, which may be more than fit.
    `dequantize`: formats of codes that the files hold (MXFP4, GPTQ, AWQ, compressed-tensors, FP8) whose values are used
    as floats, which `quantization:` then rounds anew; codes of a format that is not named are carried, or refused.
    `adapters`: folders of LoRA adapters of PEFT, which are merged into the weights, in this order, before quantization.
    """

    transformers: LoosePath
    context: Tokens | None = None
    dequantize: Annotated[
        tuple[Literal["MXFP4", "GPTQ", "AWQ", "compressed-tensors", "FP8"], ...], Field(strict=False)
    ] = ()
    adapters: Annotated[tuple[LoosePath, ...], Field(strict=False)] = ()


class TransformersSource(ModelSource[TransformersModel]):
    """It brings its own weights unless another checkpoint is named."""

    key = "transformers"
    section = TransformersModel

    def has_weights(self, spec: Spec) -> bool:
        folder = self.model(spec).transformers
        return any((folder if folder.is_dir() else folder.parent).glob("*.safetensors"))

    def open(self, spec: Spec, checkpoint: Path | None) -> Checkpoint:
        from moec.sources.transformers_model import TransformersStore

        model = self.model(spec)
        folder = model.transformers
        store = TransformersStore(checkpoint if checkpoint is not None else folder, model.dequantize)
        store.check(folder)
        store.merge(model.adapters)
        store.check_codes(spec.quantization)
        return store

    def export(self, spec: Spec, weights: Weights | None, *, max_tokens: int) -> Program:
        from moec.sources.transformers_model import export_transformers

        model = self.model(spec)
        return export_transformers(
            model.transformers, spec.name, weights=weights, max_tokens=max_tokens, context=model.context
        )

    def architecture(self, spec: Spec) -> Architecture:
        from moec.sources.transformers_architecture import architecture_of_transformers

        model = self.model(spec)
        return architecture_of_transformers(model.transformers, spec.name, model.context)


register(TransformersSource())
