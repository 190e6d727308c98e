"""What moec plugs into torchtitan's trainer beside the model: batches, the learning rate, what is logged and saved.

B rows, T tokens of a row, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed import ParallelDims

from moec.compiler.spec.training import TrainingStage
from moec.training.data.batches import Batch, Batches
from moec.training.optimizer import balance, bias_rate, learning_rate
from moec.training.parallel import World
from moec.training.stage import distinct_experts, pieces, require_finite, step_record, z_positions
from moec.training.state import Position, StateStore, state_read, state_written
from moec.training.titan.model import TitanDecoder


class BatchLoader(BaseDataLoader):
    """The micro-batches of a stage, from the step it stands at: its whole state, for any number of processes."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        batches: Batches
        stage: TrainingStage

        def to_dict(self) -> dict[str, Any]:
            return {"corpus": str(self.batches.corpus.folder), "seed": self.batches.seed}

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, **_: Any) -> None:
        self._config, self._rank, self._size = config, dp_rank, dp_world_size
        self._done = 0  # steps whose last micro-batch was handed out

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """(what `TitanDecoder.forward` takes, labels int64 [B, T]). The labels serve torchtitan to count targets."""
        while True:
            batch = self._config.batches.batch(self._done, self._rank, self._size)
            parts = list(pieces(batch, self._config.stage))
            for part in parts[:-1]:
                yield _as_input(part)
            self._done += 1  # first: a state is saved before the next one is asked for
            yield _as_input(parts[-1])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["step"]


def _as_input(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    labels_BT = batch.targets_BT.masked_fill(batch.loss_mask_BT == 0, IGNORE_INDEX)
    return {
        "input": batch.tokens_BT,
        "documents_BT": batch.documents_BT,
        "targets_BT": batch.targets_BT,
        "mask_BT": batch.loss_mask_BT,
    }, labels_BT


class NoTokenizer(BaseTokenizer):
    """The corpus is tokenized, and its tokenizer is copied into checkpoints; torchtitan gets none.

    Its trainer must be given one all the same, for its own loaders and its validator, which are not used. These methods
    are abstract there; that one is called would be a mistake of moec's, and must not pass as empty text.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a corpus is tokenized")

    decode = get_vocab_size = encode


class TokenSchedule(LRSchedulersContainer):
    """The learning rate by tokens seen (`optimizer.learning_rate`). Optimizers have the base rate 1."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        stage: TrainingStage

        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> TokenSchedule:
            stage = self.stage
            assert training_steps == stage.steps

            def rate(done: int) -> float:
                tokens = (done + 1) * stage.rows * stage.context  # seen when the step behind `done` others ends
                return learning_rate(stage.learning_rate, tokens, stage.tokens)

            return TokenSchedule(optimizers, rate)

        def to_dict(self) -> dict[str, Any]:
            return self.stage.learning_rate.model_dump(mode="json")


@dataclass
class StepTotals:
    """What moec counts in a step, over all processes; load_LE, dropped_L int64."""

    lm_loss: float
    z_loss: float
    load_LE: Tensor
    dropped_L: Tensor
    distinct: float | None


class StepHooks:
    """What moec does around an optimizer step: sum up and look for a loss that is not finite, then balance."""

    def __init__(self, stage: TrainingStage, world: World) -> None:
        self._stage, self._world = stage, world
        self.done = 0  # steps
        self.totals: StepTotals | None = None

    def register(
        self, optimizers: OptimizersContainer, model_parts: list[nn.Module], parallel_dims: ParallelDims
    ) -> None:
        """As torchtitan calls a model's `post_optimizer_build_fn`. Its own hook balances by another rule."""
        del parallel_dims
        (model,) = model_parts
        assert isinstance(model, TitanDecoder)
        optimizers.register_step_pre_hook(lambda *_: self._before(model))
        optimizers.register_step_post_hook(lambda *_: self._after(model))

    def _before(self, model: TitanDecoder) -> None:
        """RunError when training diverged, with the weights as they were."""
        stage, world, sums = self._stage, self._world, model.sums
        assert sums is not None
        weight = max(1.0, float(world.total(sums.weight)))
        self.totals = StepTotals(
            float(world.total(sums.nll)) / weight,
            float(world.total(sums.z)) / z_positions(model, stage),
            world.total(sums.load_LE),
            world.total(sums.dropped_L),
            distinct_experts(sums, world),
        )
        model.sums = None
        loss = self.totals.lm_loss + stage.z_loss * self.totals.z_loss
        require_finite("the loss", loss, stage, self.done + 1)

    def _after(self, model: TitanDecoder) -> None:
        assert self.totals is not None
        self.done += 1
        stage, load_LE = self._stage, self.totals.load_LE
        if stage.balancing.kind == "bias" and load_LE.numel():
            balance(model, load_LE, bias_rate(stage.balancing, self.done * stage.rows * stage.context, stage.tokens))


class StepMetrics(MetricsProcessor):
    """Keeps what torchtitan measured of a step, for the line that moec writes; it writes none itself."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        stage: TrainingStage
        hooks: StepHooks

        def to_dict(self) -> dict[str, Any]:
            return {"log_freq": self.stage.log_every}

    def __init__(self, config: Config, **options: Any) -> None:
        super().__init__(config, **options)
        self._stage, self._hooks = config.stage, config.hooks
        self.record: dict[str, Any] = {}

    def should_log(self, step: int) -> bool:
        """Always: the gradient's norm is looked at before anything of the step is saved."""
        return True

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Make the record of the step. RunError for a gradient that was not finite."""
        del global_avg_loss, global_max_loss  # of what `StageLoss` gives; the totals have its parts
        totals, stage = self._hooks.totals, self._stage
        assert totals is not None
        require_finite("the gradient's norm", grad_norm, stage, step)
        (rate,) = {value for name, value in (extra_metrics or {}).items() if name.startswith("lr/")}
        self.record = step_record(
            stage,
            step,
            totals.lm_loss,
            totals.z_loss,
            totals.load_LE,
            totals.dropped_L,
            totals.distinct,
            rate=rate,
            norm=grad_norm,
        )
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()


class StateCheckpoints(CheckpointManager):
    """torchtitan's states in the place of moec's: OUT/state/step-N, named by OUT/state/latest.json once complete.

    here: the position behind so many steps, its folder `folder_of` them; set before the first step.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """resume: the position to continue from, if it has a state. stop: whether to save and end now, in all."""

        store: StateStore
        resume: Position | None
        stop: Callable[[], bool]

        def to_dict(self) -> dict[str, Any]:
            return {"folder": self.folder, "interval": self.interval}

    def __init__(self, config: Config, **parts: Any) -> None:
        super().__init__(config, **parts)
        self._config = config
        self.here: Callable[[int], Position] | None = None
        self.stopping = False

    def _load(self, step: int = -1) -> bool:
        """What latest.json names, never what else a killed run left. UserError if it cannot be read."""
        position = self._config.resume
        if position is None or position.folder is None:
            return False
        with state_read(Path(self._create_checkpoint_id(position.step)), position):
            return super()._load(position.step)

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        """Not behind the last step, when the stage's checkpoint is written instead."""
        return not last_step and (self.stopping or curr_step % self.interval == 0)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        self.stopping = self._config.stop()
        if not self._should_save(curr_step, last_step):
            return False
        assert self.here is not None
        folder = self._config.store.cleared(folder_of(curr_step))
        with state_written(folder):
            super()._save(curr_step, last_step)
        self._config.store.save(self.here(curr_step))
        return True


def folder_of(step: int) -> str:
    """As torchtitan names the folder of a state."""
    return f"step-{step}"
