"""The plan of a MoE model within a memory budget: experts held, bytes read per token, and the speed bound.

The runtime reads routed experts when tokens select them (docs/memory-budget.md). The hit rate depends on routing and
cannot be told from a spec: without a measured one (`moec bench ARTIFACT --memory-mb N --json`) routing is taken to be
uniform, so that a cache with a share s of the experts has a hit rate of s. Trained routers repeat themselves and hit
more often.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.analysis.plan.memory import Model, memory
from moec.analysis.plan.roofline import decode
from moec.compiler.errors import UserError
from moec.compiler.rates import Rates
from moec.compiler.spec.device import Device


@dataclass(frozen=True)
class Streamed:
    """Bytes and seconds. experts: of all layers; held: how many the budget has room for. hits: the share of asked
    experts that are there, uniform unless it was `measured`. read: bytes of a decoded token. reading_s: at the
    device's storage rate, None without one; computing_s: with all in memory.
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

    @property
    def tokens_per_s(self) -> float | None:
        """The bound max(computing, reading), what full overlap reaches; None where one of them is not known."""
        if self.reading_s is None or self.computing_s is None:
            return None
        return 1.0 / max(self.reading_s, self.computing_s)


def streamed(
    model: Model, budget: int, context: int, *, device: Device | None, rates: Rates | None, hits: float | None = None
) -> Streamed:
    """A plan for `budget` bytes. `hits`: the measured share.

    UserError: the model has no routed experts, the target reads them all, or the budget is less than one token needs.
    """
    moe = model.architecture.experts
    if moe is None:
        raise UserError("a memory budget needs routed experts, and the model has none", remedy="leave --memory-mb out")
    if "memory_mb" not in type(model.options).model_fields:
        raise UserError("the target has no memory budget", remedy="leave --memory-mb out, or choose --target xnnpack")
    stored = sum(model.stored(w) for w in model.architecture.weights if w.role == "expert")
    count = moe.layers * moe.experts
    expert = stored // count
    fixed = memory(model, context).peak - stored
    least = fixed + moe.layers * moe.top_k * expert
    if budget < least:
        raise UserError(
            f"--memory-mb {budget // 1_000_000} is less than {-(-least // 1_000_000)}: {-(-fixed // 1_000_000)} MB for "
            f"all but the routed experts, and the {moe.layers * moe.top_k} experts of one token",
            remedy="give a larger one, or a shorter --context",
        )
    held = min(count, (budget - fixed) // expert)
    share = held / count if hits is None else hits
    read = (1.0 - share) * moe.layers * moe.top_k * expert
    reading = computing = None
    if device is not None:
        step = decode(model, device, rates, context - 1)
        computing = step.expected_s or step.roofline_s
        if device.storage_gb_per_s is not None:
            reading = read / (device.storage_gb_per_s.number * 1e9)
    return Streamed(budget, least, count, held, expert, share, hits is not None, read, reading, computing)
