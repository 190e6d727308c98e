"""`moec plan`: memory and speed of a spec's model on a device, before anything is compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moec.analysis.plan.advice import Advice, advise
from moec.analysis.plan.devices import check_runs, reference
from moec.analysis.plan.memory import (
    Memory,
    Model,
    RoleBytes,
    expert_bytes_touched,
    file_bytes,
    longest_context,
    memory,
    roles,
    weight_bytes,
)
from moec.analysis.plan.memory_budget import BudgetTooSmall, Streamed, apart, streamed
from moec.analysis.plan.roofline import Step, decode, prefill
from moec.compiler.architecture import Architecture
from moec.compiler.errors import CompileError, UserError
from moec.compiler.footprint import Footprint
from moec.compiler.rates import Rates
from moec.compiler.spec import Spec
from moec.compiler.spec.device import Device
from moec.compiler.spec.sources import source_of
from moec.compiler.spec.targets import options_class, target_packages
from moec.compiler.target import find_target

#: Contexts of the tables: those the MobileMoE paper reports.
CONTEXTS = (256, 1024, 4096, 8192)
#: The prompt of a prefill rate, and of the `bench` command.
PROMPT = 512


@dataclass(frozen=True)
class Plan:
    """The answer to `moec plan`. Bytes and seconds. `longest` is 0 when not even one position fits.

    peak: with all of the model in memory. streamed: within a memory budget, where there is one.
    """

    model: Model
    target: str
    device: Device | None
    context: int
    roles: tuple[RoleBytes, ...]
    weight_bytes: int
    file_bytes: int
    peak: Memory
    by_context: tuple[Memory, ...]
    touched_512: float
    rates: Rates | None
    decode: tuple[Step, ...]
    prefill: Step | None
    longest: int | None
    advice: tuple[Advice, ...]
    streamed: Streamed | None = None

    @property
    def fits(self) -> bool | None:
        """Whether what it needs is within the device's budget; None without a device."""
        return None if self.device is None else self.needs <= self.device.budget

    @property
    def needs(self) -> int:
        """The most memory: the peak, or the memory budget where that is less."""
        return self.peak.peak if self.streamed is None else min(self.peak.peak, self.streamed.budget)

    @property
    def mapped(self) -> int:
        """Bytes of the peak that are clean pages of the program file: the system can drop them and read them again."""
        return self.peak.weights + self.peak.tables if self.model.footprint.mapped else 0


def plan_spec(
    spec: Spec,
    device: Device | None = None,
    *,
    target: str | None = None,
    context: int | None = None,
    memory_mb: int | None = None,
    hits: float | None = None,
) -> Plan:
    """Plan a spec. `context`: positions in use, default all of the model's. `memory_mb`, `hits`: see memory_budget.py.

    memory_mb None: what the spec's target says, else no budget. Errors: UserError for an unknown target or one that
    cannot be planned, a context outside 1..the model's, a model whose shapes are not known, a budget that cannot be
    kept, and hits without a budget.
    """
    target, options = _target(spec, device, target)
    model = model_of(spec, target, options)
    memory_mb = memory_mb if memory_mb is not None else getattr(options, "memory_mb", None)
    if hits is not None and memory_mb is None:
        raise UserError("--hits needs a memory budget", place=spec.name, remedy="add --memory-mb")
    a = model.architecture
    if context is not None and not 1 <= context <= a.context:
        raise UserError(
            f"--context {context} is outside the model's 1 to {a.context}",
            place=a.name,
            remedy="change `context:` in the spec",
        )
    used = context or a.context
    contexts = sorted({c for c in CONTEXTS if c < used} | {used})
    rates = None if device is None else model.footprint.rates(device, reference())
    peak = memory(model, used)
    within = None
    if memory_mb is not None:
        within = streamed(model, memory_mb * 1_000_000, used, device=device, rates=rates, hits=hits)
    made = Plan(
        model=model,
        target=target,
        device=device,
        context=used,
        roles=tuple(roles(model)),
        weight_bytes=weight_bytes(model),
        file_bytes=file_bytes(model),
        peak=peak,
        by_context=tuple(memory(model, c) for c in contexts),
        touched_512=expert_bytes_touched(model, PROMPT),
        rates=rates,
        decode=() if device is None else tuple(decode(model, device, rates, c - 1) for c in contexts),
        prefill=None if device is None else prefill(model, device, rates, min(PROMPT, used)),
        longest=None if device is None else _longest(model, device, within),
        advice=(),
        streamed=within,
    )
    if made.fits is not False or device is None:
        return made
    return replace(made, advice=tuple(advise(spec, model, device.budget, used, made.needs)))


