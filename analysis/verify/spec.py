"""`moec verify SPEC`, `moec bisect SPEC` and `moec diff A B`: from paths and specs to programs, passes and texts."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import torch

from moec.analysis.verify.diff import Difference, diff_artifacts, diff_texts, logits_figures
from moec.analysis.verify.foreign import before_target
from moec.analysis.verify.graphs import Sample
from moec.analysis.verify.passes import Bisection, bisect_passes, verify_passes
from moec.analysis.verify.prompts import WordHashEncoder, prompt_ids
from moec.analysis.verify.report import Report
from moec.analysis.verify.weights import with_random_weights
from moec.compiler import build
from moec.compiler.artifact import MANIFEST, Artifact
from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes
from moec.compiler.pipeline import Pass
from moec.compiler.program import Program, Stage
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.sources import source_of

DEFAULT_TOKENS = 48
_MAX_DUMP = 256 << 20  # bytes of a dumped graph


def verify_spec(
    spec: Spec,
    *,
    checkpoint: Path | None = None,
    target: str | None = None,
    after: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    text: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check every pass of a spec, or the one named `after`. Without any checkpoint the weights are random."""
    program, passes = program_and_passes(spec, checkpoint, target)
    return verify_passes(program, passes, samples(program, tokens, text), only=after, progress=progress)


def bisect_spec(
    spec: Spec,
    *,
    checkpoint: Path | None = None,
    target: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    progress: Progress | None = None,
) -> Bisection:
    """The first pass, and in it the first rewrite, that changes what the model computes."""
    program, passes = program_and_passes(spec, checkpoint, target)
    return bisect_passes(program, passes, samples(program, tokens, None), progress=progress)


def program_and_passes(spec: Spec, checkpoint: Path | None, target: str | None) -> tuple[Program, list[Pass]]:
    """What `compile` would run, with the weights of the checkpoint given, of the spec's, or else random ones."""
    named = checkpoint is not None or spec.checkpoint is not None
    if named or source_of(spec.model).has_weights(spec):
        return build.program_and_passes(spec, build.open_checkpoint(spec, checkpoint), target)
    program, passes = build.program_and_passes(spec, None, target)
    return with_random_weights(program), passes


def samples(program: Program, tokens: int, text: str | None) -> list[Sample]:
    """Real text by domain (or `text` alone), random ids, and adversarial ones: both ends of the vocabulary, repeated.

    `tokens` in total for the text; each sample is at most one call's length, and the context's.
    """
    vocab = program.info.vocab_size
    longest = min(program.info.max_tokens, program.info.context)
    found = prompt_ids(WordHashEncoder(vocab), tokens=tokens, text=text)
    count = min(max(tokens // 4, 3), longest)
    drawn = torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    edges = ([0] * 3 + [vocab - 1] * 3 + [0, vocab - 1])[:longest]
    listed = [Sample(name, tuple(ids[:longest])) for name, ids in found.items() if ids]
    return [*listed, Sample("random", tuple(drawn)), Sample("edges", tuple(edges))]


def diff_paths(a: Path, b: Path, *, stage: str = "fused", tokens: int = 64) -> Difference:
    """Compare two artifacts, two specs (their graphs at `stage`), or two dumped graph texts."""
    kinds = [_kind(path) for path in (a, b)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{a} is {kinds[0]}, {b} is {kinds[1]}", remedy="compare two of the same kind")
    if kinds[0] == "an artifact":
        return _diff_artifacts(Artifact.open(a), Artifact.open(b), tokens)
    if kinds[0] == "a spec":
        wanted = _stage(stage)
        texts = [_text_at(load_spec(path), wanted) for path in (a, b)]
    else:
        texts = [read_bytes(path, limit=_MAX_DUMP).decode("utf-8", "replace") for path in (a, b)]
    return diff_texts(*texts, names=(str(a), str(b)))


def _kind(path: Path) -> str:
    if path.is_dir():
        return "an artifact" if (path / MANIFEST).exists() else "a folder without a manifest"
    if path.suffix in (".yaml", ".yml"):
        return "a spec"
    if not path.exists():
        raise UserError("no such file or folder", place=str(path), remedy="name an artifact, a spec or a graph dump")
    return "a graph dump"


def _diff_artifacts(a: Artifact, b: Artifact, tokens: int) -> Difference:
    first, second = build.load(a.in_memory()), build.load(b.in_memory())
    try:
        prompts = prompt_ids(WordHashEncoder(first.vocab_size), tokens=tokens)
        return diff_artifacts(a, b, logits_figures(first, second, prompts))
    finally:
        first.close()
        second.close()


def _stage(name: str) -> Stage:
    try:
        return Stage[name.upper()]
    except KeyError:
        names = ", ".join(s.name.lower() for s in Stage)
        raise UserError(f"there is no stage {name!r}", remedy=f"name one of {names}") from None


def _text_at(spec: Spec, stage: Stage) -> str:
    """The graph of a spec just before the first pass that would lift it above `stage`, or that is a target's."""
    program, passes = build.program_and_passes(spec, None)
    if stage == Stage.LEGAL:
        return build.run_all(program, passes).text()
    return before_target(program, list(takewhile(lambda p: p.gives <= stage, passes))).text()
