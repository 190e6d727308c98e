"""What quantization cost a model: its predictions against the float model's, on held-out text.

The float model is the checkpoint's own graph, fused and not quantized, in float32 (`streamed.py`). An artifact runs as
it ships: its codes, its rounding of activations and cache, its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moec.analysis.verify.prompts import TextEncoder, WordHashEncoder
from moec.analysis.verify.quality.divergence import Divergence, Rows, by_domain, compare
from moec.analysis.verify.quality.streamed import stream_logits
from moec.analysis.verify.quality.texts import LENGTH, Chunk, held_out
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import UserError
from moec.compiler.pipeline import run_passes
from moec.compiler.progress import Progress
from moec.compiler.source import CHAT_TEMPLATE, TOKENIZER, Checkpoint
from moec.compiler.spec.model import Spec
from moec.compiler.spec.sources import source_of
from moec.compiler.tokenizer import TextTokenizer, load_tokenizer
from moec.passes.pipelines import fusion


class Model(Protocol):
    """What can be measured. `bytes`: of the files that hold it."""

    name: str
    bytes: int

    def logits(self, chunks: Sequence[Chunk]) -> Iterator[np.ndarray]:
        """Float32 [T, V] of each chunk in order, from an empty context."""
        ...


class ArtifactModel:
    """An artifact as it runs, in memory: a budget changes no logit, and would count the float model in this process."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self.name, self.bytes = str(artifact.folder), artifact.bytes

    def logits(self, chunks: Sequence[Chunk]) -> Iterator[np.ndarray]:
        session = build.load(self._artifact.in_memory())
        try:
            for chunk in chunks:
                session.reset()
                yield np.asarray(session.prefill(list(chunk.ids), logits="all"))
        finally:
            session.close()


class FloatModel:
    """The weights of a checkpoint in float32. UserError for weights that are stored as codes: they are no float model.

    spec: whose model the checkpoint is of; its quantization plays no part. longest: tokens of the longest chunk that
    is wanted; `longest` of the model is what it can read, `vocab_size` how many tokens it predicts.
    """

    def __init__(self, spec: Spec, store: Checkpoint, longest: int = LENGTH) -> None:
        self.name = str(store.folder)
        self.bytes = sum(f.stat().st_size for f in store.folder.glob("*.safetensors")) if store.folder.is_dir() else 0
        # one chunk is one call, and no cache is longer than it
        self._program = source_of(spec.model).export(_shortened(spec, longest), store, max_tokens=longest)
        info = self._program.info  # a program that was exported elsewhere may take fewer tokens at a time than asked
        self.longest, self.vocab_size = min(longest, info.context, info.max_tokens), info.vocab_size
        coded = [name for name, weight in self._program.weights.items() if weight.stored is not None]
        if coded:
            raise UserError(
                f"its weights are stored as codes ({coded[0]} and {len(coded) - 1} more)",
                place=self.name,
                remedy="name a checkpoint of the float model with --reference",
            )

    def logits(self, chunks: Sequence[Chunk]) -> Iterator[np.ndarray]:
        fused = run_passes(self._program, fusion())
        return stream_logits(fused, [chunk.ids for chunk in chunks])


def _shortened(spec: Spec, longest: int) -> Spec:
    """The spec with a context of `longest`, where its section says the context, so that caches are no longer."""
    if "context" not in type(spec.model).model_fields:
        return spec
    return spec.model_copy(update={"model": spec.model.model_copy(update={"context": longest})})


