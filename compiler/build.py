"""The pipeline: spec -> model -> Program -> passes -> target -> Artifact. Only this and commands read registries."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moec.analysis.plan.devices import load_device
from moec.analysis.plan.planner import check_fits
from moec.assistant.load import load as load  # so that users of both import one module
from moec.assistant.native_text import PROGRAM, write_text
from moec.assistant.role_form import write_form
from moec.compiler.artifact import (
    FORMAT,
    Artifact,
    CodesEntry,
    Digests,
    Manifest,
    ModelRecord,
    PassEntry,
    StateEntry,
    new_artifact,
    record_file,
    write_manifest,
)
from moec.compiler.build_record import check_record_place, model_paths, portable, write_build_record
from moec.compiler.dumps import Dumps, in_turn, rewritten
from moec.compiler.errors import CompileError, UserError
from moec.compiler.export import MAX_TOKENS
from moec.compiler.pipeline import Pass, PassRecord, PassResult, PipelineLog, run_passes
from moec.compiler.program import Program, module_path
from moec.compiler.progress import Progress
from moec.compiler.source import COMPANIONS, TOKENIZER, Checkpoint, Weights
from moec.compiler.spec import Spec, as_spec
from moec.compiler.spec.sources import source_of
from moec.compiler.spec.targets import TargetOptions, target_packages
from moec.compiler.states import State
from moec.compiler.target import LoweredFiles, Session, find_target, target_of
from moec.compiler.tokenizer import TextTokenizer
from moec.compiler.trust import trusting
from moec.compiler.weights import Provenance

_VERSIONED = ("torch", "executorch", "torchao", "numpy")


def compile(
    spec: Spec | Mapping[str, Any] | str | Path,
    target: str | None = None,
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    force: bool = False,
    trust: bool = False,
) -> Artifact:
    """Compile a spec into an artifact folder and open it. `out` defaults to NAME-TARGET in the working directory.

    `spec`: a YAML file, a mapping of the same keys, or a `Spec`.

    A spec that names a `device:` which it does not fit is refused, unless `force`. A python model or an exported
    program is code: TrustError unless `trust`.

    UserError (SpecError, CheckpointError, CompileError ...) for a fault of the input; an artifact that stood at `out`
    is then untouched.
    """
    progress = progress or Progress(quiet=True)
    clock = _Clock()
    spec = as_spec(spec)
    name, options = chosen_target(spec, target)
    backend = find_target(name)
    if spec.device is not None and not force:
        check_fits(spec, load_device(spec.device), name)
    place = Path(out) if out is not None else Path(f"{spec.name}-{name}")
    check_record_place(place)
    with trusting(trust), new_artifact(place) as folder:
        store = open_checkpoint(spec, checkpoint)
        companions, words = _companions(store)
        clock.lap("checkpoint")
        log = PipelineLog()
        program, passes = program_and_passes(spec, store, name, progress)
        clock.lap("export")
        program = run_all(program, passes, log=log, progress=progress)
        clock.lap("passes")
        lowered = backend.lower(program, folder, options, progress)
        clock.lap("lower")
        files, notes = _write_companions(folder, companions, words)
        lowered = replace(lowered, files=(*lowered.files, *files), notes=(*lowered.notes, *notes))
        manifest = _manifest(spec, name, store, program, log, lowered, folder, words)
        write_manifest(folder, manifest)
    clock.lap("write")
    write_build_record(
        place,
        manifest,
        checkpoint=store.folder,
        model=model_paths(spec),
        seconds=clock.laps,
        pass_seconds=tuple((r.name, round(r.seconds, 3)) for r in log.records),
    )
    return Artifact.open(place)


def load_exact(artifact: Artifact) -> Session:
    """The artifact in float32 in place of 16-bit floats, if its target can run it so; otherwise as `load`."""
    return target_of(artifact).load_exact(artifact)


def load_unrounded(artifact: Artifact) -> Session | None:
    """The artifact with its codes and fp32 activations; None if its target rounds no activations or cannot run it
    so."""
    return target_of(artifact).load_unrounded(artifact)


def has_exact(artifact: Artifact) -> bool:
    """Whether `load_exact` gives another arithmetic than `load`."""
    return target_of(artifact).rounds(artifact)


@dataclass(frozen=True)
class Explanation:
    """What the passes did to a spec's graph, and the text of the graph they left."""

    name: str
    records: tuple[PassRecord, ...]
    text: str
    matched: tuple[tuple[str, str, str, str], ...] = ()  # pass, block, operator, its attributes
    error: str = ""  # what stops the compile, if anything does


