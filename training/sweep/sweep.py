"""A sweep: a queue of small runs, point by point and seed by seed, and the report of their losses.

The queue takes all points of one seed before the next seed, so that a sweep that is stopped leaves whole blocks. A run
that diverges or fails is reported and the queue goes on; one that was stopped continues from its own state.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from moec.compiler.errors import RunError, SpecError, UserError
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec
from moec.compiler.spec.training import Training, TrainingStage
from moec.sources.decoder.config import DecoderConfig, decoder_of
from moec.training import stages
from moec.training.data.shards import INDEX, Corpus
from moec.training.experts import chosen
from moec.training.metrics import clock
from moec.training.precision import resolved
from moec.training.run import train
from moec.training.sweep import speed
from moec.training.sweep.grid import MULTIPLE, Grid, LeftOut, Point, points
from moec.training.sweep.store import FORMAT, Request, Result, Store

_LONG = 120.0  # seconds of a run whose own progress is shown in a log
_SHARE = 0.95  # of a budget of time that runs are planned to take


@dataclass(frozen=True)
class Asked:
    """What a sweep is asked for. grid.tokens may be empty where `time` is given: as many as there is time for.

    seeds: how many, from the spec's on. time: seconds of all runs together. threads, device: as of `moec train`.
    """

    spec: Spec
    corpus: Corpus
    grid: Grid
    seeds: int
    time: float | None
    tolerance: float
    multiple: int
    threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Planned:
    """A sweep before it begins. rates: tokens a second by point, seconds: predicted of each run."""

    asked: Asked
    model: DecoderConfig
    stage: TrainingStage
    points: tuple[Point, ...]
    left_out: tuple[LeftOut, ...]
    seeds: tuple[int, ...]
    rates: dict[str, float]
    seconds: dict[str, float]
    device: str

    @property
    def predicted(self) -> float:
        """Seconds of all runs."""
        return sum(self.seconds[p.name] for p in self.points) * len(self.seeds)

    @property
    def warnings(self) -> list[str]:
        """What the user should know before it begins."""
        slow = [p for p in self.points if p.config.moe is not None and not _grouped(p, self.device, self.stage)]
        found = []
        if slow:
            widths = ", ".join(sorted({str(p.config.moe.expert_width) for p in slow if p.config.moe}))
            found.append(
                f"{len(slow)} points have experts {widths} wide, which grouped products cannot take (multiples of 8): "
                "a loop over the experts computes them, which is slower and gives the same"
            )
        if len(self.seeds) == 1:
            found.append("one seed leaves nothing to estimate the noise from: there will be no intervals")
        return found

    @property
    def runs(self) -> list[tuple[Point, int]]:
        """The queue."""
        return [(point, seed) for seed in self.seeds for point in self.points]

    def digest(self) -> str:
        """Of everything that decides the losses, the seeds apart."""
        stage, quantization = self.stage.model_dump(mode="json"), self.asked.spec.quantization
        told = {
            "stage": {key: value for key, value in stage.items() if key != "tokens"},
            "quantization": None if quantization is None else quantization.model_dump(mode="json"),
            "points": [[p.name, p.tokens, p.config.model_dump(mode="json")] for p in self.points],
            "warmup": _warmup_share(self.stage),
            "seed": self.seeds[0],
            "corpus": hashlib.sha256((self.asked.corpus.folder / INDEX).read_bytes()).hexdigest(),
            "tokenizer": self.asked.corpus.index["tokenizer_sha256"],
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def spec(self, point: Point) -> Spec:
        """What `moec train` trains for a point: the spec's first stage, at the point's shape and tokens."""
        training = self.asked.spec.training
        assert training is not None
        schedule = self.stage.learning_rate
        warmup = schedule.model_copy(update={"warmup": int(_warmup_share(self.stage) * point.tokens)})
        stage = self.stage.model_copy(update={"tokens": point.tokens, "learning_rate": warmup, "eval_every": None})
        section = Training(stages=(stage,), seed=training.seed)
        name = f"{self.asked.spec.name[:40]}-{point.name}"
        return self.asked.spec.model_copy(update={"name": name, "model": point.config, "training": section})


def _grouped(point: Point, device: str, stage: TrainingStage) -> bool:
    """Whether the experts are computed as `auto` wants them: where a loop is the faster way, it is no loss."""
    moe = point.config.moe
    assert moe is not None
    dtype = torch.bfloat16 if resolved(stage, torch.device(device)).precision == "bf16" else torch.float32
    wanted = chosen("auto", moe.experts, device, dtype) == "grouped"
    return not wanted or (moe.expert_width % MULTIPLE == 0 and point.d_model % MULTIPLE == 0)


def _warmup_share(stage: TrainingStage) -> float:
    return stage.learning_rate.warmup / stage.tokens


def plan(asked: Asked, known: Request | None = None, progress: Progress | None = None) -> Planned:
    """The points and what they cost: a few steps of each are timed. known: the sweep that is continued, if one is.

    UserError for everything that no point could be trained with.
    """
    spec, place = asked.spec, asked.spec.name
    model, training = decoder_of(spec, "swept"), spec.training
    if training is None:
        raise SpecError("has no `training:` section", place=place, remedy="give it a stage to train")
    stage = training.stages[0]
    if stage.distillation is not None:
        what = f"its first stage, {stage.name}, learns from a teacher, which a sweep does not have"
        raise SpecError(what, place=place, remedy="remove its `distillation:`")
    if stage.quantization != "none":
        what = f"a sweep trains in float, and its first stage, {stage.name}, rounds"
        raise SpecError(what, place=place, remedy="begin with another stage")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep runs in one process", remedy="start it without the launcher")
    if not _evaluated(stage, asked.corpus):
        remedy = "build the corpus with more text"
        raise UserError("no domain of the mixture has held-out text", place=str(asked.corpus.folder), remedy=remedy)
    asked.corpus.check()
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    stage = resolved(stage, torch.device(device))
    tokens = asked.grid.tokens or (tuple(known.tokens) if known is not None else ())
    grid = replace(asked.grid, tokens=tokens or (0,))
    found, left = points(model, grid, tolerance=asked.tolerance, multiple=asked.multiple)
    seeds = tuple(range(training.seed, training.seed + asked.seeds))
    rates = _rates(found, stage, device, known, progress or Progress(quiet=True))
    evaluated = sum(_evaluated(stage, asked.corpus).values())
    if not tokens:
        assert asked.time is not None
        each = speed.tokens_within(_SHARE * asked.time / len(seeds), evaluated, [rates[_shape(p)] for p in found])
        step = stage.rows * stage.context
        if each < step:
            raise UserError(
                f"{len(found) * len(seeds)} runs in {clock(asked.time)} leave {max(0, each):,} tokens for each, "
                f"a step has {step:,}",
                place="--budget",
                remedy="give more time, fewer values or fewer seeds",
            )
        found = tuple(replace(p, tokens=each // step * step) for p in found)
    seconds = {p.name: speed.seconds(p.tokens, evaluated, rates[_shape(p)]) for p in found}
    planned = Planned(asked, model, stage, found, left, seeds, rates, seconds, device)
    for point in found:
        _check(planned, point)
    return planned


def _shape(point: Point) -> str:
    """Points that differ in tokens alone are as fast as each other."""
    return replace(point, tokens=0).name


def _rates(
    found: Sequence[Point], stage: TrainingStage, device: str, known: Request | None, progress: Progress
) -> dict[str, float]:
    rates: dict[str, float] = {}
    shapes = {_shape(point): point for point in found}
    if known is not None and all(name in known.rates for name in shapes):
        return known.rates
    for name in progress.each("timing", shapes):
        rates[name] = speed.tokens_per_second(shapes[name].config, stage, torch.device(device))
    return rates


def _check(planned: Planned, point: Point) -> None:
    """What `moec train` checks before a run begins."""
    spec = planned.spec(point)
    assert spec.training is not None
    seed = planned.seeds[0]
    asked = planned.asked
    stages.check(
        stages.Plan(
            spec, point.config, spec.training, asked.corpus, Path(), None, False, None, seed, None, "auto", "torch"
        )
    )


def _evaluated(stage: TrainingStage, corpus: Corpus) -> dict[str, int]:
    """Held-out tokens that an evaluation reads, by domain of the mixture; without domains that have none."""
    found = {}
    for domain, share in stage.shares().items():
        if share > 0 and domain in corpus.domains and corpus.shard(domain, "heldout").documents:
            found[domain] = min(stage.eval_tokens, int(corpus.shard(domain, "heldout").starts[-1]))
    return found


def mean_loss(stage: TrainingStage, heldout: dict[str, float]) -> float:
    """The held-out loss over the stage's mixture, of the domains that have held-out text, nats per predicted token."""
    shares = {domain: share for domain, share in stage.shares().items() if domain in heldout and share > 0}
    return sum(share * heldout[domain] for domain, share in shares.items()) / sum(shares.values())