@dataclass(frozen=True)
class Fidelity:
    """`overall` None: it was not measured, for the reason `why`; `remedy` says how it can be."""

    reference: str
    overall: Divergence | None = None
    domains: Mapping[str, Divergence] = field(default_factory=dict)
    why: str = ""
    remedy: str = ""

    @staticmethod
    def missing(why: str, remedy: str = "") -> Fidelity:
        """A measurement that could not be made."""
        return Fidelity("", why=why, remedy=remedy)

    @staticmethod
    def of(reference: str, rows: Sequence[Rows]) -> Fidelity:
        """What the chunks give together, and each domain."""
        return Fidelity(reference, Divergence.of(rows), by_domain(rows))

    def to_json(self) -> dict[str, Any]:
        """`measured`, and either the figures or why there are none."""
        if self.overall is None:
            return {"measured": False, "why": self.why, "remedy": self.remedy}
        domains = {name: found.to_json() for name, found in self.domains.items()}
        return {"measured": True, "reference": self.reference, **self.overall.to_json(), "domains": domains}

    def line(self) -> str:
        """The finding in a few words, to stand behind "passed"."""
        if self.overall is None:
            return f"what quantization cost was not measured: {self.why}" + (f"; {self.remedy}" if self.remedy else "")
        d = self.overall
        return (
            f"KL divergence {d.kld:.4f} from the float model, top-1 {d.top1:.1%}, "
            f"perplexity {d.perplexity:.2f} (float {d.reference_perplexity:.2f})"
        )

    def lines(self) -> list[str]:
        """All figures, a line for the text and one for each domain."""
        if self.overall is None:
            return []
        rows = {"all": self.overall, **(self.domains if len(self.domains) > 1 else {})}
        return [f"{name}: {_figures(d)}" for name, d in rows.items()]


def _figures(d: Divergence) -> str:
    error = f" ± {d.error:.4f}" if np.isfinite(d.error) else ""
    return (
        f"KL divergence mean {d.kld:.4f}{error}, median {d.median:.4f}, 95% {d.p95:.3f}, 99% {d.p99:.3f}, "
        f"worst {d.worst:.2f}; top-1 {d.top1:.1%}; perplexity {d.perplexity:.2f} of {d.reference_perplexity:.2f}; "
        f"{d.tokens} tokens"
    )


def measure(
    reference: Model, models: Sequence[Model], chunks: Sequence[Chunk], progress: Progress | None = None
) -> list[Fidelity]:
    """Each model against `reference`, chunk by chunk: no more than one chunk's logits of each are in memory."""
    progress = progress or Progress(quiet=True)
    streams = [m.logits(chunks) for m in (reference, *models)]
    rows: list[list[Rows]] = [[] for _ in models]
    try:
        with progress.stage(f"compare with the float model on {sum(len(c.ids) for c in chunks)} tokens") as step:
            for chunk, wanted, *found in zip(chunks, *streams, strict=True):
                for kept, actual in zip(rows, found, strict=True):
                    kept.append(compare(chunk.domain, chunk.ids, wanted, actual))
                step(chunk.domain)
    finally:
        for stream in streams:
            if hasattr(stream, "close"):
                stream.close()  # a session, where one was open
    return [Fidelity.of(reference.name, kept) for kept in rows]


def fidelity_of(
    artifact: Artifact,
    spec: Spec,
    store: Checkpoint,
    *,
    reference: Path | None = None,
    tokens: int,
    text: str | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """An artifact against the float model: the checkpoint `reference`, or `store`, the one it was compiled from.

    Where that is not possible the result says why; UserError only for a `reference` that cannot be used.
    """
    if tokens == 0:
        return Fidelity.missing("no tokens were given for it", "--quality-tokens says how many")
    if spec.quantization is None and reference is None:
        return Fidelity.missing("nothing is quantized")
    longest = min(LENGTH, artifact.manifest.model.context)
    try:
        origin = store if reference is None else build.open_checkpoint(spec, reference)
        model = FloatModel(spec, origin, longest)
    except UserError as error:
        if reference is not None:
            raise
        return Fidelity.missing(f"{error.message}", error.remedy or "")
    chunks = held_out(
        encoder_of(artifact), template=template_of(artifact), tokens=tokens, longest=model.longest, text=text
    )
    return measure(model, [ArtifactModel(artifact)], chunks, progress)[0]


def encoder_of(artifact: Artifact) -> TextEncoder:
    """The artifact's tokenizer, or hashed words for an artifact without one."""
    if all(f.name != TOKENIZER for f in artifact.manifest.files):
        return WordHashEncoder(artifact.manifest.model.vocab_size)
    return TokenizerEncoder(load_tokenizer(artifact.path(TOKENIZER)))


def template_of(artifact: Artifact) -> str | None:
    """The artifact's chat template, if it has one."""
    if all(f.name != CHAT_TEMPLATE for f in artifact.manifest.files):
        return None
    return artifact.path(CHAT_TEMPLATE).read_text(encoding="utf-8")


class TokenizerEncoder:
    """A tokenizer whose special tokens are those that the text names: a chunk is a piece of a text, not a text."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special_tokens=False)
