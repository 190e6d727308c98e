"""`moec verify ARTIFACT --against TARGETS`: independent toolchains, and the eager model, run on the same tokens.

Every member (a target's artifact, or `eager`) is compared with every other; a member that disagrees with more of them
than any other does is the odd one out. `eager` has no single arithmetic: it meets each target in that target's own
(whether activations and KV cache are rounded, as its manifest says), and has one voice.

    float        neither member rounds activations or cache: row by row, relative to the row's largest logit
    rounded      one does. Such runs drift apart (see `reference.py`), so medians and shares are judged, with the drift
                 measured between the eager model and itself perturbed, and between the two eager models where the two
                 members do not round alike

T tokens, V vocabulary, K experts per token.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.analysis.verify import metrics, tolerances
from moec.analysis.verify.agreement_report import AgreementReport, PairRow
from moec.analysis.verify.artifact import (
    asymmetric_roles,
    computed_scheme,
    encoder,
    layer_reference,
    open_artifact_checkpoint,
    peak_rss_mb,
    spec_of,
)
from moec.analysis.verify.compare import DECODE_STEPS
from moec.analysis.verify.foreign import GraphReference, as_compiled, before_target
from moec.analysis.verify.interpret import WeightCache
from moec.analysis.verify.prompts import prompt_ids
from moec.analysis.verify.replay import bounds, joined_traces
from moec.analysis.verify.report import Check
from moec.analysis.verify.rounding import attention_of
from moec.analysis.verify.tolerances import Tolerance, beyond_drift
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import ArtifactError, RunError, UserError
from moec.compiler.progress import Progress
from moec.compiler.reference import Reference
from moec.compiler.spec.model import Spec
from moec.compiler.spec.targets import target_packages
from moec.compiler.target import Session, target_of
from moec.compiler.trust import trusting

EAGER = "eager"
DEFAULT_TOKENS = 128

_FLOAT = "fp32 sums in another order move a logit by some 1e-6 of the row's largest; a wrong block moves it by percents"
ROW_FLOAT = Tolerance("<=", 1e-5, "of the row's largest logit", _FLOAT)
ROW_CODES = Tolerance(
    "<=", 1e-4, "of the row's largest logit",
    _FLOAT + "; scales multiply before or after the sum over a group, so more sums differ in their order",
)  # fmt: skip
RAN = Tolerance("<=", 0.0, "faults", "a target that cannot run what it compiled agrees with nobody")


@dataclass(frozen=True)
class Run:
    """What one member made of the prompts. `experts`: by prompt, [layers][T, K]; None where it is not traceable."""

    logits: Mapping[str, np.ndarray]
    experts: Mapping[str, tuple[np.ndarray, ...]] | None


@dataclass(frozen=True)
class Arithmetic:
    """What a target rounds, and the eager model that rounds so. `tied`: by prompt, tokens whose selection is a tie in
    any layer, bool [T]; by layer in `ties`."""

    key: str
    rounds: bool
    quantized: bool
    reference: Any
    run: Run
    ties: Mapping[str, tuple[np.ndarray, ...]]
    prompts: Mapping[str, Sequence[int]]

    @cached_property
    def perturbed(self) -> Run:
        return _eager_run(self.reference, self.prompts, perturbed=True)[0]

    @cached_property
    def tied(self) -> dict[str, np.ndarray]:
        return {n: np.logical_or.reduce([np.zeros(len(i), bool), *self.ties[n]]) for n, i in self.prompts.items()}


@dataclass(frozen=True)
class Member:
    """One voice. `eager` runs in the arithmetic of whom it meets."""

    name: str
    run: Run | None
    arithmetic: Arithmetic | None
    folder: str = ""


@dataclass
class _Found:
    members: list[Member] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def verify_agreement(
    path: str | Path,
    against: Sequence[str],
    *,
    checkpoint: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    text: str | None = None,
    progress: Progress | None = None,
) -> AgreementReport:
    """Compare an artifact with others of the same spec and with the eager model.

    against: names of targets, whose artifacts are compiled here from the spec and checkpoint that the manifest names,
    and folders of artifacts that exist. A target that cannot be compiled or loaded here is reported with its reason
    and has no voice. UserError for a name that is neither, ArtifactError for an artifact of another model.
    """
    started = time.perf_counter()
    progress = progress or Progress(quiet=True)
    artifact = Artifact.open(path)
    artifact.check_contents()
    others = _sorted_out(artifact, against)
    spec = spec_of(artifact, checkpoint)
    store = open_artifact_checkpoint(artifact, spec, checkpoint)
    prompts = prompt_ids(encoder(artifact), tokens=tokens, text=text)
    prompts = {name: ids[: artifact.manifest.model.context] for name, ids in prompts.items() if ids}
    if not prompts:
        raise UserError("there is no token in the text to verify with", remedy="give a longer text")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in `verify_artifact`
    found = _Found()
    try:
        with ExitStack() as stack:
            _members(found, artifact, others, spec, store.folder, prompts, stack, progress)
        _add_arithmetic(found, spec, store, prompts, progress)
        rows, checks = _compared(found, progress)
    finally:
        torch.set_num_threads(threads)
    checks += [Check(f"{name} runs", 1.0, RAN, detail=why) for name, why in found.failed.items()]
    odd, undecided = odd_ones_out([(row.a, row.b) for row in rows if not row.passed], found.failed)
    figures = {
        "tokens": sum(map(len, prompts.values())),
        "seconds": round(time.perf_counter() - started, 1),
        "peak RSS MB": round(peak_rss_mb()),
    }
    about = {
        "artifact": str(artifact.folder),
        "name": artifact.manifest.name,
        "members": {m.name: m.folder for m in found.members if m.folder},
        "quantization": artifact.manifest.quantization,
        "digests": artifact.manifest.digests.model_dump(mode="json"),
    }
    return AgreementReport(
        "agreement", str(artifact.folder), tuple(checks), (), figures, about,
        tuple(rows), dict(found.unavailable), tuple(odd), undecided,
    )  # fmt: skip


def odd_ones_out(disagreements: Sequence[tuple[str, str]], failed: Collection[str] = ()) -> tuple[list[str], bool]:
    """(who stands apart, whether any disagreement is left that names nobody).

    Taken away one by one: the member of most disagreements, as long as there is one such member.
    """
    odd, left = list(failed), list(disagreements)
    while left:
        counts = Counter(name for pair in left for name in pair)
        (first, most), *rest = counts.most_common()
        if rest and rest[0][1] == most:
            return odd, True
        odd.append(first)
        left = [pair for pair in left if first not in pair]
    return odd, False


# --- members --------------------------------------------------------------------------------------------------------


def _sorted_out(artifact: Artifact, against: Sequence[str]) -> list[tuple[str, Artifact | None]]:
    """(label, the artifact when a folder was named) of each other member, checked before anything runs."""
    others: list[tuple[str, Artifact | None]] = []
    for name in dict.fromkeys(against):
        if name in target_packages():
            if name != artifact.manifest.target:
                others.append((name, None))
            continue
        if not Path(name).is_dir():
            known = ", ".join(target_packages())
            raise UserError(f"{name!r} is neither a target nor an artifact folder", remedy=f"targets here: {known}")
        other = Artifact.open(name)
        other.check_contents()
        ours, theirs = artifact.manifest, other.manifest
        same = ours.model.vocab_size == theirs.model.vocab_size and ours.model.moe_layers == theirs.model.moe_layers
        if not same or ours.digests.checkpoint != theirs.digests.checkpoint:
            raise ArtifactError(f"is not of the model and checkpoint of {artifact.folder}", place=name)
        others.append((theirs.target, other))
    return others


def _members(
    found: _Found,
    artifact: Artifact,
    others: Sequence[tuple[str, Artifact | None]],
    spec: Spec,
    checkpoint: Path,
    prompts: Mapping[str, Sequence[int]],
    stack: ExitStack,
    progress: Progress,
) -> None:
    """Every artifact, run. Those made here live in a temporary folder until then."""
    _add_run(found, artifact.manifest.target, artifact, prompts, progress)
    for label, other in others:
        opened, made_here = other, other is None
        if opened is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moec-against-"))) / label
            try:
                opened = build.compile(spec, target=label, checkpoint=checkpoint, out=folder, progress=progress)
            except UserError as error:
                found.unavailable[label] = str(error)
                continue
        names = {m.name for m in found.members} | set(found.failed)
        with trusting(made_here):  # a program that was compiled in this very call
            _add_run(
                found, label if label not in names else f"{label} ({opened.folder.name})", opened, prompts, progress
            )


def _add_run(
    found: _Found, name: str, artifact: Artifact, prompts: Mapping[str, Sequence[int]], progress: Progress
) -> None:
    """Load and run one artifact, in float32 where its own arithmetic is narrower."""
    try:
        session = build.load_exact(artifact.in_memory())
    except UserError as error:
        found.unavailable[name] = str(error)
        return
    try:
        with progress.stage(f"run {name}", len(prompts)) as step:
            run = run_session(session, prompts, len(artifact.manifest.model.moe_layers), step)
    except RunError as error:
        found.failed[name] = str(error)
        return
    finally:
        session.close()
    scheme = computed_scheme(artifact.manifest, spec_of(artifact))
    rounds = scheme is not None and scheme.rounds
    roles = asymmetric_roles(artifact.manifest)
    # attention over float caches is the same everywhere
    integers = scheme is not None and scheme.cache_codes is not None and target_of(artifact).integer_attention
    key = json.dumps([None if scheme is None else scheme.model_dump(mode="json"), sorted(roles), integers])
    arithmetic = Arithmetic(key, rounds, scheme is not None, (artifact, scheme), run, {}, {})
    found.members.append(Member(name, run, arithmetic, str(artifact.folder)))


def run_session(session: Session, prompts: Mapping[str, Sequence[int]], moe_layers: int, step: Any = None) -> Run:
    """All logits of every prompt: odd chunks, then single tokens. Selections where the session traces every layer."""
    logits: dict[str, np.ndarray] = {}
    experts: dict[str, tuple[np.ndarray, ...]] = {}
    for name, ids in prompts.items():
        session.reset()
        session.trace(True)
        session.take_traces()
        head = len(ids) - min(DECODE_STEPS, len(ids))
        cuts = bounds(head)
        parts = [session.prefill(list(ids[a:b]), logits="all") for a, b in pairwise(cuts)]
        logits[name] = np.concatenate([*parts, *(np.asarray(session.decode(int(t)))[None] for t in ids[head:])])
        traces = joined_traces(session.take_traces())
        session.trace(False)
        if [t.layer for t in traces] == list(range(moe_layers)) and all(len(t.indices_TK) == len(ids) for t in traces):
            experts[name] = tuple(t.indices_TK for t in traces)
        if step is not None:
            step(name)
    return Run(logits, experts if len(experts) == len(prompts) else None)


# --- the eager model ------------------------------------------------------------------------------------------------


def _add_arithmetic(
    found: _Found, spec: Spec, store: Any, prompts: Mapping[str, Sequence[int]], progress: Progress
) -> None:
    """Run the eager model once for each arithmetic among the members, and give it its place among them."""
    made: dict[str, Arithmetic] = {}
    members = []
    for member in found.members:
        assert member.arithmetic is not None
        template = member.arithmetic
        artifact, scheme = template.reference
        reference: Reference | None = layer_reference(artifact, spec, store, scheme)
        key = template.key if reference is not None else artifact.manifest.target
        if key not in made:
            if reference is None:
                program, passes = build.program_and_passes(spec, store, artifact.manifest.target)
                attention = attention_of(target_of(artifact))
                rounded = before_target(program, as_compiled(artifact, passes))
                reference = GraphReference(rounded, WeightCache(), attention)
            with progress.stage(f"run {EAGER} as {member.name} rounds"):
                run, ties = _eager_run(reference, prompts)
            made[key] = Arithmetic(key, template.rounds, template.quantized, reference, run, ties, prompts)
        members.append(Member(member.name, member.run, made[key], member.folder))
    found.members = [*members, Member(EAGER, None, None)] if members else []


def _eager_run(
    reference: Any, prompts: Mapping[str, Sequence[int]], *, perturbed: bool = False
) -> tuple[Run, dict[str, tuple[np.ndarray, ...]]]:
    """The run, and by prompt and layer the tokens whose selection is a tie."""
    experts: dict[str, list[np.ndarray]] = {name: [] for name in prompts}
    ties: dict[str, list[np.ndarray]] = {name: [] for name in prompts}

    def on_layer(layer: int, block: Any, routed: Mapping[str, Any]) -> None:
        for name, r in routed.items():
            experts[name].append(r.indices_TK)
            ties[name].append(metrics.selection_gaps(r.scores_TE, r.indices_TK.shape[-1]) < tolerances.TIE_GAP)

    logits = (reference.perturbed if perturbed else reference.run)(prompts, on_layer)
    return Run(logits, {n: tuple(e) for n, e in experts.items()}), {n: tuple(t) for n, t in ties.items()}


# --- pairs ----------------------------------------------------------------------------------------------------------


def _compared(found: _Found, progress: Progress) -> tuple[list[PairRow], list[Check]]:
    rows, checks = [], []
    pairs = list(combinations(found.members, 2))
    with progress.stage("compare", len(pairs)) as step:
        for a, b in pairs:
            row, own = compare_pair(a, b)
            rows.append(row)
            checks += own
            step(f"{a.name} and {b.name}")
    return rows, checks


def compare_pair(a: Member, b: Member) -> tuple[PairRow, list[Check]]:
    """Two members; the second may be `eager`, which then runs in the arithmetic of the first."""
    assert a.arithmetic is not None
    assert a.run is not None
    ours, theirs = a.arithmetic, b.arithmetic or a.arithmetic
    other = b.run or ours.run
    cosines = np.concatenate([metrics.row_cosines(x, other.logits[n]) for n, x in a.run.logits.items()])
    top1 = np.concatenate([metrics.top1_matches(x, other.logits[n]) for n, x in a.run.logits.items()])
    same, compared = _expert_sets(a.run, other, ours)
    relative, left_out = row_distance(a.run, other, ours.tied)
    checks = _limits(f"{a.name} and {b.name}", ours, theirs, relative, float(np.median(cosines)), float(top1.mean()),
                     len(top1), same, compared)  # fmt: skip
    row = PairRow(
        a=a.name,
        b=b.name,
        rounded=ours.rounds or theirs.rounds,
        sqnr_db=min(metrics.sqnr_db(other.logits[n], x) for n, x in a.run.logits.items()),
        median_cosine=float(np.median(cosines)),
        min_cosine=float(cosines.min()),
        max_abs_error=max(metrics.max_abs_error(other.logits[n], x) for n, x in a.run.logits.items()),
        relative_error=relative,
        left_out=left_out,
        top1=float(top1.mean()),
        expert_sets=same if compared else None,
        passed=all(c.passed for c in checks),
    )
    return row, checks


def _limits(
    pair: str,
    ours: Arithmetic,
    theirs: Arithmetic,
    relative: float,
    cosine: float,
    top1: float,
    tokens: int,
    same: float,
    compared: int,
) -> list[Check]:
    if not ours.rounds and not theirs.rounds:
        limit = ROW_CODES if ours.quantized else ROW_FLOAT
        if relative > limit.limit:  # many layers of fp32 sums: no tighter than the eager model stays to itself
            drift = 2 * row_distance(ours.run, ours.perturbed, ours.tied)[0]
            limit = Tolerance("<=", max(limit.limit, drift), limit.unit, f"{limit.reason}; perturbed: {drift:.2g}")
        checks = [Check(f"{pair}: logits", relative, limit), Check(f"{pair}: top-1", top1, tolerances.TOP1)]
        if compared:
            checks.append(Check(f"{pair}: experts", same, tolerances.ROUTER_SETS))
        return checks
    drift, drift_top1, drift_sets = _drift(ours, theirs)
    checks = [
        Check(f"{pair}: logits, median cosine", cosine, beyond_drift(tolerances.MEDIAN_COSINE, drift)),
        Check(f"{pair}: top-1", top1, beyond_drift(tolerances.TOP1, drift_top1, tokens)),
    ]
    if compared:
        checks.append(Check(f"{pair}: experts", same, beyond_drift(tolerances.ROUTER_SETS, drift_sets, compared)))
    return checks


def _drift(ours: Arithmetic, theirs: Arithmetic) -> tuple[float, float, float]:
    """How far two right runs may be apart: 1 - median cosine, 1 - top-1, 1 - expert sets.

    The wider drift of the two eager models, and the distance between them where they round differently.
    """

    def apart(x: Run, y: Run) -> np.ndarray:
        cosines = np.concatenate([metrics.row_cosines(r, y.logits[n]) for n, r in x.logits.items()])
        top1 = np.concatenate([metrics.top1_matches(r, y.logits[n]) for n, r in x.logits.items()])
        same, compared = _expert_sets(x, y, ours)
        return 1 - np.array([np.median(cosines), top1.mean(), same if compared else 1.0])

    total = np.maximum.reduce([apart(arithmetic.run, arithmetic.perturbed) for arithmetic in (ours, theirs)])
    if ours.key != theirs.key:
        total = total + apart(ours.run, theirs.run)
    return float(total[0]), float(total[1]), float(total[2])


def row_distance(a: Run, b: Run, tied: Mapping[str, np.ndarray]) -> tuple[float, int]:
    """(worst row's largest difference over its largest logit, rows left out since a tie in or before them flips).

    Only rows beyond the limit for codes are ever left out; inf for values that are not finite.
    """
    worst, left_out = 0.0, 0
    for name, x_TV in a.logits.items():
        y_TV = b.logits[name]
        difference_T = np.abs(x_TV.astype(np.float64) - y_TV).max(-1)
        size_T = np.maximum(np.maximum(np.abs(x_TV).max(-1), np.abs(y_TV).max(-1)), 1e-30)
        with np.errstate(invalid="ignore"):
            ratio_T = np.where(np.isfinite(difference_T) & np.isfinite(size_T), difference_T / size_T, np.inf)
        excused_T = np.logical_or.accumulate(tied[name]) & (ratio_T > ROW_CODES.limit) & np.isfinite(ratio_T)
        left_out += int(excused_T.sum())
        worst = max(worst, float(ratio_T[~excused_T].max(initial=0.0)))
    return worst, left_out


def _expert_sets(a: Run, b: Run, arithmetic: Arithmetic) -> tuple[float, int]:
    """(share of selections that are equal as sets, how many were compared); ties of the eager model are left out."""
    if a.experts is None or b.experts is None:
        return float("nan"), 0
    equal = compared = 0
    for name, layers in a.experts.items():
        for x_TK, y_TK, tie_T in zip(layers, b.experts[name], arithmetic.ties[name], strict=True):
            same_T = (np.sort(x_TK, -1) == np.sort(y_TK, -1)).all(-1)
            equal += int((same_T & ~tie_T).sum())
            compared += int((~tie_T).sum())
    return (equal / compared, compared) if compared else (float("nan"), 0)
