"""AdamW with a learning rate by tokens seen, clipping of the global norm, and the step of the selection biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import AdamW

from moec.compiler.spec.training import Balancing, Optimizer, Schedule, TrainingStage
from moec.training.model import TrainingDecoder
from moec.training.parallel import World


def learning_rate(schedule: Schedule, tokens: int, total: int) -> float:
    """The rate of the step that ends with `tokens` of `total` tokens seen."""
    if tokens <= schedule.warmup:
        return schedule.peak * tokens / schedule.warmup
    if schedule.shape == "constant":
        return schedule.peak
    fraction = min(1.0, (tokens - schedule.warmup) / max(1, total - schedule.warmup))
    fall = fraction if schedule.shape == "linear" else 0.5 * (1 - math.cos(math.pi * fraction))
    return schedule.peak * (1 - (1 - schedule.final) * fall)


def bias_rate(balancing: Balancing, tokens: int, total: int) -> float:
    """How far the selection biases move in the step that ends with `tokens` of `total` tokens seen."""
    return balancing.update_rate * (1 - (1 - balancing.final) * min(1.0, tokens / total))


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


Groups = list[tuple[list[tuple[str, Parameter]], float]]


def parameter_groups(model: TrainingDecoder, weight_decay: float) -> Groups:
    """(named parameters that are trained, weight decay) of experts, of other matrices, of vectors, which do not decay.

    Experts are a group of their own: in many processes the others are sharded tensors, which do not mix with them.
    """
    experts = {id(p) for block in model.blocks for p in block.experts.parameters()}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = (
        ([(n, p) for n, p in named if id(p) in experts], weight_decay),
        ([(n, p) for n, p in named if p.dim() > 1 and id(p) not in experts], weight_decay),
        ([(n, p) for n, p in named if p.dim() == 1], 0.0),
    )
    return [(members, decay) for members, decay in groups if members]


class Updates:
    """The optimizer of one stage. Moments exist from the start, so that a state has the same names at every step.

    named: all weights, of which those with `requires_grad` are trained.
    """

    def __init__(self, model: TrainingDecoder, stage: TrainingStage, world: World) -> None:
        self._stage, self._world = stage, world
        settings: Optimizer = stage.optimizer
        self._experts = {id(p) for block in model.blocks for p in block.experts.parameters()}
        self.named = named = list(model.named_parameters())  # while they are sharded: forward passes put others there
        groups = parameter_groups(model, settings.weight_decay)
        self._adamw = AdamW(
            [{"params": [p for _, p in members], "weight_decay": decay} for members, decay in groups],
            lr=stage.learning_rate.peak,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        self._trained = [(name, p) for name, p in named if p.requires_grad]
        for _, p in self._trained:
            self._adamw.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.rate = 0.0

    def moments(self) -> dict[str, Tensor]:
        """First and second moments by `NAME/first` and `NAME/second`: with the weights, the whole state.

        Of the weights that are trained alone: a stage of routers saves no moments of the others.
        """
        found: dict[str, Tensor] = {}
        for name, p in self._trained:
            found[f"{name}/first"] = self._adamw.state[p]["exp_avg"]
            found[f"{name}/second"] = self._adamw.state[p]["exp_avg_sq"]
        return found

    def at(self, step: int) -> None:
        """Continue behind `step` steps."""
        for state in self._adamw.state.values():
            state["step"].fill_(step)

    def norm(self) -> float:
        """The L2 norm of all gradients, before clipping; once a step, as it averages those of experts."""
        shared, expert = self._gradients()
        self._world.average_experts(expert)
        return self._norm(shared, expert)

    def step(self, tokens: int, norm: float) -> None:
        """Clip gradients of that norm, update the weights at `tokens` tokens seen, forget the gradients."""
        factor = min(1.0, self._stage.optimizer.clip_norm / (norm + 1e-6))
        if factor < 1.0:
            torch._foreach_mul_([local(g) for grads in self._gradients() for g in grads], factor)
        self.rate = learning_rate(self._stage.learning_rate, tokens, self._stage.tokens)
        for group in self._adamw.param_groups:
            group["lr"] = self.rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """(of what every process shares, of experts)."""
        shared = [p.grad for _, p in self.named if p.grad is not None and id(p) not in self._experts]
        expert = [p.grad for _, p in self.named if p.grad is not None and id(p) in self._experts]
        return shared, expert

    def _norm(self, shared: list[Tensor], expert: list[Tensor]) -> float:
        """The L2 norm over all gradients, each counted once however it is spread."""
        squares = [sum_of_squares(shared), sum_of_squares(expert) / self._world.expert_copies]
        return math.sqrt(float(self._world.total(torch.stack(squares).sum())))


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm([local(t) for t in tensors])).float().square().sum().cpu()


@torch.no_grad()
def balance(model: TrainingDecoder, load_LE: Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load): idle experts are chosen sooner (Wang et al. 2024, Algorithm 1)."""
    for block, load_E in zip(model.blocks, load_LE.float(), strict=True):
        if block.expert_bias is not None:
            block.expert_bias += rate * torch.sign(load_E.mean() - load_E)


@torch.no_grad()
def follow_usage(model: TrainingDecoder, load_LE: Tensor) -> None:
    """The experts' shares of the selections of about the last five steps, for the loss of locality."""
    for block, load_E in zip(model.blocks, load_LE.float(), strict=True):
        block.usage.lerp_(load_E.to(block.usage.device) / load_E.sum().clamp(min=1), 0.2)
