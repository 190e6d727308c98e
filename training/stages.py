"""The stages of a run, one after the other: the request, its checks, and the loop that writes checkpoints.

`training/run.py` begins a run and says what it leaves; a backend overrides the loop of a stage (`training/titan`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch

from moec.checkpoints import open_store
from moec.compiler.errors import SpecError, UserError
from moec.compiler.progress import Progress
from moec.compiler.source import TOKENIZER
from moec.compiler.spec import Spec
from moec.compiler.spec.training import Training, TrainingStage
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import router_names, weight_layout
from moec.sources.dense_decoder import open_dense_decoder
from moec.training.checkpoints import (
    initial_weights,
    packing_faults,
    stored_weights,
    write_checkpoint,
)
from moec.training.data.batches import Batches
from moec.training.data.shards import INDEX, Corpus
from moec.training.distillation import Teacher, check_teacher
from moec.training.experts import Compute
from moec.training.metrics import Live, Metrics
from moec.training.model import TrainingDecoder
from moec.training.parallel import WholeWeights, World, load_share, spread
from moec.training.precision import require_same
from moec.training.rounding import Rounding
from moec.training.stage import Speed, Trainer, evaluate
from moec.training.state import (
    Position,
    StageResult,
    StateStore,
    random_state,
    read_json,
    restore_random_state,
    write_whole,
)

Backend = Literal["torch", "torchtitan"]
RUN = "run.json"
_VERSIONED = ("moec", "torch", "torchao", "numpy")


@dataclass(frozen=True)
class RunResult:
    """A finished run: its stages in order, those of earlier calls among them. `main`: is this the first process."""

    out: Path
    stages: tuple[StageResult, ...]
    main: bool = True

    def checkpoint(self, stage: str | None = None) -> Path:
        """The checkpoint folder of a stage, by default of the last one."""
        names = [result.name for result in self.stages]
        result = self.stages[-1 if stage is None else names.index(stage)]
        return self.out / result.checkpoint


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    spec: Spec
    model: DecoderConfig
    training: Training
    corpus: Corpus
    out: Path
    stage: str | None
    resume: bool
    init: Path | None
    seed: int
    bits: int | None
    compute: Compute
    backend: Backend
    teacher: Path | None = None
    notes: Mapping[str, str] = field(default_factory=dict)  # by stage: what to say as it begins

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.training.stages]

    def rounding(self, stage: TrainingStage) -> Rounding | None:
        if stage.quantization == "none" or self.spec.quantization is None:
            return None
        return Rounding(self.spec.quantization, self.bits)

    def record(self) -> dict[str, Any]:
        """run.json: everything that decides the numbers of a run, and what it ran with."""
        spec = self.spec.model_dump(mode="json")
        decides = copy.deepcopy({key: spec[key] for key in ("model", "quantization", "training")})
        for stage in decides["training"]["stages"]:  # runs that began before there were these had no such key
            for key, default in (("distillation", None), ("locality", 0.0), ("trains", "all")):
                if stage[key] == default:
                    del stage[key]
        index = (self.corpus.folder / INDEX).read_bytes()
        versioned = _VERSIONED if self.backend == "torch" else (*_VERSIONED, self.backend)
        return {
            "name": self.spec.name,
            "spec": spec,
            "seed": self.seed,
            "bits": self.bits,
            "init": None if self.init is None else str(self.init.absolute()),
            "teacher": None if self.teacher is None else str(self.teacher.absolute()),
            "corpus": str(self.corpus.folder.absolute()),
            "digests": {
                "training": hashlib.sha256(json.dumps([decides, self.bits], sort_keys=True).encode()).hexdigest(),
                "corpus": hashlib.sha256(index).hexdigest(),
                "tokenizer": self.corpus.index["tokenizer_sha256"],
            },
            "threads": torch.get_num_threads(),
            "compute": self.compute,
            "backend": self.backend,
            "versions": {"python": ".".join(map(str, sys.version_info[:3])), **{n: version(n) for n in versioned}},
        }


def check(plan: Plan) -> None:
    """Everything that can be wrong before a step is taken."""
    corpus, place = plan.corpus, plan.spec.name
    if plan.stage is not None and plan.stage not in plan.names:
        raise UserError(f"the spec has no stage {plan.stage!r}", place=place, remedy=f"it has {', '.join(plan.names)}")
    if corpus.vocab_size > plan.model.vocab_size:
        raise SpecError(
            f"vocab_size is {plan.model.vocab_size}, the corpus has ids up to {corpus.vocab_size - 1}",
            place=place,
            remedy="build the corpus with a tokenizer of the spec's size",
        )
    for stage in plan.training.stages:
        if stage.context > plan.model.context:
            raise SpecError(
                f"stage {stage.name} has rows of {stage.context} tokens, the model's context is {plan.model.context}",
                place=place,
                remedy="lower the stage's context, or raise the model's",
            )
        missing = [domain for domain, share in stage.mixture.items() if share > 0 and domain not in corpus.domains]
        if missing:
            raise SpecError(
                f"stage {stage.name} wants domain {missing[0]!r}, the corpus has {', '.join(corpus.domains)}",
                place=place,
                remedy="change the stage's mixture, or build a corpus with that domain",
            )
        if stage.quantization == "from_spec":
            _check_rounding(plan, stage)
        if plan.stage in (None, stage.name):
            _check_routers(plan, stage)
    _check_distillation(plan)
    if plan.init is not None:
        _check_tokenizer(plan)


def _check_routers(plan: Plan, stage: TrainingStage) -> None:
    """What a stage asks of the routers: that there are some, a choice to make, and a backend that does it."""
    asks = {"locality": stage.locality > 0, f"trains: {stage.trains}": stage.trains != "all"}
    for key in (key for key, asked in asks.items() if asked):
        place, moe = f"{plan.spec.name}: stage {stage.name}", plan.model.moe
        if moe is None:
            raise SpecError(f"has `{key}`, and the model has no routers", place=place, remedy="leave it out")
        if key == "locality" and moe.top_k == moe.experts:
            raise SpecError(
                f"has `locality`, and every token uses all {moe.experts} experts", place=place, remedy="leave it out"
            )
        if plan.backend != "torch":
            raise UserError(f"--backend {plan.backend} has no `{key}`", place=place, remedy="use --backend torch")


def _check_distillation(plan: Plan) -> None:
    taught = [stage for stage in plan.training.stages if stage.distillation and plan.stage in (None, stage.name)]
    if not taught:
        if plan.teacher is not None:
            raise UserError(
                "no stage of the spec learns from it", place=str(plan.teacher), remedy="give a stage `distillation:`"
            )
        return
    place = f"{plan.spec.name}: stage {taught[0].name}"
    if plan.teacher is None:
        raise UserError("learns from a teacher, and none is named", place=place, remedy="give --teacher CHECKPOINT")
    if plan.backend != "torch":
        raise UserError(f"--backend {plan.backend} has no distillation", place=place, remedy="use --backend torch")
    dense = open_dense_decoder(plan.teacher)
    for stage in taught:
        check_teacher(dense.config, plan.model, plan.spec.name, stage)
    own = dense.store.companions().get(TOKENIZER)
    if own is not None and hashlib.sha256(own).hexdigest() != plan.corpus.index["tokenizer_sha256"]:
        what = "the teacher's tokenizer is not the corpus's, so that its predictions are of other words"
        remedy = "build the corpus with --tokenizer of the teacher"
        raise UserError(what, place=str(plan.teacher), remedy=remedy)


def _check_rounding(plan: Plan, stage: TrainingStage) -> None:
    quantization = plan.spec.quantization
    if quantization is None:
        raise SpecError(f"stage {stage.name} rounds, but quantization is none", place=plan.spec.name)
    if quantization.tensors:
        raise SpecError(
            f"stage {stage.name} rounds by role, and quantization.tensors names single weights",
            place=plan.spec.name,
            remedy="leave tensors out of the spec that is trained",
        )
    if plan.bits is not None and not 2 <= plan.bits <= 8:
        raise UserError(f"{plan.bits} bits", remedy="choose 2 to 8")
    faults = packing_faults(plan.model, quantization) if plan.bits in (None, 4) else []
    if faults:
        raise SpecError(
            f"the checkpoint of stage {stage.name} could not hold its codes: {faults[0]}",
            place=plan.spec.name,
            remedy="change the spec's quantization",
        )


def _check_tokenizer(plan: Plan) -> None:
    """Weights are of use only with the tokenizer that they were trained with."""
    assert plan.init is not None
    file = plan.init / TOKENIZER
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() != plan.corpus.index["tokenizer_sha256"]:
        raise UserError(
            "its tokenizer is not the corpus's", place=str(plan.init), remedy="build the corpus with that tokenizer"
        )


class Run:
    def __init__(self, plan: Plan, world: World, progress: Progress) -> None:
        self._plan, self._world, self._progress = plan, world, progress
        self._store = StateStore(plan.out, world)
        self._stop = _StopRequest()

    def stages(self) -> RunResult:
        """Every stage that is asked for and not finished."""
        plan = self._plan
        position = self._begin()
        finished = list(position.finished) if position is not None else []
        last = max((plan.names.index(result.name) for result in finished), default=-1)
        for stage in plan.training.stages[last + 1 :]:
            if plan.stage not in (None, stage.name):
                continue
            here = position if position is not None and position.stage == stage.name else None
            finished.append(self._stage(stage, here, tuple(finished)))
            position = None
        return RunResult(plan.out, tuple(finished), self._world.main)

    def _begin(self) -> Position | None:
        """The state in `out`, if there is one, checked against the request; run.json is written."""
        plan, position = self._plan, self._store.latest()
        file = plan.out / RUN
        record = plan.record()
        if position is None:
            if self._world.main:
                write_whole(file, json.dumps(record | {"processes": self._world.size}, indent=1) + "\n")
                if plan.resume:
                    self._progress.write(f"{plan.out} has nothing to resume: training begins")
            self._world.barrier()
            return None
        place = str(plan.out)
        finished = [result.name for result in position.finished]
        unfinished = position.stage not in finished
        if not plan.resume and (plan.stage is None or plan.stage in finished or unfinished):
            what = f"holds a run, in stage {position.stage}" if unfinished else f"holds a run of {', '.join(finished)}"
            raise UserError(what, place=place, remedy="continue it with --resume, or choose another --out")
        if plan.stage is not None and unfinished and plan.stage != position.stage:
            raise UserError(f"stage {position.stage} is not finished", place=place, remedy="continue it with --resume")
        last = position.stage if unfinished else finished[-1]
        out_of_turn = plan.stage is not None and plan.names.index(plan.stage) < plan.names.index(last)
        if out_of_turn and plan.stage not in finished:
            what = f"stage {plan.stage} comes before {last}, which the run holds"
            raise UserError(what, place=place, remedy="choose another --out")
        try:
            before = read_json(file)
            stages = list(before["spec"]["training"]["stages"])
            digests, seed, init = dict(before["digests"]), before["seed"], before["init"]
            backend = before.get("backend", "torch")  # runs from before there was a choice
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"damaged: {error}", place=str(file), remedy="start again in another --out") from None
        require_same(stages, plan.training, place)
        for key, what in (("training", "the spec"), ("corpus", "the corpus"), ("tokenizer", "the tokenizer")):
            if digests.get(key) != record["digests"][key]:
                raise UserError(f"{what} has changed since the run began", place=place, remedy="choose another --out")
        if seed != record["seed"]:
            raise UserError(f"the run began with seed {seed}", place=place, remedy="continue it with that")
        if backend != plan.backend:  # whose states are laid out in another way
            raise UserError(f"the run began with --backend {backend}", place=place, remedy="continue it with that")
        if plan.init is not None and record["init"] != init:
            what = f"the run began with {init or 'random weights'}, and --init is where a run begins"
            raise UserError(what, place=place, remedy="leave --init out, or choose another --out")
        if plan.teacher is not None and record["teacher"] != before.get("teacher"):
            what = f"the run began with the teacher {before.get('teacher')}"
            raise UserError(what, place=place, remedy="continue it with that")
        began, now = (before.get("threads"), before.get("processes")), (record["threads"], self._world.size)
        if began != now and self._world.main and (unfinished or position.stage != plan.names[-1]):
            was, here = ("{} threads in {} process(es)".format(*pair) for pair in (began, now))
            self._progress.write(f"begun with {was}, continued with {here}: sums may differ in their last bits")
        return position

    def _stage(self, stage: TrainingStage, position: Position | None, finished: tuple[StageResult, ...]) -> StageResult:
        plan, world = self._plan, self._world
        batches = self._batches(stage)
        model = TrainingDecoder(plan.model, plan.rounding(stage), plan.compute)
        spread(model, world)
        if position is None or position.folder is None:  # else every weight is read from the state
            load_share(model, self._start(stage, finished), world)
            torch.manual_seed(stage_seed(plan.seed, stage.name))
        model.set_trained(stage.trains)
        trainer = Trainer(model, stage, batches, world, self._teacher(stage))
        if position is None:
            position = self._begun(stage, finished)
        elif position.folder is not None:
            self._store.load(position, trainer.tensors())
            trainer.restore(position.step)
            restore_random_state(position.random)
        self._announce(stage, batches, position.step)
        metrics = self._metrics(stage, position)
        try:
            with self._stop:
                return self._loop(trainer, position, metrics)
        finally:
            metrics.close()

    def _teacher(self, stage: TrainingStage) -> Teacher | None:
        if stage.distillation is None:
            return None
        assert self._plan.teacher is not None, "checked"
        return Teacher(self._plan.teacher, stage.context, self._world.device)

    def _batches(self, stage: TrainingStage) -> Batches:
        return Batches(
            self._plan.corpus,
            stage.mixture,
            stage.context,
            stage.batch_tokens,
            data_seed(self._plan.seed, stage.name),
            response_weight=stage.response_weight,
        )

    def _begun(self, stage: TrainingStage, finished: tuple[StageResult, ...]) -> Position:
        """The position before the first step of a stage, which is the latest from here on."""
        metrics = self._plan.out / "metrics.jsonl"
        kept = self._world.same(metrics.stat().st_size if finished and self._world.main else 0)
        position = Position(stage.name, 0, 0.0, kept, finished=finished)
        self._store.save(position)
        return position

    def _metrics(self, stage: TrainingStage, position: Position) -> Metrics:
        before = steps_before(self._plan.training, stage)
        metrics = Metrics(
            self._plan.out,
            keep_bytes=position.metrics_bytes,
            first_step=before + position.step + 1,
            writes=self._world.main,
        )
        if not metrics.has_events and self._world.main and before + position.step == 0:
            self._progress.write("no TensorBoard events: install moec[train] to have them")
        return metrics

    def _live(self, stage: TrainingStage, done: int) -> Live:
        return Live(self._progress if self._world.main else Progress(quiet=True), stage.name, done, stage.steps)

    def _announce(self, stage: TrainingStage, batches: Batches, done: int) -> None:
        """Announce the stage: how often each domain is read, and which examples never are."""
        if not self._world.main:
            return
        read = ", ".join(f"{domain} {epochs:.2f}" for domain, epochs in batches.epochs(stage.steps).items())
        where = f", continued behind step {done:,}" if done else ""
        if stage.name in self._plan.notes:
            self._progress.write(f"{stage.name}: {self._plan.notes[stage.name]}")
        if stage.trains == "routers":
            layout = weight_layout(self._plan.model)
            trained = sum(layout[name].numel for name in router_names(self._plan.model))
            total = sum(info.numel for info in layout.values())
            self._progress.write(
                f"{stage.name}: trains the routers, {trained:,} of {total:,} weights; the others stay as they are"
            )
        self._progress.write(
            f"{stage.name}: {stage.steps:,} steps of {stage.rows * stage.context:,} tokens{where}; epochs of {read}"
        )
        for domain, count in batches.skipped.items():
            if count:
                what = f"{count:,} examples of {domain} are longer than the {stage.context} tokens of a row"
                self._progress.write(f"{stage.name}: {what} and are left out; a longer context would hold them")

    def _start(self, stage: TrainingStage, finished: tuple[StageResult, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that a stage begins with."""
        folder = self._start_folder(stage, finished)
        return (
            initial_weights(self._plan.model, self._plan.seed)
            if folder is None
            else stored_weights(folder, self._plan.model)
        )

    def _start_folder(self, stage: TrainingStage, finished: tuple[StageResult, ...]) -> Path | None:
        """The checkpoint that a stage begins with; None: none, but new weights."""
        plan, place = self._plan, self._plan.names.index(stage.name)
        init = read_json(plan.out / RUN)["init"]  # which need not be named again for a run that is continued
        if not finished and init is not None:
            return Path(init)
        if place == 0:
            return None
        before = plan.names[place - 1]
        if finished and finished[-1].name == before:
            return plan.out / finished[-1].checkpoint
        raise UserError(
            f"stage {stage.name} needs weights, and {before} has not been trained here",
            place=str(plan.out),
            remedy=f"train {before} first, or begin a run with --init CHECKPOINT",
        )

    def _loop(self, trainer: Trainer, position: Position, metrics: Metrics) -> StageResult:
        stage = trainer.stage
        live, speed = self._live(stage, trainer.done), Speed()
        before = steps_before(self._plan.training, stage)
        if trainer.done == 0:
            losses = self._evaluate(trainer.model, stage, 0, metrics, live)
        while trainer.done < stage.steps:
            speed.start()
            record = trainer.step()
            speed.stop(stage.rows * stage.context)
            last = trainer.done == stage.steps
            if trainer.done % stage.log_every == 0 or last or trainer.done == 1:
                record["tokens_per_s"] = round(speed.rate(), 1)
                metrics.write(record, before + trainer.done)
                live.step(trainer.done, record)
            if last or (stage.eval_every is not None and trainer.done % stage.eval_every == 0):
                losses = self._evaluate(trainer.model, stage, trainer.done, metrics, live)
            stopping = self._world.any(self._stop.asked)
            if not last and (stopping or trainer.done % stage.checkpoint_every == 0):
                seconds = position.seconds + speed.total
                self._store.save(self._here(position, trainer.done, seconds, metrics), trainer.tensors())
            if stopping and not last:
                self._stopped(stage, trainer.done)
        named = {**dict(trainer.updates.named), **dict(trainer.model.named_buffers())}
        return self._finish(trainer.model, named, stage, position, metrics, position.seconds + speed.total, losses)

    def _evaluate(
        self, model: TrainingDecoder, stage: TrainingStage, step: int, metrics: Metrics, live: Live
    ) -> dict[str, float]:
        """Evaluate behind `step` steps, say so, and give the held-out losses."""
        found = evaluate(model, stage, self._world, self._plan.corpus)
        place = {"stage": stage.name, "step": step, "tokens": step * stage.rows * stage.context}
        metrics.write(place | found, steps_before(self._plan.training, stage) + step)
        live.heldout(step, found["heldout"])
        return found["heldout"]

    def _here(self, position: Position, step: int, seconds: float, metrics: Metrics) -> Position:
        """Behind `step` steps of the stage of `position`, with what metrics.jsonl holds now."""
        return replace(
            position,
            step=step,
            seconds=round(seconds, 3),
            metrics_bytes=self._world.same(metrics.durable_bytes()),
            folder=f"{position.stage}-{step:07}",
            random=random_state(),
        )

    def _stopped(self, stage: TrainingStage, step: int) -> NoReturn:
        if self._world.main:
            self._progress.write(f"{stage.name} stopped at step {step}, state saved; continue with --resume")
        raise KeyboardInterrupt

    def _finish(
        self,
        model: TrainingDecoder,
        named: Mapping[str, torch.Tensor],
        stage: TrainingStage,
        position: Position,
        metrics: Metrics,
        seconds: float,
        heldout: dict[str, float],
    ) -> StageResult:
        """Write the checkpoint, then note that the stage is finished. named: the shares of weights that are here."""
        plan = self._plan
        tokens = stage.steps * stage.rows * stage.context
        result = StageResult(stage.name, stage.name, stage.steps, tokens, round(seconds, 3), heldout)
        start = None if stage.trains == "all" else self._start_folder(stage, position.finished)
        names = list(weight_layout(plan.model)) if start is None else router_names(plan.model)
        weights = WholeWeights(model, {name: named[name].detach() for name in names}, self._world)
        if self._world.main:
            write_checkpoint(
                plan.out / result.checkpoint,
                plan.model,
                weights,
                tokenizer=plan.corpus.tokenizer_file,
                rounding=plan.rounding(stage),
                others=None if start is None else open_store(start, plan.model),
            )
        else:  # helps to put each weight together
            for name in names:
                weights[name]
        kept = self._world.same(metrics.durable_bytes())
        self._store.save(
            Position(result.name, result.steps, result.seconds, kept, finished=(*position.finished, result))
        )
        return result


def stage_seed(seed: int, stage: str) -> int:
    """What torch's generator begins a stage with."""
    return _seed(f"{seed}:{stage}")


def data_seed(seed: int, stage: str) -> int:
    """The seed of a stage's batches: what `Batches` needs to give a run's batches again."""
    return _seed(f"{seed}:{stage}:data")


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def steps_before(training: Training, stage: TrainingStage) -> int:
    """Steps of the stages before this one: where its curves begin in TensorBoard."""
    return sum(other.steps for other in training.stages[: training.stages.index(stage)])


class _StopRequest:
    """Ctrl-C and SIGTERM end the step first; a second one ends the program at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals belong to the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._before[number])
