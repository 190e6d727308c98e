"""`moec verify ARTIFACT`: the compiled program against the eager model with the same codes and scales."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.analysis.calibration.calibrate import needs_calibration
from moec.analysis.verify.budget import compare_with_memory, sessions_of
from moec.analysis.verify.compare import Comparison, compare
from moec.analysis.verify.foreign import as_compiled, before_target, compare_foreign
from moec.analysis.verify.prompts import TextEncoder, WordHashEncoder, prompt_ids
from moec.analysis.verify.quality.fidelity import Fidelity, fidelity_of
from moec.analysis.verify.report import Check, Report
from moec.analysis.verify.tolerances import Tolerance
from moec.compiler import build
from moec.compiler.artifact import Artifact, Manifest
from moec.compiler.build_record import located, model_paths, read_build_record
from moec.compiler.errors import ArtifactError, CheckpointError, UserError
from moec.compiler.program import Role
from moec.compiler.progress import Progress
from moec.compiler.reference import LayerReference
from moec.compiler.session_process import ProcessSession
from moec.compiler.source import Checkpoint
from moec.compiler.spec.model import Quantization, Spec
from moec.compiler.spec.quantization import FLOAT_ACTIVATIONS
from moec.compiler.spec.sources import source_of
from moec.compiler.target import Session, facts_of, target_of

DEFAULT_TOKENS = 512
QUALITY_TOKENS = 1536  # a chunk of each domain of the held-out text


def verify_artifact(
    path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    text: str | None = None,
    reference: str | Path | None = None,
    quality_tokens: int = QUALITY_TOKENS,
    max_kld: float | None = None,
    memory_mb: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run real text through the artifact and through the eager reference, and compare them; and the artifact against
    the float model, which says what quantization cost.

    memory_mb: run the artifact within this budget of memory, 10^6 bytes, in a process of its own, and compare its
    logits with those in memory as well; None: the budget that the artifact brings, if any. RunError, with the least
    that works, where one token needs more.

    checkpoint: the folder that the artifact was compiled from, if it has moved since. tokens: in total, shared between
    the four domains of the shipped prompts (or of `text` alone). reference: a checkpoint of the float model, if that
    which the artifact was compiled from holds codes. quality_tokens: of held-out text for it, 0 for none. max_kld: the
    most that the mean KL divergence may be, in nats; a divergence that cannot be measured misses it. ArtifactError for
    a damaged artifact, CheckpointError for a missing or different checkpoint; a computed difference is not an error but
    a failed check of the Report.
    """
    started = time.perf_counter()
    progress = progress or Progress(quiet=True)
    artifact = Artifact.open(path).within(memory_mb)
    with progress.stage("check digests", len(artifact.manifest.files)):
        artifact.check_contents()
    spec = spec_of(artifact, checkpoint)
    store = open_artifact_checkpoint(artifact, spec, checkpoint)
    session, unrounded = sessions_of(artifact, rounds_activations(artifact, spec))
    threads = torch.get_num_threads()
    # the reference multiplies many small matrices: the barriers of a second thread cost more than it gives, and on a
    # busy machine many times as much
    torch.set_num_threads(1)
    try:
        prompts = prompt_ids(encoder(artifact), tokens=tokens, text=text)
        if not any(prompts.values()):
            raise UserError("there is no token in the text to verify with", remedy="give a longer text")
        prompts = {name: ids[: artifact.manifest.model.context] for name, ids in prompts.items() if ids}
        eager = layer_reference(artifact, spec, store, computed_scheme(artifact.manifest, spec))
        if eager is not None:
            found = _compare_layers(artifact, spec, store, eager, session, unrounded, prompts, progress)
        else:
            found = _compare_foreign(artifact, spec, store, session, unrounded, prompts, progress)
        found.figures.update(_rounding_figures(artifact, session, prompts))
        if isinstance(session, ProcessSession):
            compare_with_memory(found, artifact, session, prompts, progress)
    finally:
        torch.set_num_threads(threads)
        session.close()
        if unrounded is not None:
            unrounded.close()
    fidelity = fidelity_of(
        artifact,
        spec,
        store,
        reference=None if reference is None else Path(reference),
        tokens=quality_tokens,
        text=text,
        progress=progress,
    )
    if max_kld is not None:
        found.checks.append(_gate(fidelity, max_kld))
    return _report(artifact, store, prompts, found, fidelity, time.perf_counter() - started)


