"""`moec search`: which shape to train for a device, by the scaling law, under its memory and speed.

A candidate is (d_model, layers, E, g, shared). With W = 4 d_model as the active width, E experts of granularity g are
E*g experts of width W/g with top g; a shared expert takes half of the active slots: E*g - g/2 routed experts, top g/2,
and one shared expert of width W/2 (g = 8, E = 8: the 60 + 1, top 4 of MobileMoE). E = 1 is a dense model of width W.

What the law decides: N (active parameters) and E. What it does not: g and the shared expert, whose coefficients are not
public, and depth against width. Those follow the paper's choices, and the report says so: a shared expert before none
(its A is smaller), g nearest to 8, and d_model / layers nearest to 40, as in its three sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.analysis.plan.devices import reference
from moec.analysis.plan.memory import Model, memory, weight_bytes
from moec.analysis.plan.roofline import decode
from moec.analysis.plan.scaling_law import PUBLISHED, Law, training_flops
from moec.compiler.errors import UserError
from moec.compiler.footprint import Footprint
from moec.compiler.rates import Rates
from moec.compiler.spec import Quantization
from moec.compiler.spec.device import Device
from moec.sources.decoder.architecture import architecture_of
from moec.sources.decoder.config import DecoderConfig, MoeConfig, RopeConfig

EXPERTS = (1, 2, 4, 8, 16, 32)  # what the paper swept
GRANULARITIES = (1, 2, 4, 8, 16)
HEAD_DIM, KV_HEADS, WIDTH_OF_D = 64, 4, 4  # of all published sizes
VOCABULARY, BOS, EOS = 128_256, 128_000, (128_001, 128_008, 128_009)  # the Llama 3 tokenizer
ASPECT, ASPECTS = 40.0, (24.0, 56.0)  # d_model / layers: published 38.4, 39.4, 40.0
CHOSEN_GRANULARITY = 8
DEFAULT_TOKENS = 500e9  # the most that the law was fitted to


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep: bytes, parameters, operations, tokens per second. None: no limit."""

    memory: float
    context: int
    tokens: float = DEFAULT_TOKENS
    train_flops: float | None = None
    active: float | None = None
    decode: float | None = None


@dataclass(frozen=True)
class Shape:
    """A decoder and what it costs on a device at a context. `backbone`: parameters as the law counts them."""

    config: DecoderConfig
    experts: int
    granularity: int
    shared: bool
    total: int
    active: int
    backbone: int
    peak: int
    weights: int
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Costs:
    """Every shape with its costs, and the rates of the device that they rest on. No limit is in it but the context."""

    shapes: tuple[Shape, ...]
    rates: Rates | None = field(repr=False)


@dataclass(frozen=True)
class Candidate(Shape):
    """A shape with the loss the law gives it. `tokens` are those the training budget allows.

    `outside`: what of it lies outside the fitted range, in words; such a loss is an extrapolation.
    """

    tokens: float
    loss: float
    outside: tuple[str, ...]

    @property
    def label(self) -> str:
        if self.experts == 1:
            return f"{self.config.layers} x {self.config.d_model}, dense"
        shared = ", shared" if self.shared else ""
        return f"{self.config.layers} x {self.config.d_model}, E={self.experts}, g={self.granularity}{shared}"


@dataclass(frozen=True)
class Found:
    """The result of a search. `front`: no other candidate has less memory and loss; `by_weights`: dense beside MoE."""

    best: Candidate
    front: tuple[Candidate, ...]
    by_weights: tuple[tuple[float, Candidate | None, Candidate | None], ...]
    within_error: tuple[int, ...]  # numbers of experts whose best loss differs from the best by less than the RMSE
    considered: int
    warnings: tuple[str, ...]
    rates: Rates | None = field(repr=False, default=None)


def shape(d_model: int, layers: int, experts: int, granularity: int, shared: bool, context: int) -> DecoderConfig:
    """The decoder of a candidate. ValueError for a combination that is none (a shared expert needs g >= 2)."""
    width = WIDTH_OF_D * d_model
    common: dict[str, Any] = {
        "layers": layers,
        "d_model": d_model,
        "heads": d_model // HEAD_DIM,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "context": context,
        "qk_norm": True,
        "rope": RopeConfig(theta=500000.0, interleaved=True),
        "bos_id": BOS,
        "eos_ids": EOS,
    }
    if experts == 1:
        return DecoderConfig(architecture="mobilellm", ffn_width=width, **common)
    if shared and granularity % 2:
        raise ValueError("a shared expert takes half of the active slots: the granularity must be even")
    slots = granularity // 2 if shared else granularity
    moe = MoeConfig(
        experts=experts * granularity - (granularity - slots),
        top_k=slots,
        expert_width=width // granularity,
        shared_width=width // 2 if shared else 0,
        scale=2.5,
    )
    return DecoderConfig(architecture="mobilemoe", moe=moe, **common)


