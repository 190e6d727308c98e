"""The shapes of a sweep: every combination of the factors, with widths chosen so that active parameters are equal.

With W the active width of the feed-forward block (`top_k * expert_width + shared_width`), E experts of granularity g
are E*g experts of width W/g, g of them chosen. A shared expert takes half of the chosen slots: E*g - g/2 routed
experts, g/2 chosen, and W/2 of the width shared. E = 1 is a dense block of width W, for which neither g nor a shared
expert means anything. This is the count of `moec search` and of MobileMoE (arXiv 2605.27358).

Active parameters are those that one token uses outside of the embedding table and the head, the router among them: it
grows with E*g, and in a small model it is no trifle. W is chosen for each shape so that the sum is that of the spec's
own model. Each chosen expert keeps the mean weight that it has in the spec (`scale / top_k`): were `scale` kept
instead, blocks of finer experts would begin with smaller outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moec.compiler.errors import UserError
from moec.sources.decoder.architecture import architecture_of
from moec.sources.decoder.config import DecoderConfig

EXPERTS, GRANULARITIES, SHARED = (1, 2, 4, 8, 16), (1, 2, 4, 8), (False, True)  # what is tried where nothing is named
TOLERANCE = 0.02  # of the active parameters outside of the tables
MULTIPLE = 8  # of widths: grouped matrix products in bfloat16 need rows of 16 bytes
_MOST_EXPERTS, _MOST_CHOSEN = 4096, 256  # bounds of a spec


@dataclass(frozen=True)
class Grid:
    """The values of every factor, in the order that they are compared in."""

    experts: tuple[int, ...]
    granularity: tuple[int, ...]
    shared: tuple[bool, ...]
    d_model: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """One shape at one number of training tokens.

    total, active: parameters with the tables, as `moec plan` counts them. body: active ones outside of the tables;
    deviation: by how much of its own it differs from the spec's. router: of body.
    """

    experts: int
    granularity: int
    shared: bool
    d_model: int
    tokens: int
    config: DecoderConfig
    total: int
    active: int
    body: int
    router: int
    deviation: float

    @property
    def name(self) -> str:
        """For folders: what it is, whatever else the grid holds."""
        block = "dense" if self.experts == 1 else f"e{self.experts}-g{self.granularity}{'-shared' * self.shared}"
        return f"d{self.d_model}-t{self.tokens}-{block}"

    @property
    def block(self) -> str:
        """The feed-forward block in words."""
        shared = ", shared" if self.shared else ""
        return "dense" if self.experts == 1 else f"E={self.experts}, g={self.granularity}{shared}"

    @property
    def cell(self) -> str:
        """Points that are compared with each other: of one size, trained on one number of tokens."""
        return f"d{self.d_model}-t{self.tokens}"


@dataclass(frozen=True)
class LeftOut:
    """A combination that is no point, and why."""

    experts: int
    granularity: int
    shared: bool
    d_model: int
    reason: str

    @property
    def label(self) -> str:
        shared = ", shared" if self.shared else ""
        return f"d_model {self.d_model}: E={self.experts}, g={self.granularity}{shared}"


def of_spec(model: DecoderConfig) -> tuple[float, float, bool]:
    """(E, g, shared) of a spec's own model, as fractions where it is none of the grid's kind."""
    if model.moe is None:
        return 1.0, 1.0, False
    moe = model.moe
    granularity = (moe.top_k * moe.expert_width + moe.shared_width) / moe.expert_width
    return (moe.experts + granularity - moe.top_k) / granularity, granularity, moe.shared_width > 0


def points(
    model: DecoderConfig, grid: Grid, *, tolerance: float = TOLERANCE, multiple: int = MULTIPLE
) -> tuple[tuple[Point, ...], tuple[LeftOut, ...]]:
    """The points of a grid and what it cannot have. Widths are multiples of `multiple`.

    tolerance: how far the active parameters outside of the tables may be from the spec's own, as a part of them.
    UserError where nothing is left to compare, or a d_model does not divide into the spec's heads.
    """
    found, left = [], []
    for d_model in grid.d_model:
        reference = scaled(model, d_model)
        for experts, granularity, shared in _combinations(grid):
            made = _point(reference, experts, granularity, shared, tolerance, multiple)
            if isinstance(made, LeftOut):
                left.append(made)
            else:
                found += [replace(made, tokens=tokens) for tokens in grid.tokens]
    if not found:
        first = left[0]
        raise UserError(
            f"none of {len(left)} shapes can be had; {first.label}: {first.reason}",
            place="the grid",
            remedy="choose other values, a larger --tolerance or a smaller --width-multiple",
        )
    return tuple(found), tuple(left)


def _combinations(grid: Grid) -> Iterator[tuple[int, int, bool]]:
    if 1 in grid.experts:
        yield 1, 1, False
    yield from itertools.product((e for e in grid.experts if e != 1), grid.granularity, grid.shared)


def scaled(model: DecoderConfig, d_model: int) -> DecoderConfig:
    """The spec's model with another d_model: as many heads and as much width for each feature, equal depth."""
    if d_model == model.d_model:
        return model
    heads, kv_heads = model.heads * d_model, model.kv_heads * d_model
    if heads % model.d_model or kv_heads % model.d_model:
        least = next(n for n in range(1, model.d_model + 1) if not (model.kv_heads * n) % model.d_model)
        raise UserError(
            f"d_model {d_model} would have {heads / model.d_model:g} heads and {kv_heads / model.d_model:g} KV heads "
            f"where the spec has {model.heads} and {model.kv_heads} for {model.d_model}",
            remedy=f"choose multiples of {least}",
        )
    changes: dict[str, Any] = {
        "d_model": d_model,
        "heads": heads // model.d_model,
        "kv_heads": kv_heads // model.d_model,
    }

    def width(value: int) -> int:
        return max(1, round(value * d_model / model.d_model)) if value else 0

    if model.moe is None:
        changes["ffn_width"] = width(model.ffn_width or 0)
    else:
        widths = {"expert_width": width(model.moe.expert_width), "shared_width": width(model.moe.shared_width)}
        changes["moe"] = model.moe.model_dump() | widths
    return _config(model, changes)


