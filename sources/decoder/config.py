"""The decoder of a spec, for what is done to decoders only: training them, synthesizing their weights."""

from __future__ import annotations

from moec.compiler.errors import SpecError
from moec.compiler.spec.model import DecoderConfig, Spec


def decoder_of(spec: Spec, what: str) -> DecoderConfig:
    """The decoder that a spec describes. SpecError for a model of another source: `what` is done to decoders only."""
    if not isinstance(spec.model, DecoderConfig):
        raise SpecError(f"only a `model:` with an `architecture:` of moec's own can be {what}", place=spec.name)
    return spec.model