def _longest(model: Model, device: Device, within: Streamed | None) -> int:
    """The most positions that fit the device, experts read from the file where a budget fits it."""
    if within is None or within.budget > device.budget:
        return longest_context(model, device.budget)
    return longest_context(model, within.budget, apart(model, device))


def _target(spec: Spec, device: Device | None, target: str | None) -> tuple[str, Any]:
    if target is None and device is not None and device.backend in spec.targets:
        target = device.backend
    if target is None:
        if len(spec.targets) != 1:
            listed = ", ".join(spec.targets)
            raise UserError(f"names several targets: {listed}", place=spec.name, remedy="choose one with --target")
        target = next(iter(spec.targets))
    if target not in target_packages():
        known = ", ".join(target_packages())
        raise UserError(f"unknown target {target!r}", place=spec.name, remedy=f"known here: {known}")
    if device is not None:
        check_runs(device, target)
    return target, spec.targets[target] if target in spec.targets else options_class(target)()


def model_of(spec: Spec, target: str, options: Any) -> Model:
    """What the planner counts. UserError for a target without sizes or a model without shapes."""
    architecture, footprint = architecture_of_spec(spec), footprint_of(target, spec.name)
    caches = tuple(footprint.cached(c) for c in architecture.caches)
    return Model(replace(architecture, caches=caches), spec.quantization, footprint, options)


def footprint_of(target: str, place: str | None = None) -> Footprint:
    """Sizes and rates of a target. UserError for one that has none; place: the spec that was to be planned."""
    found = find_target(target).footprint()
    if found is not None:
        return found
    planned = ", ".join(name for name in target_packages() if find_target(name).footprint() is not None)
    raise UserError(f"target {target} has no sizes to plan with", place=place, remedy=f"plan for one of: {planned}")


class ShapesUnknown(UserError):
    """A model whose shapes only its weights or its code could tell."""


def architecture_of_spec(spec: Spec) -> Architecture:
    """The account of a spec's model. ShapesUnknown when only the weights or the code could tell its shapes."""
    found = source_of(spec.model).architecture(spec)
    if found is not None:
        return found
    raise ShapesUnknown(
        f"a model of the form `{next(iter(type(spec.model).model_fields))}:` has no config that gives its shapes",
        place=spec.name,
        remedy="plan one of our architectures or a transformers folder; `moec inspect ARTIFACT` tells sizes afterwards",
    )


def check_fits(spec: Spec, device: Device, target: str) -> None:
    """CompileError, with the change that helps, when a spec's whole context does not fit the device.

    With a memory budget in its target's options the budget is what must fit. Targets without sizes, and models whose
    shapes only their code tells, are not checked.
    """
    forced = "--force compiles it all the same"
    if find_target(target).footprint() is None:
        return
    try:
        plan = plan_spec(spec, device, target=target)
    except ShapesUnknown:
        return
    except BudgetTooSmall as error:
        raise CompileError(error.message, place=error.place, remedy=f"{error.remedy}; {forced}") from None
    if plan.fits:
        return
    kept = next((a for a in plan.advice if a.fits and not a.retrain), None)
    new = next((a for a in plan.advice if a.fits), None)
    if plan.longest:
        tip = f"`context: {plan.longest}` in the spec fits"
    else:
        tip = f"{(kept or new).change} fits" if kept or new else "choose a smaller model"  # type: ignore[union-attr]
    raise CompileError(
        f"needs {plan.needs / 1e6:,.0f} MB at its context of {plan.context}, {device.name} gives an app "
        f"{device.budget / 1e6:,.0f} MB",
        place=spec.name,
        remedy=f"{tip} (`moec plan` has more); {forced}",
    )
