"""`moec quality`: several artifacts and checkpoints against one float model, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moec.analysis.verify.artifact import open_artifact_checkpoint, spec_of
from moec.analysis.verify.prompts import TextEncoder
from moec.analysis.verify.quality.divergence import Divergence
from moec.analysis.verify.quality.fidelity import (
    ArtifactModel,
    Fidelity,
    FloatModel,
    Model,
    TokenizerEncoder,
    encoder_of,
    measure,
    template_of,
)
from moec.analysis.verify.quality.texts import LENGTH, Chunk, held_out
from moec.checkpoints.config_json import read_json
from moec.checkpoints.spec_from_config import spec_from_config
from moec.compiler import build
from moec.compiler.artifact import MANIFEST, Artifact
from moec.compiler.errors import CheckpointError, UserError
from moec.compiler.progress import Progress
from moec.compiler.source import CHAT_TEMPLATE, TOKENIZER, Checkpoint
from moec.compiler.spec.model import Spec
from moec.compiler.tokenizer import TextTokenizer

_CONFIG = "config.json"


@dataclass(frozen=True)
class Compared:
    """One model: its files' bytes, and how far it is from `reference`."""

    name: str
    bytes: int
    reference: str
    found: Divergence
    domains: dict[str, Divergence]

    def to_json(self) -> dict[str, Any]:
        """Everything, by domain too."""
        domains = {name: d.to_json() for name, d in self.domains.items()}
        about = {"name": self.name, "bytes": self.bytes, "reference": self.reference}
        return {**about, **self.found.to_json(), "domains": domains}


def compare_quality(
    paths: Sequence[Path],
    *,
    reference: Path | None = None,
    tokens: int,
    text: str | None = None,
    progress: Progress | None = None,
) -> list[Compared]:
    """Each of `paths`, artifact or checkpoint folder, against the float model `reference`.

    Without `reference` it is the checkpoint that the first artifact among them was compiled from. It may be another
    model than the artifacts' own, such as the dense model that a mixture was made of, if its tokens are the same.
    UserError where there is no float model, for a folder that is neither, and for models whose tokenizers do not give
    the same ids.
    """
    artifacts = [Artifact.open(p) for p in paths if (p / MANIFEST).exists()]
    longest = min([LENGTH, *(a.manifest.model.context for a in artifacts)])
    spec, store = _float_model(artifacts, reference)
    origin = FloatModel(spec, store, longest)
    longest = min(longest, origin.longest)
    encoder, template = _written(artifacts, store)
    chunks = held_out(encoder, template=template, tokens=tokens, longest=longest, text=text)
    if artifacts:
        _check_reference(artifacts[0], origin, store, chunks, (template, tokens, longest, text))
    models: list[Model] = []
    for path in paths:
        if (path / MANIFEST).exists():
            artifact = Artifact.open(path)
            _check_tokens(artifact, template, chunks, tokens, longest, text)
            models.append(ArtifactModel(artifact))
        else:
            models.append(FloatModel(*_checkpoint(path), longest))
    found = measure(origin, models, chunks, progress)
    return [_row(model, fidelity) for model, fidelity in zip(models, found, strict=True)]


def _row(model: Model, fidelity: Fidelity) -> Compared:
    assert fidelity.overall is not None
    return Compared(model.name, model.bytes, fidelity.reference, fidelity.overall, dict(fidelity.domains))


def _float_model(artifacts: Sequence[Artifact], reference: Path | None) -> tuple[Spec, Checkpoint]:
    if reference is not None and not artifacts:
        return _checkpoint(reference)
    if not artifacts:
        raise UserError("nothing says which float model to compare with", remedy="name its checkpoint with --reference")
    spec = spec_of(artifacts[0])
    if reference is not None:
        try:
            return spec, build.open_checkpoint(spec, reference)
        except CheckpointError:  # a checkpoint of another model, then: what its own config.json says
            if not (reference / _CONFIG).is_file():
                raise
            return _checkpoint(reference)
    try:
        return spec, open_artifact_checkpoint(artifacts[0], spec, None)
    except CheckpointError as error:
        raise CheckpointError(
            error.message, place=error.place, remedy="name a checkpoint of the float model with --reference"
        ) from error


def _checkpoint(folder: Path) -> tuple[Spec, Checkpoint]:
    """The spec that a checkpoint's config.json implies, and its weights: our own layout or one of transformers."""
    if not (folder / _CONFIG).is_file():
        raise UserError(
            "is neither an artifact nor a checkpoint folder", place=str(folder), remedy="name a folder that is one"
        )
    own = str(read_json(folder / _CONFIG).get("model_type", "")).startswith("mobile")
    raw = yaml.safe_load(spec_from_config(folder)) if own else {"name": "model", "model": {"transformers": str(folder)}}
    spec = Spec.model_validate({**raw, "quantization": "none"})
    return spec, build.open_checkpoint(spec, folder)


def _written(artifacts: Sequence[Artifact], store: Checkpoint) -> tuple[TextEncoder, str | None]:
    """The tokenizer and the chat template that all are measured with: the first artifact's, or the checkpoint's."""
    if artifacts:
        return encoder_of(artifacts[0]), template_of(artifacts[0])
    files = store.companions()
    if TOKENIZER not in files:
        raise UserError("has no tokenizer.json", place=str(store.folder), remedy="name an artifact first")
    tokenizer = TextTokenizer(files[TOKENIZER], str(store.folder / TOKENIZER))
    template = files.get(CHAT_TEMPLATE)
    return TokenizerEncoder(tokenizer), None if template is None else template.decode("utf-8")


def _check_reference(
    first: Artifact,
    origin: FloatModel,
    store: Checkpoint,
    chunks: list[Chunk],
    given: tuple[str | None, int, int, str | None],
) -> None:
    """UserError for a float model whose predictions are of other tokens than those of the artifact."""
    place, wanted = str(store.folder), first.manifest.model.vocab_size
    if origin.vocab_size != wanted:
        raise UserError(
            f"it predicts {origin.vocab_size} tokens, {first.folder} predicts {wanted}",
            place=place,
            remedy="compare models of one tokenizer",
        )
    content = store.companions().get(TOKENIZER)
    if content is None or all(f.name != TOKENIZER for f in first.manifest.files):
        return  # ids alone: nothing says what they mean
    template, tokens, longest, text = given
    encoder = TokenizerEncoder(TextTokenizer(content, place))
    if held_out(encoder, template=template, tokens=tokens, longest=longest, text=text) != chunks:
        raise UserError(
            f"its tokenizer gives other tokens than that of {first.folder}: their divergence would mean nothing",
            place=place,
            remedy="compare models of one tokenizer",
        )


def _check_tokens(
    artifact: Artifact, template: str | None, chunks: list[Chunk], tokens: int, longest: int, text: str | None
) -> None:
    own = held_out(encoder_of(artifact), template=template, tokens=tokens, longest=longest, text=text)
    if own != chunks:
        raise UserError(
            "its tokenizer gives other tokens than that of the first: their divergence would mean nothing",
            place=str(artifact.folder),
            remedy="compare models of one tokenizer",
        )
