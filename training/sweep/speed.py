"""How long a point will train: some steps of it are timed on random tokens before anything begins."""

from __future__ import annotations

import time

import torch

from moec.compiler.spec.training import TrainingStage
from moec.sources.decoder.config import DecoderConfig
from moec.training.checkpoints import initial_weights, load_weights
from moec.training.data.batches import Batch, Batches
from moec.training.model import TrainingDecoder
from moec.training.parallel import World
from moec.training.stage import Trainer

_TOKENS = 8192  # of a timed step, at most; at least a row
_SECONDS, _STEPS = 0.5, 5  # what is timed, whichever ends first, behind one step that is not
_EVALUATION = 0.4  # of a token's training: the forward pass alone
_OVERHEAD = 1.0  # seconds: weights made, a checkpoint written


class RandomBatches(Batches):
    """Rows of random tokens in documents of 100: what a step costs, without a corpus."""

    def __init__(self, stage: TrainingStage, vocabulary: int) -> None:
        self._stage, self._vocabulary = stage, vocabulary

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        rows, length = self._stage.rows, self._stage.context
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, self._vocabulary, (rows, length + 1), generator=generator)
        documents = torch.arange(length).div(100, rounding_mode="floor").expand(rows, length).int()
        mask = torch.ones(rows, length)
        return Batch(tokens[:, :-1], tokens[:, 1:], mask, documents, ("random",) * rows)


def tokens_per_second(config: DecoderConfig, stage: TrainingStage, device: torch.device) -> float:
    """Tokens that a step of the stage trains in a second, from the median of a few steps."""
    rows = max(1, min(stage.batch_tokens, stage.micro_batch_tokens or _TOKENS, _TOKENS) // stage.context)
    short = stage.model_copy(update={"batch_tokens": rows * stage.context})
    model = TrainingDecoder(config)
    load_weights(model, initial_weights(config, 0))
    trainer = Trainer(model.to(device), short, RandomBatches(short, config.vocab_size), World(device=device))
    trainer.step()
    spent: list[float] = []
    while len(spent) < _STEPS and sum(spent) < _SECONDS:
        began = time.perf_counter()
        trainer.step()  # its record holds losses: it ends when the device has
        spent.append(time.perf_counter() - began)
    return rows * stage.context / sorted(spent)[len(spent) // 2]


def seconds(tokens: int, evaluated: int, rate: float) -> float:
    """Of a run on `tokens` tokens, with `evaluated` held-out tokens before and as many behind."""
    return (tokens + 2 * _EVALUATION * evaluated) / rate + _OVERHEAD


def tokens_within(budget: float, evaluated: int, rates: list[float]) -> int:
    """Tokens of each run that all runs together have time for; not above 0 if there is no time."""
    fixed = sum(seconds(0, evaluated, rate) for rate in rates)
    return int((budget - fixed) / sum(1 / rate for rate in rates))
