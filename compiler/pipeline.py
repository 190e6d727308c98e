"""Passes and the one iterator that runs them (`steps`): the dialect is checked after every pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from moec.compiler.dialect import Legality, check_dialect
from moec.compiler.errors import CompileError
from moec.compiler.program import Program, Stage, module_path


@dataclass(frozen=True)
class Refusal:
    """A candidate that a rule did not rewrite: why, the node that stood in the way, and what the user can do."""

    rule: str
    reason: str
    node: str
    where: str = ""  # module path of the block, for people
    remedy: str = ""
    read: tuple[str, ...] = ()  # what was understood before, nearest miss last

    @staticmethod
    def at(
        rule: str, node: Node, reason: str, remedy: str = "", *, block: Node | None = None, read: Sequence[str] = ()
    ) -> Refusal:
        """`block` lends its place when `node` (a weight, say) has none."""
        where = module_path(node) or (module_path(block) if block is not None else "")
        return Refusal(rule, reason, f"{node.name} ({node.target})", where, remedy, tuple(read))


@dataclass(frozen=True)
class PassResult:
    """`program` is a new Program (or the same object when `changed` is 0); `changed` counts rewrites.

    `folded` names weights that are read no more because others were multiplied by them.
    """

    program: Program
    changed: int
    refusals: tuple[Refusal, ...] = ()
    folded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """One rewrite. `needs` is the stage it starts from, `gives` the stage it leaves; a pass never lowers the stage.

    `declares`: what the program's target takes; it holds from here on.
    """

    name: str
    run: Callable[[Program], PassResult]
    needs: Stage
    gives: Stage
    declares: Legality | None = None


def legal_for(target: Legality, name: str = "legal") -> Pass:
    """A pass that rewrites nothing: the program must be legal for `target`; CompileError names the first violation."""
    return Pass(name, _legal, needs=Stage.FUSED, gives=Stage.LEGAL, declares=target)


def _legal(program: Program) -> PassResult:
    return PassResult(program.edit().done(stage=Stage.LEGAL), 0)


@dataclass(frozen=True)
class PassRecord:
    """What one run of a pass did: rewrites, seconds, candidates refused, the digest of the graph after it."""

    name: str
    changed: int
    seconds: float
    refusals: tuple[Refusal, ...] = ()
    digest: str = ""


@dataclass
class PipelineLog:
    """What ran, in order; the manifest stores it."""

    records: list[PassRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One pass that ran: the program it was given, what it made of it, and how long that took."""

    ran: Pass
    before: Program
    result: PassResult
    seconds: float

    @property
    def after(self) -> Program:
        return self.result.program


def steps(program: Program, passes: Sequence[Pass]) -> Iterator[Step]:
    """Run `passes` in order, one for each step that is taken: what compiling, verifying and bisecting iterate over.

    The program as it came, and after every pass, must be legal at its stage. CompileError when it is not; it then
    carries the reason of the nearest refusal.
    """
    refusals: list[Refusal] = []
    declared: Legality | None = None
    check_dialect(program, after="export")
    for p in passes:
        if program.stage < p.needs:
            raise AssertionError(f"pass {p.name} needs stage {p.needs.name}, the program is at {program.stage.name}")
        started = time.perf_counter()
        result = p.run(program)
        seconds = time.perf_counter() - started
        if result.program.stage < program.stage or result.program.stage < p.gives:
            raise AssertionError(f"pass {p.name} left stage {result.program.stage.name}, declared {p.gives.name}")
        refusals += result.refusals
        declared = p.declares or declared
        try:
            check_dialect(result.program, after=p.name, target=declared)
        except CompileError as error:
            raise with_reason(error, refusals) from None
        yield Step(p, program, result, seconds)
        program = result.program


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    log: PipelineLog | None = None,
    after: Callable[[Pass, PassResult], None] | None = None,
) -> Program:
    """The program after all `passes`. `after` sees every result (dumps, progress). CompileError as in `steps`."""
    for step in steps(program, passes):
        program, result = step.after, step.result
        if log is not None:
            record = PassRecord(step.ran.name, result.changed, step.seconds, result.refusals, program.digest())
            log.records.append(record)
        if after is not None:
            after(step.ran, result)
    return program


def with_reason(error: CompileError, refusals: Sequence[Refusal]) -> CompileError:
    """`error` with the reason of the refusal whose place shares the longest path with its own."""
    place = (error.place or "").split(".")

    def shared(refusal: Refusal) -> int:
        same = [a == b for a, b in zip(place, refusal.where.split("."), strict=False)]
        return same.index(False) if False in same else len(same)

    if not refusals:
        return error
    nearest = max(refusals, key=shared)
    return CompileError(
        f"{error.message}: {nearest.rule} stopped at {nearest.node}: {nearest.reason}",
        place=error.place,
        remedy=f"{nearest.remedy}; {error.remedy}" if nearest.remedy and error.remedy else error.remedy,
    )