def explain(spec: Spec | Mapping[str, Any] | str | Path, target: str | None = None) -> Explanation:
    """Run the passes of a spec without reading a weight. If one fails, the explanation covers those before it."""
    spec = as_spec(spec)
    log = PipelineLog()
    program, passes = program_and_passes(spec, None, chosen_target(spec, target)[0])
    reached, matched, error = [program], [], ""

    def after(p: Pass, result: PassResult) -> None:
        for node in rewritten(reached[-1], result.program)[1] if result.changed else ():
            if getattr(node.target, "namespace", "") == "moec":
                values = [str(a) for a in node.args if a is not None and a != "" and not hasattr(a, "op")]
                matched.append((p.name, module_path(node) or node.name, str(node.target), "; ".join(values)))
        reached.append(result.program)

    try:
        run_all(program, passes, log=log, after=after)
    except CompileError as refused:
        error = refused.line()
    return Explanation(spec.name, tuple(log.records), reached[-1].text(), tuple(matched), error)


def program_and_passes(
    spec: Spec, weights: Weights | None, target: str | None = None, progress: Progress | None = None
) -> tuple[Program, list[Pass]]:
    """The exported Program of a spec and every pass up to LEGAL for a target. `weights` None: shapes only."""
    from moec.passes.pipelines import pipeline

    name, options = chosen_target(spec, target)
    max_tokens = getattr(options, "max_tokens", MAX_TOKENS)
    program = source_of(spec.model).export(spec, weights, max_tokens=max_tokens)
    calibrate = _calibration(spec, weights, progress or Progress(quiet=True))
    found = find_target(name)
    return program, [
        *pipeline(spec.quantization, calibrate, latents=found.latent_attention),
        *found.legalize(options),
    ]


def _calibration(spec: Spec, weights: Weights | None, progress: Progress) -> Pass | None:
    """The pass that calibrates, for a method that observes inputs; text is read by the checkpoint's own tokenizer."""
    from moec.analysis.calibration.calibrate import calibrate_weights, needs_calibration

    if spec.quantization is None or not needs_calibration(spec.quantization):
        return None
    return calibrate_weights(spec.quantization, text_encoder(weights), progress)


def text_encoder(weights: Weights | None) -> Callable[[Program], Callable[[str], list[int]]]:
    """The encoder for text that is no prompt: the checkpoint's tokenizer, or hashed words where it has none."""
    from moec.compiler.word_hash import WordHashEncoder

    def encode(program: Program) -> Callable[[str], list[int]]:
        found = weights.companions() if isinstance(weights, Checkpoint) else {}
        if TOKENIZER not in found or found[TOKENIZER].strip() == b"{}":
            return WordHashEncoder(program.info.vocab_size).encode
        tokenizer = TextTokenizer(found[TOKENIZER], TOKENIZER)
        return lambda text: list(tokenizer.encode(text, special_tokens=False))

    return encode


def run_all(
    program: Program,
    passes: list[Pass],
    *,
    log: PipelineLog | None = None,
    progress: Progress | None = None,
    after: Callable[[Pass, PassResult], None] | None = None,
) -> Program:
    """Run passes with progress, and dumps of every graph where MOEC_DUMP names a folder."""
    progress = progress or Progress(quiet=True)
    dumps = Dumps(program)
    with progress.stage("passes", len(passes)) as step:
        observers = [lambda p, result: step(p.name), dumps.after, *([] if after is None else [after])]
        return run_passes(program, passes, log=log, after=in_turn(*observers))


