"""A pipeline checked pass by pass: `moec verify SPEC` and `moec bisect SPEC` once they have program and passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moec.analysis.verify.graphs import Region, Sample, compare_regions, pass_checks
from moec.analysis.verify.interpret import WeightCache
from moec.analysis.verify.report import Check, Report
from moec.compiler.errors import UserError
from moec.compiler.pipeline import Pass, Step, steps
from moec.compiler.program import Program
from moec.compiler.progress import Progress


def verify_passes(
    program: Program,
    passes: Sequence[Pass],
    samples: Sequence[Sample],
    *,
    only: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run `passes` in order and check each (or the one named `only`) against the graph it was given.

    UserError if no pass is called `only`. A fault that the dialect or a pass raises is the pipeline's own error.
    """
    if only is not None and all(p.name != only for p in passes):
        names = ", ".join(dict.fromkeys(p.name for p in passes))
        raise UserError(f"there is no pass {only!r}", remedy=f"name one of {names}")
    progress = progress or Progress(quiet=True)
    checks: list[Check] = []
    cache = WeightCache()
    figures: dict[str, Any] = {}
    graphs: list[list[str]] = []
    with progress.stage("verify passes", len(passes)) as done:
        for step in steps(program, passes):
            name, result = step.ran.name, step.result
            if only in (None, name):
                checks += step_checks(step, samples, cache)
            refused = f", {len(result.refusals)} refused" if result.refusals else ""
            graphs.append([name, step.after.digest()])
            figures[name] = f"{result.changed} changed{refused}, graph {graphs[-1][1]}"
            done(name)
    tokens = ", ".join(f"{s.name} {len(s.ids)}" for s in samples)
    return Report(
        "passes", program.info.name, tuple(checks), figures={"tokens": tokens, **figures}, about={"graphs": graphs}
    )


def step_checks(step: Step, samples: Sequence[Sample], cache: WeightCache) -> list[Check]:
    """All checks of one pass against the graph it was given."""
    result = step.result
    return pass_checks(step.ran.name, step.before, step.after, result.changed, samples, cache, result.folded)


@dataclass(frozen=True)
class Bisection:
    """The first pass that breaks the program, and within it the first rewrite that does. `culprit` None: none does."""

    subject: str
    passes: tuple[str, ...]  # those that ran, in order; the last one is the culprit if there is one
    culprit: str | None = None
    region: Region | None = None
    failures: tuple[Check, ...] = ()

    def to_json(self) -> dict[str, Any]:
        region = self.region
        return {
            "subject": self.subject,
            "passes": list(self.passes),
            "culprit": self.culprit,
            "node": region.node if region else None,
            "where": region.where if region else None,
            "ratio": region.ratio if region else None,
            "failures": [c.to_json() for c in self.failures],
        }

    def text(self) -> str:
        if self.culprit is None:
            return f"{self.subject}: all {len(self.passes)} passes keep what the model computes"
        lines = [f"{self.subject}: pass {self.culprit}, number {len(self.passes)} in order, breaks the program"]
        if self.region is not None:
            where = f" in {self.region.where}" if self.region.where else ""
            lines.append(
                f"  first wrong rewrite: node {self.region.node}{where}, {self.region.ratio:.3g} x the tolerance"
            )
        return "\n".join(lines + [f"  {check.line()}" for check in self.failures])


def bisect_passes(
    program: Program, passes: Sequence[Pass], samples: Sequence[Sample], *, progress: Progress | None = None
) -> Bisection:
    """Run pass after pass until one fails a check; then look for the rewrite.

    Every pass is compared with the graph it was given, so the first failure is the culprit: there is nothing to halve.
    CompileError when a pass leaves what its stage does not permit.
    """
    progress = progress or Progress(quiet=True)
    ran: list[str] = []
    cache = WeightCache()
    with progress.stage("bisect", len(passes)) as done:
        for step in steps(program, passes):
            ran.append(step.ran.name)
            failures = tuple(c for c in step_checks(step, samples, cache) if not c.passed)
            if failures:
                wrong = [r for r in compare_regions(step.before, step.after, samples[0]) if r.failed]
                region = wrong[0] if wrong else None
                return Bisection(program.info.name, tuple(ran), step.ran.name, region, failures)
            done(step.ran.name)
    return Bisection(program.info.name, tuple(ran))
