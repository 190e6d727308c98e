"""Scales fitted to the float model's predictions, codes as they are.

    minimise over a   mean KL(float || quantized),   w = s (1 + a) q  for each group

by Adam, from a = 0, on calibration text. Nothing of the format changes: the same codes, as many scales. A part of the
text is held out, and scales that do not predict it better are not taken. In memory are one layer, three numbers for
each scale (an eleventh of the float weights), and the residual stream of a batch between all layers (`gradients.py`).

Shape suffixes: T tokens, V vocabulary, N rows of codes, G groups, g elements of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import cos, pi
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from moec.analysis.calibration.balance import stacks_in_out, with_factors
from moec.analysis.calibration.gradients import Gradients, Values, product_dtype
from moec.analysis.calibration.results import Results, Writer
from moec.analysis.calibration.streaming import Call, LayerStream, Stretch
from moec.compiler.matching.read import aten, is_op
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.compiler.quant import stored_scales
from moec.compiler.quantizer import last_axis
from moec.passes.quantize_weights import Read

EPOCHS = 1
_BATCH = 1024  # tokens of a step
_READ = 8192  # tokens that are read together where no gradients are wanted
_RATE = 2e-3  # of the first steps; a scale moves by about so much of itself in one
_BETAS = (0.9, 0.95)
_HELD_OUT = 16  # one of so many sequences judges the result
_MOST_HELD_OUT = 4096  # tokens
_FINE = 8  # weights of so many bits or more keep their scales: their rounding is small beside that of the others
_SEED = 0


def settings() -> dict[str, Any]:
    """What the result depends on beside weights, codes and text: results of other settings are not found again."""
    return {"epochs": EPOCHS, "batch": _BATCH, "rate": _RATE, "betas": _BETAS, "held out": _HELD_OUT, "seed": _SEED}


@dataclass(frozen=True)
class _Coded:
    """A weight with codes: how they lie, and its relative change of scales, a parameter [..., G] (None: not fitted)."""

    read: Read
    change: Parameter | None

    @property
    def turned(self) -> bool:
        """Whether the codes lie transposed beside the float weight."""
        return last_axis(self.read.orientation) != self.read.scheme.axis


class _Student:
    """The quantized model: values of its weights for a stretch, and gradients of its parameters from theirs."""

    def __init__(self, program: Program, results: Results, planned: Mapping[str, Read]) -> None:
        self._program, self._results = program, results
        self._in_out = stacks_in_out(program)
        self._coded: dict[str, _Coded] = {}
        for name, read in planned.items():
            shape = results.codes(name).scales.shape if read.scheme.bits < _FINE else None
            self._coded[name] = _Coded(read, None if shape is None else Parameter(torch.zeros(shape)))
        self._type = _types(program)

    @property
    def changes(self) -> dict[str, Parameter]:
        """The parameters, by the name of the weight."""
        return {name: c.change for name, c in self._coded.items() if c.change is not None}

    def values(self, names: Sequence[str], *, grad: bool) -> Values:
        """The weights of a stretch as leaves, those that are fitted with gradients if `grad`."""
        return {name: self._value(name).requires_grad_(grad and name in self.changes) for name in names}

    def _value(self, name: str) -> Tensor:
        coded = self._coded.get(name)
        if coded is None:
            factors = self._results.factors(name)
            value = with_factors(self._program.weights[name].load(), *factors, in_out=name in self._in_out)
            return value.to(self._type[name]) if value.is_floating_point() else value
        codes = self._codes(name)
        values = codes.view(-1, self._results.codes(name).group_size)
        values.mul_(self.scales(name).to(codes.dtype).view(-1, 1))
        return codes.transpose(-1, -2).contiguous() if coded.turned else codes

    def _codes(self, name: str) -> Tensor:
        return self._results.codes(name).unpacked().to(self._type[name])

    def scales(self, name: str) -> Tensor:
        """The scales of a weight as they are now, float32 [..., G]."""
        scales, change = self._results.codes(name).scales.to(torch.float32), self._coded[name].change
        return scales if change is None else scales * (1 + change.detach())

    def collect(self, values: Values) -> None:
        """Add the gradients of a stretch's weights to those of the parameters."""
        for name, value in values.items():
            if value.grad is None:
                continue
            coded, found = self._coded[name], self._results.codes(name)
            grad = value.grad.transpose(-1, -2).contiguous() if coded.turned else value.grad
            products_Ng = grad.view(-1, found.group_size) * self._codes(name).view(-1, found.group_size)
            # a product with ones adds up faster than a sum over so short a dimension
            sums_N = products_Ng @ torch.ones(found.group_size, 1, dtype=products_Ng.dtype)
            added = sums_N.to(torch.float32).view(found.scales.shape) * found.scales.to(torch.float32)
            assert coded.change is not None
            coded.change.grad = added if coded.change.grad is None else coded.change.grad + added


def _types(program: Program) -> dict[str, torch.dtype]:
    """The type of each weight in the passes: that of products for matrices that only linears and lookups read."""
    found = dict.fromkeys(program.weights, torch.float32)
    for node in program.graph.nodes:
        name = program.weight_of(node) if node.op == "placeholder" else None
        if name is None or len(program.weights[name].shape) != 2:
            continue
        if all(is_op(user, aten.linear.default, aten.embedding.default) for user in node.users):
            found[name] = product_dtype()
    return found