def chosen_target(spec: Spec, target: str | None) -> tuple[str, TargetOptions]:
    """The target named by `target`, or the spec's only one, with the options that the spec gives it. UserError for
    several, or an unknown one."""
    if target is None:
        if len(spec.targets) != 1:
            listed = ", ".join(spec.targets)
            raise UserError(f"names several targets: {listed}", place=spec.name, remedy="choose one with --target")
        target = next(iter(spec.targets))
    if target in spec.targets:
        return target, spec.targets[target]
    if target not in target_packages():
        raise UserError(f"unknown target {target!r}", remedy=f"known here: {', '.join(target_packages())}")
    from moec.compiler.spec.targets import options_class

    return target, options_class(target)()


def open_checkpoint(spec: Spec, checkpoint: str | Path | None) -> Checkpoint:
    """The checkpoint given, or the spec's, or what the model brings, checked against it; else CheckpointError."""
    folder = checkpoint if checkpoint is not None else spec.checkpoint
    return source_of(spec.model).open(spec, None if folder is None else Path(folder))


def _companions(store: Checkpoint) -> tuple[dict[str, bytes], TextTokenizer | None]:
    """The files beside the weights, checked: a damaged tokenizer fails the compile, not the first run."""
    found = dict(store.companions())
    unknown = sorted(set(found) - set(COMPANIONS))
    assert not unknown, f"{type(store).__name__} brings {unknown}, known are {COMPANIONS}"
    # a corpus that was given as token ids has the tokenizer {}
    if found.get(TOKENIZER, b"{}").strip() == b"{}":
        return found, None
    words = TextTokenizer(found[TOKENIZER], str(store.folder / TOKENIZER))
    return {**found, TOKENIZER: _without_spaces(found[TOKENIZER])}, words


