"""A run whose stages are trained by torchtitan's trainer; it writes the same files as a run of the torch backend.

Verified on CPUs with gloo, in one process and two. CUDA and NCCL are unverified: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moec.compiler.progress import Progress
from moec.compiler.spec.training import TrainingStage
from moec.training.data.batches import Batches
from moec.training.model import TrainingDecoder
from moec.training.parallel import World
from moec.training.stages import Plan, Run, RunResult, stage_seed, steps_before
from moec.training.state import Position, StageResult, restore_random_state
from moec.training.titan import device

if TYPE_CHECKING:
    from moec.training.titan.trainer import StageTrainer


class TitanRun(Run):
    """Stages, states and checkpoints in moec's order; from the first step of a stage to its last, torchtitan's loop."""

    def __init__(self, plan: Plan, world: World, progress: Progress) -> None:
        # torchtitan makes device meshes of its own, and its sharded tensors (DTensor) refer to them
        super().__init__(plan, replace(world, mesh=None), progress)
        self._expert_parallel = 1 if world.mesh is None else world.mesh["experts"].size()

    def stages(self) -> RunResult:
        device.load(self._world.device)
        with _grouped(self._world), device.running():
            return super().stages()

    def _stage(self, stage: TrainingStage, position: Position | None, finished: tuple[StageResult, ...]) -> StageResult:
        from moec.training.titan.model import TitanDecoder  # behind `device.load`
        from moec.training.titan.trainer import Job, StageTrainer

        plan, world = self._plan, self._world
        batches = self._batches(stage)
        start = position.step if position is not None else 0
        batches.batch(start, world.rank, world.size)  # DataError before torchtitan divides what cannot be divided
        fresh = position is None or position.folder is None  # else every weight is read from the state
        weights = self._start(stage, finished) if fresh else None
        with torch.device("meta"):
            shape = TrainingDecoder(plan.model, plan.rounding(stage), plan.compute)
        job = Job(
            name=plan.spec.name,
            stage=stage,
            model=TitanDecoder.Config(
                decoder=plan.model, stage=stage, rounding=plan.rounding(stage), compute=plan.compute, weights=weights
            ),
            shape=shape,
            batches=batches,
            world=world,
            expert_parallel=self._expert_parallel,
            seed=stage_seed(plan.seed, stage.name),
            out=plan.out,
            store=self._store,
            resume=position,
            stop=lambda: world.any(self._stop.asked),
        )
        trainer = StageTrainer(job)  # reads the weights: faults in them are reported before anything is written
        try:
            return self._loop_of(trainer, stage, batches, position or self._begun(stage, finished), fresh=fresh)
        finally:
            trainer.close()

    def _loop_of(
        self, trainer: StageTrainer, stage: TrainingStage, batches: Batches, position: Position, *, fresh: bool
    ) -> StageResult:
        from moec.training.titan.components import folder_of

        before = steps_before(self._plan.training, stage)
        self._announce(stage, batches, position.step)
        metrics, live = self._metrics(stage, position), self._live(stage, position.step)
        losses: dict[str, float] = {}

        def seconds() -> float:
            return position.seconds + trainer.speed.total

        def here(step: int) -> Position:
            return replace(self._here(position, step, seconds(), metrics), folder=folder_of(step))

        def after(record: dict[str, Any]) -> None:
            nonlocal losses
            step = record["step"]
            last = step == stage.steps
            if step % stage.log_every == 0 or last or step == 1:
                record = record | {"tokens_per_s": round(trainer.speed.rate(), 1)}
                metrics.write(record, before + step)
                live.step(step, record)
            if last or (stage.eval_every is not None and step % stage.eval_every == 0):
                losses = self._evaluate(trainer.model, stage, step, metrics, live)

        try:
            with self._stop:
                if fresh:
                    losses = self._evaluate(trainer.model, stage, 0, metrics, live)
                else:
                    restore_random_state(position.random)
                trainer.run(here, after)
            if trainer.step < stage.steps:
                self._stopped(stage, trainer.step)
            model = trainer.model
            named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            return self._finish(model, named, stage, position, metrics, seconds(), losses)
        finally:
            metrics.close()


@contextmanager
def _grouped(world: World) -> Iterator[None]:
    """torchtitan wants a process group even of one process, which has no launcher to say where the others are."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group(
        "nccl" if world.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