@dataclass
class _Distillation:
    """Gradients of the divergence. `teacher`: calls with what the float model's last stretch reads."""

    gradients: Gradients
    student: _Student
    head: Values
    teacher: Sequence[Call]

    def step(self, batch: Sequence[int]) -> float:
        """Gradients of a batch of calls; the mean divergence of its tokens before, in nats."""
        calls = self._calls(batch)
        tokens = sum(len(call.ids) for call in calls)

        def loss(number: int, logits_TV: Tensor) -> Tensor:
            return self._divergence(batch[number], logits_TV) / tokens

        def weights(stretch: Stretch) -> Values:
            return self.student.values(self.gradients.names(stretch), grad=True)

        return self.gradients.backward(calls, weights, loss, lambda _, values: self.student.collect(values))

    def measured(self, numbers: Sequence[int]) -> float:
        """Mean divergence on calls, in nats."""
        total = 0.0
        for batch in _batches(numbers, self.teacher, _READ):
            calls = self.gradients.before_head(self._calls(batch), self._values)
            last = self._values(self.gradients.stretches[-1])
            for number, call in zip(batch, calls, strict=True):
                total += float(self._divergence(number, self.gradients.logits(call, last)))
        return total / sum(len(self.teacher[n].ids) for n in numbers)

    def _values(self, stretch: Stretch) -> Values:
        return self.student.values(self.gradients.names(stretch), grad=False)

    def _calls(self, batch: Sequence[int]) -> list[Call]:
        return [Call(self.teacher[n].text, 0, self.teacher[n].ids) for n in batch]

    def _divergence(self, number: int, logits_TV: Tensor) -> Tensor:
        wanted = self.gradients.logits(self.teacher[number], self.head).log_softmax(-1)
        return functional.kl_div(logits_TV.log_softmax(-1), wanted, log_target=True, reduction="sum")


def distill(
    program: Program,
    planned: Mapping[str, Read],
    results: Results,
    writer: Writer,
    texts: Sequence[Sequence[int]],
    progress: Progress,
) -> dict[str, Any]:
    """Write the codes of `results` with fitted scales, and factors with fitted gains. What was done, for the report.

    texts: token ids, each cut into calls of what the program takes at once.
    """
    stream = LayerStream(program, texts, result=True)
    gradients = Gradients(stream)
    types = _types(program)

    def floats(stretch: Stretch) -> Values:
        return {n: program.weights[n].load().to(types[n]) for n in gradients.names(stretch)}

    calls = [call for call in gradients.alone() if len(call.ids) > 1]
    teacher = []
    with progress.stage("the float model's predictions", len(calls)) as step:
        for batch in _batches(range(len(calls)), calls, _READ):
            teacher += gradients.before_head([calls[n] for n in batch], floats)
            step("")
    student = _Student(program, results, planned)
    work = _Distillation(gradients, student, floats(gradients.stretches[-1]), teacher)
    judged, used = _held_out(teacher)
    before = work.measured(judged)
    generator = torch.Generator().manual_seed(_SEED)
    order = [b for _ in range(EPOCHS) for b in _batches(_shuffled(used, generator), teacher, _BATCH)]
    optimizer = torch.optim.Adam(student.changes.values(), lr=_RATE, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1 + cos(pi * n / len(order))))
    with progress.stage("distill scales", len(order)) as step:
        for batch in order:
            optimizer.zero_grad()
            found = work.step(batch)
            optimizer.step()
            schedule.step()
            step(f"divergence {found:.4f}")
    after = work.measured(judged)
    if after < before:
        for name in student.changes:
            tensor = results.codes(name)
            scales = stored_scales(program.weights[name].load(), student.scales(name))
            writer.codes(name, replace(tensor, scales=scales))
    tokens = EPOCHS * sum(len(teacher[n].ids) for n in used)
    held_out = {"before": round(before, 5), "after": round(after, 5)}
    return {"tokens": tokens, "held_out": held_out, "taken": after < before}


def _held_out(calls: Sequence[Call]) -> tuple[list[int], list[int]]:
    """Numbers of the calls that judge, and of those that are learned from; of a single call both."""
    judged: list[int] = []
    for number in range(0, len(calls), _HELD_OUT):
        if sum(len(calls[n].ids) for n in judged) < _MOST_HELD_OUT:
            judged.append(number)
    used = [n for n in range(len(calls)) if n not in judged]
    return judged, used or judged


def _shuffled(numbers: Sequence[int], generator: torch.Generator) -> list[int]:
    return [numbers[i] for i in torch.randperm(len(numbers), generator=generator).tolist()]


def _batches(numbers: Sequence[int], calls: Sequence[Call], tokens: int) -> list[list[int]]:
    """Consecutive numbers of calls, of `tokens` tokens or a little more together."""
    batches: list[list[int]] = []
    room = 0
    for number in numbers:
        if room <= 0:
            batches.append([])
            room = tokens
        batches[-1].append(number)
        room -= len(calls[number].ids)
    return batches