def _without_spaces(content: bytes) -> bytes:
    """The same JSON on one line: half of a tokenizer.json can be indentation. As it is where Python's JSON cannot hold
    what it says: a number beyond float64, half of a surrogate pair, very deep nesting."""
    try:
        said = json.dumps(json.loads(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return said.encode("utf-8")
    except (ValueError, RecursionError):
        return content


def _write_companions(
    folder: Path, companions: Mapping[str, bytes], words: TextTokenizer | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write what lies beside a program that is in `folder`: the names of files, and what the user should know."""
    for file, content in companions.items():
        (folder / file).write_bytes(content)
    forms, notes = write_form(folder)
    texts, reasons = write_text(folder, words)
    return (*companions, *forms, *texts), (*notes, *reasons)


def companion_bytes(store: Checkpoint) -> int:
    """Bytes of the files that an artifact of a .pte target has beside its program and its manifest."""
    companions, words = _companions(store)
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / PROGRAM).touch()
        files, _ = _write_companions(folder, companions, words)
        return sum((folder / name).stat().st_size for name in files)


class _Clock:
    """Wall seconds of each stage; `total` is kept up to date."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now
        self.laps["total"] = round(now - self._started, 3)


def _manifest(
    spec: Spec,
    target: str,
    store: Checkpoint,
    program: Program,
    log: PipelineLog,
    lowered: LoweredFiles,
    folder: Path,
    words: TextTokenizer | None,
) -> Manifest:
    files = [record_file(folder / name, lowered.digests.get(name)) for name in lowered.files]
    begins, ends = (None, None) if words is None else words.adds()
    info = program.info
    resolved = portable(spec).model_dump(mode="json")
    return Manifest(
        format=FORMAT,
        moec=version("moec"),
        name=spec.name,
        target=target,
        spec=resolved,
        quantization=resolved["quantization"],
        model=ModelRecord(
            name=info.name,
            vocab_size=info.vocab_size,
            context=info.context,
            max_tokens=info.max_tokens,
            bos_id=info.bos_id,
            eos_ids=info.eos_ids,
            moe_layers=info.moe_layers,
            prompt_begins=begins,
            prompt_ends=ends,
        ),
        digests=Digests(
            spec=spec_digest(spec),
            checkpoint=store.digest(),
            graph=program.digest(),
            kernel=lowered.kernel_digest,
        ),
        passes=tuple(_entry(r) for r in log.records),
        files=tuple(files),
        sizes_by_role=dict(lowered.sizes_by_role),
        details=lowered.facts.model_dump(mode="json", exclude_unset=True),
        versions={"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in _VERSIONED}},
        notes=(
            *store.notes,
            *unfused_attention(log),
            *expanded_latents(log),
            *rounded_to_nearest(program),
            *lowered.notes,
        ),
        codes=_codes(program),
        calibration=None if program.calibration is None else dict(program.calibration()),
        states=_states(program),
    )


def unfused_attention(log: PipelineLog) -> list[str]:
    """A note for each reason for which attention stays in single operators, which a fused program does without."""
    return [
        f"attention is not fused in {len(places)} layers, of which the first is {places[0]}: {reason}. It is computed "
        "over the whole context at every call, with a cache in float32: set no more context than is needed"
        for reason, places in _refused(log, "fuse_attention").items()
    ]


def expanded_latents(log: PipelineLog) -> list[str]:
    """A note for each reason for which latent attention caches the keys and values of every head."""
    return [
        f"latents are not cached in {len(places)} layers, of which the first is {places[0]}: {reason}. The keys and "
        "values of every head are, which takes more memory"
        for reason, places in _refused(log, "absorb_latents").items()
    ]


def _refused(log: PipelineLog, rule: str) -> dict[str, list[str]]:
    """The places where a rule refused, by reason."""
    reasons: dict[str, list[str]] = {}
    for record in log.records:
        for refusal in record.refusals if record.name == rule else ():
            reasons.setdefault(refusal.reason, []).append(refusal.where or refusal.node)
    return reasons


def rounded_to_nearest(program: Program) -> list[str]:
    """A note if weights have few bits by rounding alone: most models lose much by that, and other methods less."""
    rounded = Provenance("computed", "rtn")
    few = [h for h in program.quantized.values() if h.provenance == rounded and h.format.bits < 8]
    if not few:
        return []
    kinds = " and ".join(sorted({str(h.format.grid).upper() for h in few}))
    return [
        f"rounded to nearest (rtn): {len(few)} weights in {kinds}, which suits models trained for it. Others lose less "
        "with a calibrated method, --method awq_gptq; `moec verify` measures what it costs"
    ]


def _codes(program: Program) -> tuple[CodesEntry, ...]:
    """What the program holds as codes, weights that are alike counted together."""
    alike = Counter(
        (
            h.role,
            h.format.bits,
            h.format.levels,
            h.format.group_size,
            h.group_axis,
            h.format.zero_points,
            str(h.provenance),
        )
        for h in program.quantized.values()
    )
    names = ("role", "bits", "levels", "group_size", "group_axis", "zero_points", "origin")
    return tuple(
        CodesEntry.model_validate({**dict(zip(names, key, strict=True)), "weights": count})
        for key, count in alike.items()
    )


def spec_digest(spec: Spec) -> str:
    """SHA-256 of a spec without its paths: the same for everybody who compiles the same thing."""
    return hashlib.sha256(json.dumps(portable(spec).model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _states(program: Program) -> tuple[StateEntry, ...]:
    """What the program carries between calls, states that are alike counted together."""
    alike: dict[tuple[Any, ...], list[State]] = {}
    for state in program.states.values():
        alike.setdefault((state.shape, state.dtype, state.codes, state.update), []).append(state)
    return tuple(_state_entry(states, program.info.context) for states in alike.values())


def _state_entry(states: Sequence[State], context: int) -> StateEntry:
    first = states[0]
    return StateEntry(
        states=len(states),
        shape=tuple(extent if isinstance(extent, int) else str(extent) for extent in first.shape),
        dtype=first.tensors(context)[0].dtype,
        update=str(first.update),
        block=() if first.codes is None else tuple(b or 0 for b in first.codes.block),
        bytes=sum(state.bytes(context) for state in states),
    )


def _entry(record: PassRecord) -> PassEntry:
    refusals = tuple(f"{r.where or r.node}: {r.reason}" for r in record.refusals)
    return PassEntry(
        name=record.name,
        changed=record.changed,
        digest=record.digest,
        refusals=refusals,
    )
