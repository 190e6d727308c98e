"""torchtitan's trainer with moec's parts in it, configured from a stage of a spec."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from moec.compiler.spec.training import TrainingStage
from moec.training.data.batches import Batches
from moec.training.model import TrainingDecoder
from moec.training.optimizer import Groups, parameter_groups
from moec.training.parallel import World
from moec.training.stage import Speed, rows_at_once
from moec.training.state import FOLDER, Position, StateStore
from moec.training.titan.components import (
    BatchLoader,
    NoTokenizer,
    StateCheckpoints,
    StepHooks,
    StepMetrics,
    TokenSchedule,
)
from moec.training.titan.model import TitanDecoder, loss_of, parallelize


@dataclass(frozen=True)
class Job:
    """One stage for `StageTrainer`. model, shape: how to build the model, and one built on the meta device.

    resume, stop: see `StateCheckpoints`.
    """

    name: str
    stage: TrainingStage
    model: TitanDecoder.Config
    shape: TrainingDecoder
    batches: Batches
    world: World
    expert_parallel: int
    seed: int
    out: Path
    store: StateStore
    resume: Position | None
    stop: Callable[[], bool]


class StageTrainer(Trainer):
    """A stage in torchtitan's loop, to the last step or the one after which it was asked to stop.

    torchtitan evaluates behind saving a state, where a run that is killed in between would lose the evaluation; moec's
    is part of the step (`run`), and torchtitan's validator is off. speed: of the steps, evaluations left out.
    """

    checkpointer: StateCheckpoints
    metrics_processor: StepMetrics

    def __init__(self, job: Job) -> None:
        self._stage, self._hooks = job.stage, StepHooks(job.stage, job.world)
        self._after: Callable[[dict[str, Any]], None] | None = None
        self.speed = Speed()
        super().__init__(configured(job, self._hooks))

    @property
    def model(self) -> TitanDecoder:
        (model,) = self.model_parts
        return model

    def run(self, here: Callable[[int], Position], after: Callable[[dict[str, Any]], None]) -> None:
        """torchtitan's loop. here: the position behind so many steps. after: is given the record of every step."""
        self.checkpointer.here, self._after = here, after
        self.train()

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        assert self._after is not None
        self._hooks.done = self.step - 1
        self.model.train()  # an evaluation may have come before
        self.speed.start()
        super().train_step(data_iterator)
        self.speed.stop(self._stage.rows * self._stage.context)
        self._after(self.metrics_processor.record)

    def should_continue_training(self) -> bool:
        return super().should_continue_training() and not self.checkpointer.stopping


def configured(job: Job, hooks: StepHooks) -> Trainer.Config:
    """torchtitan's configuration of a stage."""
    stage, size = job.stage, job.world.size
    rows = stage.rows // size
    at_once = rows_at_once(stage, rows)
    return Trainer.Config(
        model_spec=ModelSpec(
            name="moec",
            flavor=job.name,
            model=job.model,
            parallelize_fn=parallelize,
            pipelining_fn=None,
            post_optimizer_build_fn=hooks.register,
            state_dict_adapter=None,
        ),
        dump_folder=str(job.out),
        tokenizer=NoTokenizer.Config(),
        dataloader=BatchLoader.Config(batches=job.batches, stage=stage),
        loss=loss_of(job.shape, stage),
        optimizer=OptimizersContainer.Config(param_groups=groups(job.shape, stage), implementation="fused"),
        lr_scheduler=TokenSchedule.Config(stage=stage, warmup_steps=0),
        metrics=StepMetrics.Config(stage=stage, hooks=hooks, disable_color_printing=True),
        training=TrainingConfig(
            # the last micro-batch of a step may be smaller: torchtitan needs these numbers only for how many there are
            local_batch_size=at_once,
            global_batch_size=at_once * size * -(-rows // at_once),
            seq_len=stage.context,
            max_norm=stage.optimizer.clip_norm,
            steps=stage.steps,
            disable_cuda_graphs=True,  # how many rows an expert gets is known only as they come
            mixed_precision_param="float32",  # bf16 is autocast, in the model: weights stay float32
        ),
        parallelism=ParallelismConfig(
            expert_parallel_degree=job.expert_parallel,
            spmd_backend="partial_dtensor",  # moec's modules say nothing of their layout, which the others ask for
        ),
        checkpoint=StateCheckpoints.Config(
            enable=True,
            folder=FOLDER,
            interval=stage.checkpoint_every,
            keep_latest_k=0,  # the store removes what is old
            initial_load_model_only=False,
            store=job.store,
            resume=job.resume,
            stop=job.stop,
        ),
        activation_checkpoint=None,
        debug=DebugConfig(seed=job.seed, enable_structured_logging=False),
    )


def groups(model: TrainingDecoder, stage: TrainingStage) -> list[ParamGroupConfig]:
    """AdamW as `optimizer.Updates` has it: by name, with the base rate 1 (`TokenSchedule`)."""
    settings = stage.optimizer
    found: Groups = parameter_groups(model, settings.weight_decay)
    return [
        ParamGroupConfig(
            pattern=f"^({'|'.join(re.escape(name) for name, _ in named)})$",
            optimizer_name="AdamW",
            optimizer_kwargs={
                "lr": 1.0,
                "betas": (settings.beta1, settings.beta2),
                "eps": settings.eps,
                "weight_decay": decay,
            },
        )
        for named, decay in found
    ]