@dataclass(frozen=True)
class Swept:
    """Where a sweep is. waiting: runs that the budget of time leaves no room for."""

    planned: Planned
    results: tuple[Result, ...]
    waiting: tuple[tuple[str, int], ...]

    @property
    def trained(self) -> tuple[Result, ...]:
        return tuple(r for r in self.results if r.status == "trained")

    @property
    def lost(self) -> tuple[Result, ...]:
        """Runs without a loss: diverged or failed."""
        return tuple(r for r in self.results if r.status != "trained")


class Sweep:
    """A planned sweep in its folder."""

    def __init__(self, planned: Planned, out: Path, *, resume: bool, progress: Progress) -> None:
        self._planned, self._store, self._resume, self._progress = planned, Store(out), resume, progress

    def run(self) -> Iterator[Swept]:
        """Every run that is not done, one after the other; the sweep behind each of them, and at the end.

        UserError if the folder holds another sweep, or this one without `resume`. KeyboardInterrupt with the state of
        the run saved.
        """
        with self._store.owned():
            self._begin()
            yield from self._runs()

    def _begin(self) -> None:
        planned, place = self._planned, str(self._store.out)
        known = self._store.request()
        request = Request(
            FORMAT,
            planned.asked.spec.name,
            planned.digest(),
            sorted({p.tokens for p in planned.points}),
            planned.rates,
            torch.get_num_threads(),
            planned.device,
            {"python": ".".join(map(str, sys.version_info[:3])), **{n: version(n) for n in ("moec", "torch")}},
        )
        if known is None:
            if self._resume:
                self._progress.write(f"{place} has nothing to resume: the sweep begins")
            self._store.begin(request)
            return
        if not self._resume:
            raise UserError("holds a sweep", place=place, remedy="continue it with --resume, or choose another --out")
        if known.digest != request.digest:
            what = "the spec, the corpus or the grid has changed since the sweep began"
            raise UserError(what, place=place, remedy="choose another --out")
        if (known.threads, known.device) != (request.threads, request.device):
            was, now = (f"{r.threads} threads on {r.device}" for r in (known, request))
            self._progress.write(f"begun with {was}, continued with {now}: losses may differ in their last digits")

    def _runs(self) -> Iterator[Swept]:
        planned = self._planned
        done = {run: found for run in planned.runs if (found := self._kept(*run)) is not None}
        waiting: list[tuple[str, int]] = []
        spent = sum(result.seconds for result in done.values())
        for number, (point, seed) in enumerate(planned.runs, 1):
            if (point, seed) in done:
                continue
            needed = planned.seconds[point.name] * self._correction(done)
            if waiting or (planned.asked.time is not None and spent + needed > planned.asked.time):
                waiting.append((point.name, seed))
                continue
            result = self._train(point, seed, f"{number}/{len(planned.runs)} {point.block}, seed {seed}")
            done[point, seed] = result
            spent += result.seconds
            left = sum(planned.seconds[p.name] for p, s in planned.runs if (p, s) not in done)
            self._say(number, point, result, left * self._correction(done))
            yield Swept(planned, tuple(done[run] for run in planned.runs if run in done), ())
        yield Swept(planned, tuple(done[run] for run in planned.runs if run in done), tuple(waiting))

    def _kept(self, point: Point, seed: int) -> Result | None:
        """The result of a run that is not to be tried again: what failed is, what diverged would again."""
        found = self._store.result(point.name, seed)
        return None if found is None or found.status == "failed" else found

    def _correction(self, done: dict[tuple[Point, int], Result]) -> float:
        """How much longer runs took than was predicted."""
        trained = [(self._planned.seconds[p.name], r.seconds) for (p, _), r in done.items() if r.status == "trained"]
        predicted = sum(guess for guess, _ in trained)
        return sum(real for _, real in trained) / predicted if predicted > 0 else 1.0

    def _train(self, point: Point, seed: int, title: str) -> Result:
        planned, folder = self._planned, self._store.run_folder(point.name, seed)
        began = time.perf_counter()
        progress = _Within(self._progress, title, steps=planned.seconds[point.name] >= _LONG)
        lost = Result(point.name, seed, "failed", 0.0)
        try:
            run = train(
                planned.spec(point),
                data=planned.asked.corpus,
                out=folder,
                resume=(folder / "state").exists(),
                seed=seed,
                device=planned.device,
                progress=progress,
            )
            stage = run.stages[0]
            lost = replace(
                lost,
                status="trained",
                tokens=stage.tokens,
                loss=mean_loss(planned.stage, stage.heldout),
                heldout=stage.heldout,
                seconds=stage.seconds,  # of every call that it took
            )
        except RunError as error:
            lost = replace(lost, status="diverged", message=error.message)
        except UserError as error:
            lost = replace(lost, message=str(error).splitlines()[0])
        except Exception as error:  # the others do not depend on it
            lost = replace(lost, message=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
            self._store.keep_traceback(point.name, seed, traceback.format_exc())
        if lost.loss is not None and not math.isfinite(lost.loss):
            lost = replace(
                lost, status="diverged", loss=None, heldout=None, message=f"its held-out loss is {lost.loss}"
            )
        result = replace(lost, seconds=round(max(lost.seconds, time.perf_counter() - began), 3))
        self._store.save(result)
        return result

    def _say(self, number: int, point: Point, result: Result, left: float) -> None:
        planned = self._planned
        where = f"{number}/{len(planned.runs)} {point.block}"
        if len({p.cell for p in planned.points}) > 1:
            where += f", d_model {point.d_model}, {point.tokens:,} tokens"
        how = f"held-out loss {result.loss:.4f}" if result.loss is not None else f"{result.status}: {result.message}"
        self._progress.write(f"{where}, seed {result.seed}: {how}, {clock(result.seconds)}; about {clock(left)} left")


class _Within(Progress):
    """The progress of one run in that of the sweep: its live line, and in a log its lines if the run is a long one."""

    def __init__(self, outer: Progress, title: str, *, steps: bool) -> None:
        super().__init__()
        self._outer, self._title, self._steps = outer, title, steps

    def write(self, text: str, *, live: bool = False) -> None:
        if live or self._steps:
            self._outer.write(f"{self._title}: {text}", live=live)


def request_of(out: Path) -> Request | None:
    """What the sweep in a folder was asked for; UserError if its file is damaged."""
    return Store(out).request()