def shapes(context: int) -> Iterator[tuple[DecoderConfig, int, int, bool]]:
    """Every candidate's decoder with (E, g, shared)."""
    for d_model in range(512, 2304, KV_HEADS * HEAD_DIM):
        for layers in range(4, 81, 2):
            if not ASPECTS[0] <= d_model / layers <= ASPECTS[1]:
                continue
            yield shape(d_model, layers, 1, 1, False, context), 1, 1, False
            for experts in EXPERTS[1:]:
                for granularity in GRANULARITIES:
                    for shared in (True, False) if granularity > 1 else (False,):
                        decoder = shape(d_model, layers, experts, granularity, shared, context)
                        yield decoder, experts, granularity, shared


def search(
    device: Device,
    footprint: Footprint,
    options: Any,
    limits: Limits,
    *,
    law: Law = PUBLISHED,
    quantization: Quantization | None = None,
    extrapolate: bool = False,
) -> Found:
    """The shape of least loss within the limits, and the front of memory against loss.

    Candidates outside the law's range are left out unless `extrapolate`; tokens beyond it are evaluated at its end.
    Both are warned of. Errors: UserError when nothing is within the limits, saying which limit excludes most.
    """
    found = costs(device, footprint, options, limits.context, quantization=quantization)
    return choose(found, limits, law=law, extrapolate=extrapolate)


def costs(
    device: Device, footprint: Footprint, options: Any, context: int, *, quantization: Quantization | None = None
) -> Costs:
    """What every shape costs. `quantization`: how its weights are stored; INT4 if None."""
    quantization = quantization or Quantization(weights="int4")
    rates = footprint.rates(device, reference())

    def model(config: DecoderConfig) -> Model:
        return Model(architecture_of(config, "candidate"), quantization, footprint, options)

    return Costs(tuple(_shape(which, model(which[0]), device, rates) for which in shapes(context)), rates)


def choose(found: Costs, limits: Limits, *, law: Law = PUBLISHED, extrapolate: bool = False) -> Found:
    """As `search`, among shapes whose costs at the context of `limits` are known."""
    built = [_candidate(shape, limits, law, extrapolate) for shape in found.shapes]
    kept = [c for c in built if not _broken(c, limits)]
    if not kept:
        raise _nothing(built, limits)
    inside = [c for c in kept if not c.outside]
    pool = kept if extrapolate or not inside else inside
    warnings = list(_warnings(kept, inside, pool, law, extrapolate))
    best = min(pool, key=_rank)
    near = sorted({c.experts for c in pool if c.loss - best.loss < law.rmse and _same_shape(c, best)})
    return Found(
        best,
        tuple(_front(pool)),
        tuple(_by_weights(pool)),
        tuple(near),
        len(built),
        tuple(warnings),
        found.rates,
    )


