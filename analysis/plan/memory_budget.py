"""The plan of a MoE model within a memory budget: experts held, bytes read per token, and tokens per second.

The runtime reads routed experts when tokens select them (docs/memory-budget.md). The hit rate depends on routing and
cannot be told from a spec: without a measured one (`moec bench ARTIFACT --memory-mb N --json`) routing is taken to be
uniform, so that a cache with a share s of the experts has a hit rate of s. Trained routers repeat themselves and hit
more often.

A token takes the longer of reading and computing, and a tenth of the shorter, which is not hidden: experts that the
layer before did not foretell, and computing for which nothing is known to be read. Computing is slower by the time in
which the bytes that are read go into memory. Reading has a core of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.analysis.plan.memory import Model, memory
from moec.analysis.plan.roofline import decode
from moec.compiler.errors import UserError
from moec.compiler.rates import Rates
from moec.compiler.spec.device import Device

#: Of the shorter of reading and computing, the share that the other does not hide (docs/memory-budget.md, How fast).
EXPOSED = 0.1


@dataclass(frozen=True)
class Streamed:
    """Bytes and seconds. experts: of all layers; held: how many the budget has room for. hits: the share of asked
    experts that are there, uniform unless it was `measured`. read: bytes of a decoded token. reading_s: at the
    device's storage rate, None without one; computing_s: with all in memory; storing_s: of what is read, into memory.
    """

    budget: int
    least: int
    experts: int
    held: int
    expert_bytes: int
    hits: float
    measured: bool
    read: float
    reading_s: float | None
    computing_s: float | None
    storing_s: float | None

    @property
    def tokens_per_s(self) -> float | None:
        """Expected; None where reading or computing is not known."""
        if self.reading_s is None or self.computing_s is None or self.storing_s is None:
            return None
        shorter, longer = sorted((self.reading_s, self.computing_s + self.storing_s))
        return 1.0 / (longer + EXPOSED * shorter)

    @property
    def bound_per_s(self) -> float | None:
        """What full overlap of reading and computing would reach."""
        if self.reading_s is None or self.computing_s is None:
            return None
        return 1.0 / max(self.reading_s, self.computing_s)


class BudgetTooSmall(UserError):
    """A memory budget within which not even one token can be computed."""


def has_budget(model: Model) -> bool:
    """Whether the model has routed experts, and its target reads them as tokens select them."""
    return model.architecture.experts is not None and "memory_mb" in type(model.options).model_fields


def least_experts(model: Model, device: Device | None = None) -> int:
    """Experts of all layers that must be in memory: those of one token, or one for each thread if these are more.

    Threads are those of the target's options, else those that the device's file assumes.
    """
    moe = model.architecture.experts
    if moe is None:
        return 0
    threads = getattr(model.options, "threads", None) or (1 if device is None else device.cores.threads)
    return min(max(moe.layers * moe.top_k, threads), moe.layers * moe.experts)


def apart(model: Model, device: Device | None = None) -> int:
    """Bytes of routed experts that need not be in memory: all but the `least_experts`."""
    moe = model.architecture.experts
    if moe is None:
        return 0
    stored = sum(model.stored(w) for w in model.architecture.weights if w.role == "expert")
    return stored - least_experts(model, device) * (stored // (moe.layers * moe.experts))


def streamed(
    model: Model, budget: int, context: int, *, device: Device | None, rates: Rates | None, hits: float | None = None
) -> Streamed:
    """A plan for `budget` bytes. `hits`: the measured share.

    UserError: the model has no routed experts, or its target no budget. BudgetTooSmall: less than one token needs.
    """
    moe, name = model.architecture.experts, model.architecture.name
    if moe is None:
        what, remedy = "a memory budget needs routed experts, and the model has none", "leave the budget out"
        raise UserError(what, place=name, remedy=remedy)
    if not has_budget(model):
        what = f"the target {model.footprint.target} has no memory budget"
        raise UserError(what, place=name, remedy="leave --memory-mb out, or choose --target xnnpack")
    stored = sum(model.stored(w) for w in model.architecture.weights if w.role == "expert")
    count = moe.layers * moe.experts
    expert = stored // count
    peak = memory(model, context).peak
    fixed, least = peak - stored, peak - apart(model, device)
    if budget < least:
        needed = least_experts(model, device)
        whose = "of one token" if needed == moe.layers * moe.top_k else "that a token or the threads need"
        raise BudgetTooSmall(
            f"a memory budget of {budget // 1_000_000} MB is less than {-(-least // 1_000_000)} MB: "
            f"{-(-fixed // 1_000_000)} for all but the routed experts, and the {needed} experts {whose}",
            place=name,
            remedy="give a larger one, or a shorter context",
        )
    held = min(count, (budget - fixed) // expert)
    share = held / count if hits is None else hits
    read = (1.0 - share) * moe.layers * moe.top_k * expert
    reading = computing = storing = None
    if device is not None:
        step = decode(model, device, rates, context - 1)
        computing = step.expected_s or step.roofline_s
        storing = read / (device.dram_gb_per_s.number * 1e9)
        if device.storage_gb_per_s is not None:
            reading = read / (device.storage_gb_per_s.number * 1e9)
    return Streamed(budget, least, count, held, expert, share, hits is not None, read, reading, computing, storing)
