"""What to change when a model does not fit: every change is planned, so that its saving is computed, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moec.analysis.plan.memory import Model, longest_context, memory
from moec.analysis.plan.memory_budget import apart, has_budget
from moec.compiler.spec import Quantization, Spec
from moec.compiler.spec.sources import source_of

_ROLES = ("embedding", "head", "experts", "shared", "attention", "ffn")


@dataclass(frozen=True)
class Advice:
    """One change: the peak after it, what it saves, whether the model then fits, and which weights it takes.

    requantize: codes that a checkpoint carries cannot be kept, so it needs one in floating point. retrain: no weights
    of the old shape will do.
    """

    change: str
    peak: int
    saves: int
    fits: bool
    requantize: bool
    retrain: bool

    @property
    def weights(self) -> str:
        """Which weights the changed model takes, for people."""
        if self.retrain:
            return "trained anew"
        return "quantized anew, from a checkpoint in floating point" if self.requantize else "the same"


def advise(spec: Spec, model: Model, budget: int, context: int, now: int) -> list[Advice]:
    """Changes that save memory: first those that keep the trained weights, each group by what it saves.

    now: the bytes that are needed without a change.
    """
    found = _within(model, budget, context, now)

    def judged(change: str, other: Model, positions: int, retrain: bool) -> Advice:
        peak = memory(other, positions).peak
        requantize = not retrain and _stored(other.quantization) != _stored(model.quantization)
        return Advice(change, peak, now - peak, peak <= budget, requantize, retrain)

    found += [judged(*proposal) for proposal in _proposals(spec, model, budget, context)]
    # a change that another one contains is named once: the first of equal peaks
    useful = [a for i, a in enumerate(found) if a.saves > 0 and all(a.peak != b.peak for b in found[:i])]
    kept = sorted((a for a in useful if not a.retrain), key=lambda a: -a.saves)
    return kept + sorted((a for a in useful if a.retrain), key=lambda a: -a.saves)


def _within(model: Model, budget: int, context: int, now: int) -> list[Advice]:
    """A memory budget of all that the device gives, if one token needs no more."""
    least = memory(model, context).peak - apart(model)
    if not has_budget(model) or least > budget:
        return []
    megabytes = budget // 1_000_000
    peak = megabytes * 1_000_000
    return [Advice(f"memory_mb: {megabytes} in the target's options", peak, now - peak, True, False, False)]


def _proposals(spec: Spec, model: Model, budget: int, context: int) -> Iterator[tuple[str, Model, int, bool]]:
    q, source = model.quantization, source_of(spec.model)
    longest = longest_context(model, budget)
    if 0 < longest < context:
        yield f"a context of {longest} positions", model, longest, False
    elif context > 1024:
        yield "a context of 1024 positions", model, 1024, False
    if q is None:
        yield "quantization: {weights: int4}", replace(model, quantization=Quantization(weights="int4")), context, False
    else:
        for change, other in _smaller(q):
            if not list(source.quantization_faults(spec.model, other)):
                yield change, replace(model, quantization=other), context, False
        everything = _smallest(q)
        if everything != q and not list(source.quantization_faults(spec.model, everything)):
            yield "all of quantization at int4, groups of 128", replace(model, quantization=everything), context, False
    shorter = _shorter_chunks(model)
    if shorter is not None:
        yield "max_tokens: 32 in the target's options", shorter, context, False
    for change, section in source.smaller(spec.model):
        architecture = source.architecture(spec.model_copy(update={"model": section}))
        if architecture is not None:
            yield change, replace(model, architecture=architecture), context, True


def _stored(q: Quantization | None) -> Quantization | None:
    """What of a quantization the weights' codes depend on."""
    return None if q is None else q.model_copy(update={"kv_cache": "int8"})


def _smaller(q: Quantization) -> Iterator[tuple[str, Quantization]]:
    if q.cache_codes is None:
        yield "kv_cache: int8", q.model_copy(update={"kv_cache": "int8"})
    if q.weights != "int4":
        yield "weights: int4", q.model_copy(update={"weights": "int4"})
    for role in _ROLES:
        override = getattr(q, role)
        if override is not None and override.weights != "int4":
            yield f"{role}: int4", q.model_copy(update={role: override.model_copy(update={"weights": "int4"})})
    if q.group_size < 128:
        yield "group_size: 128", q.model_copy(update={"group_size": 128})


def _smallest(q: Quantization) -> Quantization:
    changes: dict[str, Any] = {"weights": "int4", "kv_cache": "int8", "group_size": 128}
    return q.model_copy(update={**changes, **dict.fromkeys(_ROLES)})


def _shorter_chunks(model: Model) -> Model | None:
    if model.footprint.chunk(model.options) <= 32 or not hasattr(model.options, "max_tokens"):
        return None
    return replace(model, options=model.options.model_copy(update={"max_tokens": 32}))