def _shape(which: tuple[DecoderConfig, int, int, bool], model: Model, device: Device, rates: Rates | None) -> Shape:
    a = model.architecture
    # half of the context is the mean position of a conversation that fills it
    step = decode(model, device, rates, a.context // 2)
    return Shape(
        *which,
        total=a.total_parameters,
        active=a.active_parameters,
        # the router is left out of N: it grows with g, of which the law knows nothing
        backbone=a.active_parameters - sum(w.numel for w in a.weights if w.role == "router" and w.counted),
        peak=memory(model, a.context).peak,
        weights=weight_bytes(model),
        decode_tokens_per_s=step.expected_tokens_per_s or step.roofline_tokens_per_s,
    )


def _candidate(known: Shape, limits: Limits, law: Law, extrapolate: bool) -> Candidate:
    tokens = limits.tokens
    if limits.train_flops is not None:
        tokens = min(tokens, limits.train_flops / training_flops(known.backbone, 1.0))
    n, d = known.backbone / 1e9, tokens / 1e9
    asked = d if extrapolate else min(d, law.tokens.high)
    return Candidate(
        **vars(known),
        tokens=tokens,
        loss=law.loss(n, asked, known.experts),
        outside=tuple(law.outside(n, asked, known.experts)),
    )


def _broken(c: Candidate, limits: Limits) -> list[str]:
    """The limits that a candidate breaks."""
    found = []
    if c.peak > limits.memory:
        found.append("memory")
    if limits.active is not None and c.active > limits.active:
        found.append("active parameters")
    if limits.decode is not None and c.decode_tokens_per_s < limits.decode:
        found.append("decoding rate")
    if c.tokens < 1e6:
        found.append("training operations")
    return found


def _nothing(built: Sequence[Candidate], limits: Limits) -> UserError:
    counts: dict[str, int] = {}
    for c in built:
        for name in _broken(c, limits):
            counts[name] = counts.get(name, 0) + 1
    worst = max(counts, key=lambda name: counts[name])
    nearest = {
        "memory": f"the smallest shape needs {min(c.peak for c in built) / 1e6:,.0f} MB",
        "active parameters": f"the smallest shape has {min(c.active for c in built) / 1e9:.3f} B",
        "decoding rate": f"the fastest shape decodes {max(c.decode_tokens_per_s for c in built):,.1f} tokens/s",
        "training operations": f"they leave the smallest shape {max(c.tokens for c in built):,.0f} tokens",
    }
    return UserError(
        f"none of {len(built)} shapes is within the limits; {worst} excludes {counts[worst]}",
        remedy=f"loosen it ({nearest[worst]})",
    )


def _rank(c: Candidate) -> tuple[float, ...]:
    """Least loss; what the law does not tell apart goes by the paper's choices."""
    aspect = abs(math.log(c.config.d_model / c.config.layers / ASPECT))
    return (round(c.loss, 9), not c.shared, abs(math.log2(c.granularity / CHOSEN_GRANULARITY)), aspect, c.peak)


def _same_shape(a: Candidate, b: Candidate) -> bool:
    return (a.config.layers, a.config.d_model) == (b.config.layers, b.config.d_model)


def _warnings(
    kept: Sequence[Candidate], inside: Sequence[Candidate], pool: Sequence[Candidate], law: Law, extrapolate: bool
) -> Iterator[str]:
    tokens = sorted(c.tokens / 1e9 for c in pool)
    if tokens[-1] > law.tokens.high * 1.001:
        yield f"{tokens[-1]:g} B training tokens: the law was fitted up to {law.tokens.high:g} B; " + (
            "losses are extrapolated, and misleading: far outside it the law comes to prefer few experts"
            if extrapolate
            else f"shapes are compared at {law.tokens.high:g} B"
        )
    if tokens[0] < law.tokens.low * 0.999:
        yield f"{tokens[0]:g} B training tokens: the law was fitted from {law.tokens.low:g} B; losses are extrapolated"
    left = len(kept) - len(inside)
    if not inside:
        r = law.parameters
        yield (
            f"no shape within the limits lies in the fitted range ({r.low:g} to {r.high:g} B active parameters, "
            f"{law.tokens.low:g} B tokens and more): every loss here is an extrapolation"
        )
    elif extrapolate and left:
        yield f"{left} of {len(kept)} shapes lie outside the fitted range: their losses are extrapolated"
    elif left:
        yield (
            f"{left} of {len(kept)} shapes within the limits lie outside the fitted range and were left out "
            "(--extrapolate takes them in)"
        )


def _front(pool: Iterable[Candidate]) -> Iterator[Candidate]:
    """From the smallest up: each has a lower loss than all that need as little memory.

    Of shapes that the law does not tell apart, the one that the paper's choices prefer stands for all.
    """
    chosen: dict[tuple[int, int, int], Candidate] = {}
    for c in sorted(pool, key=_rank):
        chosen.setdefault((c.config.layers, c.config.d_model, c.experts), c)
    best = math.inf
    for c in sorted(chosen.values(), key=lambda c: (c.peak, c.loss)):
        if c.loss < best - 1e-9:
            best = c.loss
            yield c


def _by_weights(pool: Sequence[Candidate]) -> Iterator[tuple[float, Candidate | None, Candidate | None]]:
    """(bytes, best dense, best mixture) whose weights are within a rising budget, as long as anything changes."""
    last = None
    for budget in (1.5e8, 2e8, 2.5e8, 3e8, 4e8, 5e8, 7.5e8, 1e9, 1.5e9, 2e9, 3e9, 4e9):
        fits = [c for c in pool if c.weights <= budget]
        dense = min((c for c in fits if c.experts == 1), key=_rank, default=None)
        mixed = min((c for c in fits if c.experts > 1), key=_rank, default=None)
        if (dense, mixed) != (None, None) and (dense, mixed) != last:
            yield budget, dense, mixed
        last = (dense, mixed)