def _config(model: DecoderConfig, changes: dict[str, Any]) -> DecoderConfig:
    """A checked copy; None takes a key out."""
    raw = model.model_dump(exclude_none=True) | changes
    return DecoderConfig.model_validate({key: value for key, value in raw.items() if value is not None})


def _point(
    reference: DecoderConfig, experts: int, granularity: int, shared: bool, tolerance: float, multiple: int
) -> Point | LeftOut:
    def left_out(reason: str) -> LeftOut:
        return LeftOut(experts, granularity, shared, reference.d_model, reason)

    chosen = granularity // 2 if shared else granularity
    if shared and granularity % 2:
        return left_out("a shared expert takes half of the chosen slots, and their number is odd")
    routed = experts * granularity - (granularity - chosen)
    if experts > 1 and (routed > _MOST_EXPERTS or chosen > _MOST_CHOSEN):
        return left_out(f"{routed} experts with {chosen} chosen: at most {_MOST_EXPERTS} and {_MOST_CHOSEN}")
    normalize = reference.moe is None or reference.moe.normalize
    if experts > 1 and chosen == 1 and normalize:
        return left_out("the weight of one chosen expert is normalized to 1, and its router would learn nothing")
    target, probe = body(reference), _shape(reference, experts, granularity, shared, 1, int(shared))
    slots = 1 if experts == 1 else chosen
    unit = 3 * reference.d_model * reference.layers  # parameters that one more feature of active width adds
    wanted = (target - body(probe)) / unit + slots + int(shared)  # the active width W of this shape
    width = _nearest(wanted / (slots + (granularity - chosen if shared else 0)), multiple)
    rest = _nearest(wanted - slots * width, multiple) if shared else 0
    if width < multiple or (shared and rest < multiple):
        return left_out(f"its experts would be {wanted / granularity:.1f} wide, widths are multiples of {multiple}")
    config = _shape(reference, experts, granularity, shared, width, rest)
    deviation = body(config) / target - 1.0
    if abs(deviation) > tolerance:
        what = f"width {width}{f' beside {rest} shared' if shared else ''}"
        return left_out(
            f"its nearest shape ({what}) has {deviation:+.1%} active parameters, the tolerance is {tolerance:.1%}"
        )
    account = architecture_of(config, "point")
    router = sum(w.numel for w in account.weights if w.role == "router" and w.counted)
    return Point(
        experts,
        granularity,
        shared,
        config.d_model,
        0,
        config,
        account.total_parameters,
        account.active_parameters,
        body(config),
        router,
        deviation,
    )


def _nearest(value: float, multiple: int) -> int:
    return multiple * round(value / multiple)


def _shape(
    reference: DecoderConfig, experts: int, granularity: int, shared: bool, width: int, rest: int
) -> DecoderConfig:
    """The decoder of a shape whose experts are `width` wide, and `rest` its shared one."""
    if experts == 1:
        return _config(reference, {"architecture": "mobilellm", "moe": None, "ffn_width": width})
    chosen = granularity // 2 if shared else granularity
    mean = 1.0 if reference.moe is None else reference.moe.scale / reference.moe.top_k
    moe = {} if reference.moe is None else reference.moe.model_dump()
    moe |= {
        "experts": experts * granularity - (granularity - chosen),
        "top_k": chosen,
        "expert_width": width,
        "shared_width": rest,
        "scale": mean * chosen,
    }
    return _config(reference, {"architecture": "mobilemoe", "moe": moe, "ffn_width": None})


def body(config: DecoderConfig) -> int:
    """Active parameters outside of the embedding table and the head."""
    account = architecture_of(config, "point")
    tables = sum(w.numel for w in account.weights if w.role in ("embedding", "head") and w.counted)
    return account.active_parameters - tables
