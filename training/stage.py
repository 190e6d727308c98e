"""One stage of the torch backend: batches and steps; and the counts and metrics of steps and evaluations, for both
backends.

B rows, T tokens of a row, L MoE layers, E experts.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import RunError
from moec.compiler.spec.training import TrainingStage
from moec.training.data.batches import Batch, Batches, heldout
from moec.training.data.shards import Corpus
from moec.training.distillation import Teacher
from moec.training.locality import window_ends
from moec.training.metrics import DISTINCT
from moec.training.model import Forward, TrainingDecoder
from moec.training.optimizer import Updates, balance, bias_rate, follow_usage
from moec.training.parallel import World, reshard, shared_state
from moec.training.precision import resolved


def autocast(stage: TrainingStage, device: torch.device) -> AbstractContextManager[Any]:
    """The stage's precision: products in bfloat16, everything that is not a product in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolved(stage, device).precision == "bf16")


def moved(batch: Batch, world: World) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, documents, targets, mask) on the device of this process, as `TrainingDecoder.forward` takes them."""
    parts = (batch.tokens_BT, batch.documents_BT, batch.targets_BT, batch.loss_mask_BT)
    return tuple(part.to(world.device) for part in parts)  # type: ignore[return-value]


class Trainer:
    """The moving parts of a stage. `step()` does one optimizer step; everything it changes is in `tensors()`."""

    def __init__(
        self,
        model: TrainingDecoder,
        stage: TrainingStage,
        batches: Batches,
        world: World,
        teacher: Teacher | None = None,
    ) -> None:
        self.model, self.stage, self.world, self._teacher = model, stage, world, teacher
        self._batches = batches
        self.updates = Updates(model, stage, world)
        self.done = 0  # steps
        model.set_capacity(stage.dispatch.capacity_factor)
        model.set_local(stage.locality > 0)

    @property
    def tokens(self) -> int:
        return self.done * self.stage.rows * self.stage.context

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a state must hold, by name; loading into these tensors restores it."""
        found: dict[str, Tensor] = dict(self.updates.named)
        kept = ("expert_bias", "usage") if self.stage.locality else ("expert_bias",)
        found |= {name: value for name, value in self.model.named_buffers() if name.endswith(kept)}
        found |= self.updates.moments()
        return shared_state(self.model, self.world, {name: value.detach() for name, value in found.items()})

    def restore(self, step: int) -> None:
        """Stand behind `step` steps; the tensors are loaded already."""
        self.done = step
        self.updates.at(step)

    def step(self) -> dict[str, Any]:
        """One step; its record for metrics.jsonl, without the speed. RunError when training diverged."""
        stage, world = self.stage, self.world
        batch = self._batches.batch(self.done, world.rank, world.size)
        weight = max(1.0, float(world.total(batch.loss_mask_BT.sum())))
        positions = z_positions(self.model, stage)
        local = self._locality_weight(batch)
        self.model.train()
        sums: Forward | None = None
        for piece in pieces(batch, stage):
            with autocast(stage, world.device):
                out = self._forward(piece)
            objective = self._objective(out, weight) + stage.z_loss * out.z / positions + local * out.spread
            (objective * world.size).backward()  # gradients are averaged over processes
            sums = added(sums, out)
        assert sums is not None
        lm_loss = float(world.total(sums.nll)) / weight
        z_loss = float(world.total(sums.z)) / positions
        spread = float(world.total(sums.spread))
        distinct = distinct_experts(sums, world)
        load_LE, dropped_L = world.total(sums.load_LE), world.total(sums.dropped_L)
        norm = self.updates.norm()
        found = self._distilled(sums, weight, lm_loss)
        loss = found.get("loss", lm_loss) + stage.z_loss * z_loss + local * spread
        require_finite("the loss", loss, stage, self.done + 1)
        require_finite("the gradient's norm", norm, stage, self.done + 1)
        self.done += 1
        self.updates.step(self.tokens, norm)
        if stage.balancing.kind == "bias" and load_LE.numel():
            balance(self.model, load_LE, bias_rate(stage.balancing, self.tokens, stage.tokens))
        if stage.locality:
            follow_usage(self.model, load_LE)
        record = step_record(
            stage, self.done, lm_loss, z_loss, load_LE, dropped_L, distinct, rate=self.updates.rate, norm=norm
        )
        record |= found | {"loss": loss}
        if stage.locality:
            record["locality"] = local * spread / stage.locality
        if found and "kld" not in found:
            del record["lm_loss"]  # which was not computed
        return record

    def _forward(self, piece: Batch) -> Forward:
        tokens_BT, documents_BT, targets_BT, mask_BT = moved(piece, self.world)
        wanted = self.stage.distillation
        if wanted is None:
            return Forward(*self.model(tokens_BT, documents_BT, targets_BT, mask_BT))
        assert self._teacher is not None
        lesson = self._teacher.lesson(tokens_BT, documents_BT, wanted)
        return Forward(*self.model(tokens_BT, documents_BT, targets_BT, mask_BT, lesson=lesson))

    def _objective(self, out: Forward, weight: float) -> Tensor:
        """What is minimised, beside the z-loss: this piece's share of the whole step's mean."""
        wanted = self.stage.distillation
        if wanted is None:
            return out.nll / weight
        return out.taught / weight + wanted.blocks * out.blocks / (self.stage.rows * self.stage.context)

    def _locality_weight(self, batch: Batch) -> float:
        """What the loss of locality, a sum over windows and layers, is multiplied by."""
        if not self.stage.locality:
            return 0.0
        windows = int(self.world.total(window_ends(batch.documents_BT, batch.loss_mask_BT).sum()))
        return self.stage.locality / max(1, windows * len(self.model.blocks))

    def _distilled(self, sums: Forward, weight: float, lm_loss: float) -> dict[str, float]:
        """What a stage that learns from a teacher records beside the rest; nothing for another."""
        wanted, found = self.stage.distillation, dict[str, float]()
        if wanted is None:
            return found
        loss = 0.0
        if wanted.whole_model:
            found["kld"] = float(self.world.total(sums.kld)) / weight
            loss += wanted.lm_loss * lm_loss + wanted.logits * found["kld"]
        if wanted.blocks:
            found["block_error"] = float(self.world.total(sums.blocks)) / (self.stage.rows * self.stage.context)
            loss += wanted.blocks * found["block_error"]
        return found | {"loss": loss}