def _gate(fidelity: Fidelity, max_kld: float) -> Check:
    value = float("nan") if fidelity.overall is None else fidelity.overall.kld
    limit = Tolerance("<=", max_kld, "nats", "the limit that --max-kld gives")
    return Check("quantization: mean KL divergence from the float model", value, limit, detail=fidelity.why)


def layer_reference(
    artifact: Artifact, spec: Spec, store: Checkpoint, scheme: Quantization | None
) -> LayerReference | None:
    """The reference of the artifact's model source, rounding as `scheme` says; None where the exported graph is it.

    A source's reference rounds weights itself; the codes of a calibration are those that the passes carry.
    """
    if needs_calibration(spec.quantization):
        return None
    return source_of(spec.model).reference(
        spec,
        store,
        scheme,
        asymmetric_roles=asymmetric_roles(artifact.manifest),
        integer_attention=target_of(artifact).integer_attention,
    )


def _compare_layers(
    artifact: Artifact,
    spec: Spec,
    store: Checkpoint,
    reference: LayerReference,
    session: Session,
    unrounded: Session | None,
    prompts: Mapping[str, list[int]],
    progress: Progress,
) -> Comparison:
    scheme = computed_scheme(artifact.manifest, spec)
    floats = None  # the same codes and cache without rounding of activations
    if scheme is not None and scheme.int8_activations:
        unrounding = scheme.model_copy(update={"activations": FLOAT_ACTIVATIONS})
        floats = layer_reference(artifact, spec, store, unrounding)
    return compare(
        session,
        reference,
        prompts,
        layer_names=artifact.manifest.model.moe_layers,
        quantized=scheme is not None,
        float_reference=floats,
        unrounded=unrounded,
        progress=progress,
    )


def _compare_foreign(
    artifact: Artifact,
    spec: Spec,
    store: Checkpoint,
    session: Session,
    unrounded: Session | None,
    prompts: Mapping[str, list[int]],
    progress: Progress,
) -> Comparison:
    exported, passes = build.program_and_passes(spec, store, artifact.manifest.target)
    scheme = computed_scheme(artifact.manifest, spec)
    return compare_foreign(
        session,
        exported,
        before_target(exported, as_compiled(artifact, passes)),
        prompts,
        target=target_of(artifact),
        quantized=scheme is not None,
        rounds_activations=scheme is not None and scheme.rounds,
        unrounded=unrounded,
        progress=progress,
    )


def spec_of(artifact: Artifact, given: str | Path | None = None) -> Spec:
    """The spec that an artifact was compiled from, its model where `given` or the build record says.

    ArtifactError if the manifest's is damaged.
    """
    record = read_build_record(artifact)
    known = {} if record is None else {name: Path(path) for name, path in record.model.items()}
    try:
        spec = Spec.model_validate(artifact.manifest.spec)
        names = list(model_paths(spec))
        if given is not None and len(names) == 1 and (not known or _is_model(Path(given))):
            known = {names[0]: Path(given)}
        return located(spec, known)
    except ValueError as error:
        raise ArtifactError(
            f"the spec in its manifest is damaged: {str(error).splitlines()[0]}",
            place=str(artifact.folder),
            remedy="compile it again with `moec compile`",
        ) from error


def _is_model(place: Path) -> bool:
    """Whether a path is that of a whole model, and not of weights alone."""
    return place.is_file() or (place / "config.json").is_file()


