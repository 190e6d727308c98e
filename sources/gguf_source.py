"""`model: {gguf: FILE}`: a model in one GGUF file, with its tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from moec.compiler.errors import CheckpointError
from moec.compiler.source import Checkpoint, ModelSource, Weights, register
from moec.compiler.spec.model import LoosePath, Tokens
from moec.compiler.spec.strict import Fault, Section

if TYPE_CHECKING:
    from moec.compiler.architecture import Architecture
    from moec.compiler.program import Program
    from moec.compiler.spec.model import Spec


class GgufModel(Section):
    """A GGUF file. Codes of Q4_0, Q8_0 and IQ4_NL reach the artifact bit for bit, those of Q5_0 as INT8 codes of the
    same values.

    `context`: positions of the KV cache; default: as many as the model was trained for, which may be more than fit.
    `dequantize`: types of tensors (Q4_K, Q6_K, ...) whose values are used as floats, which `quantization:` then rounds
    anew; a file with other quantized types is refused unless they are named here.
    """

    gguf: LoosePath
    context: Tokens | None = None
    dequantize: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        given = raw.get("dequantize", ())
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(kind, str) for kind in given):
            return
        from moec.checkpoints.spec_from_gguf import unknown_types

        for kind in unknown_types(given):
            yield Fault(
                ("dequantize",), f"{kind} is no quantized type of GGUF; they are called Q4_K, Q6_K, IQ4_XS, ..."
            )


class GgufSource(ModelSource[GgufModel]):
    """The file brings its own weights; another file of the same model may be named."""

    key = "gguf"
    section = GgufModel

    def has_weights(self, spec: Spec) -> bool:
        return True

    def open(self, spec: Spec, checkpoint: Path | None) -> Checkpoint:
        from moec.sources.gguf_model import open_gguf

        model = self.model(spec)
        return open_gguf(checkpoint if checkpoint is not None else model.gguf, spec.quantization, model.dequantize)

    def reopen(self, spec: Spec, recorded: Path, given: Path | None) -> Checkpoint:
        file = given if given is not None else recorded
        if not file.is_file():
            remedy = "name the file where it is now with --checkpoint"
            raise CheckpointError(f"the GGUF file of {spec.name} is not there", place=str(file), remedy=remedy)
        return self.open(spec, file)

    def export(self, spec: Spec, weights: Weights | None, *, max_tokens: int) -> Program:
        from moec.sources.gguf_model import described
        from moec.sources.transformers_model import export_config

        model = self.model(spec)
        config, ends = described(model.gguf)
        return export_config(
            config, model.gguf, spec.name, weights=weights, max_tokens=max_tokens, context=model.context, eos_ids=ends
        )

    def architecture(self, spec: Spec) -> Architecture:
        from moec.sources.gguf_model import described
        from moec.sources.transformers_architecture import architecture_of_config

        model = self.model(spec)
        return architecture_of_config(described(model.gguf)[0], model.gguf, spec.name, model.context)


register(GgufSource())