def z_positions(model: TrainingDecoder, stage: TrainingStage) -> int:
    """What the z-loss of a step is a mean over: tokens and MoE layers. A dense model has none, and no z-loss."""
    return stage.rows * stage.context * max(1, len(model.blocks))


def rows_at_once(stage: TrainingStage, rows: int) -> int:
    """How many of a process's `rows` rows one forward and backward takes."""
    return min(rows, max(1, (stage.micro_batch_tokens or rows * stage.context) // stage.context))


def pieces(batch: Batch, stage: TrainingStage) -> Iterator[Batch]:
    """The micro-batches of a process's batch."""
    rows = len(batch.domains_B)
    at_once = rows_at_once(stage, rows)
    for first in range(0, rows, at_once):
        part = slice(first, first + at_once)
        yield Batch(
            batch.tokens_BT[part],
            batch.targets_BT[part],
            batch.loss_mask_BT[part],
            batch.documents_BT[part],
            batch.domains_B[part],
        )


def require_finite(what: str, value: float, stage: TrainingStage, step: int) -> None:
    """RunError when training diverged."""
    if not math.isfinite(value):
        raise RunError(f"{what} is {value} at step {step} of {stage.name}", remedy="lower learning_rate.peak")


def step_record(
    stage: TrainingStage,
    step: int,
    lm_loss: float,
    z_loss: float,
    load_LE: Tensor,
    dropped_L: Tensor,
    distinct: float | None,
    *,
    rate: float,
    norm: float,
) -> dict[str, Any]:
    """The line of metrics.jsonl behind `step` steps, without the speed."""
    record = {
        "stage": stage.name,
        "step": step,
        "tokens": step * stage.rows * stage.context,
        "loss": lm_loss + stage.z_loss * z_loss,
        "lm_loss": lm_loss,
        "z_loss": z_loss,
        "lr": rate,
        "grad_norm": norm,
        "dropped_fraction": float(dropped_L.sum()) / max(1, int(load_LE.sum())),
        "load_max_over_mean": [round(float(e.max() / e.float().mean()), 4) for e in load_LE] if load_LE.numel() else [],
    }
    return record if distinct is None else record | {DISTINCT: distinct}


def distinct_experts(sums: Forward, world: World) -> float | None:
    """How many experts of a layer 16 tokens of a document use, in the mean over windows, layers and processes.

    None where no document was as long, or the model is dense.
    """
    distinct_L, windows = world.total(sums.distinct_L), int(world.total(sums.windows))
    return round(int(distinct_L.sum()) / (windows * len(distinct_L)), 4) if windows else None


@torch.no_grad()
def evaluate(model: TrainingDecoder, stage: TrainingStage, world: World, corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Held-out loss, accuracy, expert load and locality by domain; domains without held-out text are left out."""
    model.eval()
    found: dict[str, dict[str, Any]] = {"heldout": {}, "heldout_accuracy": {}, "expert_load": {}, DISTINCT: {}}
    for domain in corpus.domains:
        if not corpus.shard(domain, "heldout").documents:
            continue
        sums: Forward | None = None
        batches = list(heldout(corpus, domain, stage.context, stage.eval_tokens))
        for first in range(0, len(batches), world.size):
            # every process takes a turn, since they compute together; a spare turn counts nothing
            mine = first + world.rank
            with autocast(stage, world.device):
                out = Forward(*model(*moved(batches[min(mine, len(batches) - 1)], world)))
            if mine >= len(batches):
                out = Forward(*(torch.zeros_like(getattr(out, f.name)) for f in dataclasses.fields(out)))
            sums = added(sums, out)
        assert sums is not None
        nll, weight, hits = (float(world.total(t)) for t in (sums.nll, sums.weight, sums.hits))
        found["heldout"][domain] = nll / max(1.0, weight)
        found["heldout_accuracy"][domain] = hits / max(1.0, weight)
        found["expert_load"][domain] = world.total(sums.load_LE).tolist()
        if (distinct := distinct_experts(sums, world)) is not None:
            found[DISTINCT][domain] = distinct
    reshard(model)
    return {key: value for key, value in found.items() if value or key != DISTINCT}


def added(sums: Forward | None, out: Forward) -> Forward:
    """`sums + out`, without their gradients; `out` alone at the beginning."""
    new = [getattr(out, f.name).detach() for f in dataclasses.fields(out)]
    if sums is None:
        return Forward(*new)
    return Forward(*(getattr(sums, f.name) + n for f, n in zip(dataclasses.fields(out), new, strict=True)))


class Speed:
    """Tokens per second since it was last asked, time out for evaluations and states left out."""

    def __init__(self) -> None:
        self.total = 0.0
        self._seconds, self._tokens, self._started = 0.0, 0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, tokens: int) -> None:
        spent = time.perf_counter() - self._started
        self._seconds, self._tokens, self.total = self._seconds + spent, self._tokens + tokens, self.total + spent

    def rate(self) -> float:
        rate = self._tokens / max(self._seconds, 1e-9)
        self._seconds, self._tokens = 0.0, 0
        return rate