def open_artifact_checkpoint(artifact: Artifact, spec: Spec, given: str | Path | None) -> Checkpoint:
    """The checkpoint that the artifact was compiled from: where its build record says, or where the user says.

    Of a python model that is the folder where its module is found, of an exported program the file.
    """
    record = read_build_record(artifact)
    if given is None and record is None:
        raise CheckpointError(
            "its checkpoint is not known here: there is no build record beside the artifact",
            place=str(artifact.folder),
            remedy="name the folder with --checkpoint",
        )
    recorded = Path(record.checkpoint) if record is not None else Path(str(given))
    store = source_of(spec.model).reopen(spec, recorded, None if given is None else Path(given))
    if store.digest() != artifact.manifest.digests.checkpoint:
        raise CheckpointError(
            f"is not the checkpoint that {artifact.folder} was compiled from (their tensors differ)",
            place=str(store.folder),
            remedy="name the right folder with --checkpoint, or compile again",
        )
    return store


def encoder(artifact: Artifact) -> TextEncoder:
    """The artifact's tokenizer, or hashed words for an artifact without one."""
    if all(f.name != "tokenizer.json" for f in artifact.manifest.files):
        return WordHashEncoder(artifact.manifest.model.vocab_size)
    from moec.compiler.tokenizer import load_tokenizer

    return load_tokenizer(artifact.path("tokenizer.json"))


def computed_scheme(manifest: Manifest, spec: Spec) -> Quantization | None:
    """The spec's quantization as the target computes it: its lowering notes where it rounds less than the spec asks."""
    if spec.quantization is None:
        return None
    raw = spec.quantization.model_dump(mode="json") | facts_of(manifest).computes
    return Quantization.model_validate(raw)


def rounds_activations(artifact: Artifact, spec: Spec) -> bool:
    """Whether the artifact rounds activations to INT8 as it runs."""
    scheme = computed_scheme(artifact.manifest, spec)
    return scheme is not None and scheme.int8_activations


def _rounding_figures(artifact: Artifact, exact: Session, prompts: Mapping[str, list[int]]) -> dict[str, Any]:
    """How far the artifact's own arithmetic is from its exact twin; nothing for targets whose arithmetic is float32."""
    if not build.has_exact(artifact):
        return {}
    own = build.load(artifact)
    try:
        errors: list[np.ndarray] = []
        agree: list[np.ndarray] = []
        for ids in prompts.values():
            for session in (own, exact):
                session.reset()
            a, b = own.prefill(ids, "all"), exact.prefill(ids, "all")
            errors.append(np.abs(a - b).max(-1) / np.maximum(np.abs(b).max(-1), 1e-30))
            agree.append(a.argmax(-1) == b.argmax(-1))
    finally:
        own.close()
    error = np.concatenate(errors)
    name = f"own arithmetic ({facts_of(artifact.manifest).dtype}) against float32"
    share = float(np.concatenate(agree).mean())
    return {name: f"top-1 {share:.4f}, relative error of logits median {np.median(error):.1e}, worst {error.max():.1e}"}


def asymmetric_roles(manifest: Manifest) -> Collection[Role]:
    """Roles whose linears the target runs with asymmetric activation rounding, as its lowering noted them."""
    return [Role(name) for name in facts_of(manifest).asymmetric_roles]


def _report(
    artifact: Artifact,
    store: Checkpoint,
    prompts: dict[str, list[int]],
    found: Comparison,
    fidelity: Fidelity,
    seconds: float,
) -> Report:
    manifest = artifact.manifest
    counts = ", ".join(f"{name} {len(ids)}" for name, ids in prompts.items())
    figures = {
        "tokens": f"{sum(map(len, prompts.values()))} ({counts})",
        **found.figures,
        "seconds": round(seconds, 1),
        "peak RSS MB": round(peak_rss_mb()),
    }
    about = {
        "artifact": str(artifact.folder),
        "name": manifest.name,
        "target": manifest.target,
        "moec": manifest.moec,
        "quantization": manifest.quantization,
        "checkpoint": str(store.folder),
        "contents": manifest.contents,
        "digests": manifest.digests.model_dump(mode="json"),
        "versions": manifest.versions,
    }
    return Report(
        "artifact", str(artifact.folder), tuple(found.checks), tuple(found.layers), figures, about, fidelity=fidelity
    )


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, mapped files included, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
