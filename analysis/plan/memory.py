"""Memory of a model while it runs: weights by role, KV cache, activations, runtime; and the peak by context.

The peak is an upper estimate of resident memory: all experts of a mixture are counted, since long real prompts come to
touch nearly all; `touched` gives the expectation for a shorter prompt. File-backed pages count, as in RSS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moec.compiler.architecture import Architecture, Cache, Weight
from moec.compiler.footprint import Footprint
from moec.compiler.spec.quantization import Quantization, WeightScheme
from moec.compiler.states import Codes


@dataclass(frozen=True)
class Model:
    """What is planned: a model, how it is stored, for which target."""

    architecture: Architecture
    quantization: Quantization | None
    footprint: Footprint
    options: Any

    def scheme(self, weight: Weight) -> WeightScheme | None:
        if self.quantization is None or weight.columns == 1:
            return None
        return self.quantization.scheme_of(weight.role, weight.name)

    def stored(self, weight: Weight) -> int:
        return self.footprint.weight_bytes(weight, self.scheme(weight), self.options)

    def copied(self, weight: Weight) -> int:
        return self.footprint.copied_bytes(weight, self.scheme(weight), self.options)

    def read_per_token(self, weight: Weight) -> float:
        """Stored bytes that one decoded token reads; a tied table is the head and read in full."""
        if weight.role == "embedding":
            return float(self.stored(weight)) if self.architecture.tied else self.stored(weight) / max(1, weight.rows)
        return self.stored(weight) * weight.touched / weight.count

    @property
    def cache_codes(self) -> Codes | None:
        return None if self.quantization is None else self.quantization.cache_codes

    def cache_bytes(self, positions: int) -> int:
        """KV cache of `positions` positions, all layers, and the states of fixed size. Windowed layers keep every
        position, as our caches do."""
        rows = sum(n * self._rows(c, positions) for c, n in self.architecture.alike)
        return rows + self.architecture.fixed_bytes

    def cache_read(self, position: int) -> int:
        """Bytes of keys and values that the token at `position` attends to, and of states, read and written."""
        rows = sum(n * self._rows(c, c.seen(position)) for c, n in self.architecture.alike)
        return rows + 2 * self.architecture.fixed_bytes

    def _rows(self, cache: Cache, positions: int) -> int:
        return self.footprint.cache_bytes(cache, self.cache_codes, positions)


@dataclass(frozen=True)
class RoleBytes:
    """Weights of one role: parameters, stored bytes, bytes that one decoded token reads."""

    role: str
    parameters: int
    format: str
    bytes: int
    per_token: float


@dataclass(frozen=True)
class Memory:
    """Bytes at one context. `weights` are file-backed pages, `copies` what the runtime keeps beside them."""

    context: int
    weights: int
    copies: int
    tables: int
    cache: int
    activations: int
    runtime: int

    @property
    def peak(self) -> int:
        return self.weights + self.copies + self.tables + self.cache + self.activations + self.runtime


def roles(model: Model) -> list[RoleBytes]:
    """Stored weights by role, largest first."""
    grouped: dict[str, list[Weight]] = {}
    for weight in model.architecture.weights:
        grouped.setdefault(weight.role, []).append(weight)
    found = [
        RoleBytes(
            role,
            sum(w.numel for w in weights if w.counted),
            _formats(model, weights),
            sum(model.stored(w) for w in weights),
            sum(model.read_per_token(w) for w in weights),
        )
        for role, weights in grouped.items()
    ]
    return sorted(found, key=lambda r: -r.bytes)


def _formats(model: Model, weights: Sequence[Weight]) -> str:
    """How the matrices of a role are stored; the one that holds most of them first, where there are several."""
    matrices = [w for w in weights if w.columns > 1] or weights
    sizes: Counter[str] = Counter()
    for weight in matrices:
        sizes[_format(model.scheme(weight))] += weight.numel
    return " and ".join(name for name, _ in sizes.most_common())


def _format(scheme: WeightScheme | None) -> str:
    return "fp32" if scheme is None else f"{scheme.weights}, groups of {scheme.group_size} along {scheme.axis}"


def weight_bytes(model: Model) -> int:
    """All stored weights."""
    return sum(model.stored(w) for w in model.architecture.weights)


def file_bytes(model: Model) -> int:
    """The program file: weights, tables of the whole context, graph."""
    a = model.architecture
    return weight_bytes(model) + model.footprint.constant_bytes(a, a.context) + model.footprint.program_bytes(a)


def memory(model: Model, context: int, *, tokens: int | None = None) -> Memory:
    """Resident memory once `context` positions are filled; calls hold up to `tokens` (default: the target's most)."""
    a, f = model.architecture, model.footprint
    call = min(tokens or f.chunk(model.options), f.chunk(model.options), context)
    return Memory(
        context=context,
        weights=weight_bytes(model),
        copies=sum(model.copied(w) for w in a.weights),
        tables=f.constant_bytes(a, context) + f.program_bytes(a),
        cache=model.cache_bytes(context),
        activations=f.activation_bytes(a, call, model.options),
        runtime=f.runtime_bytes(),
    )


def expert_bytes_touched(model: Model, tokens: int) -> float:
    """Stored bytes of routed experts that `tokens` tokens are expected to touch, were routing uniform."""
    moe = model.architecture.experts
    if moe is None:
        return 0.0
    stored = sum(model.stored(w) for w in model.architecture.weights if w.role == "expert")
    return stored * moe.touched(tokens) / moe.experts


def longest_context(model: Model, budget: int, apart: int = 0) -> int:
    """The most positions, up to the model's own context, whose peak less `apart` is within `budget` bytes; 0 if none.

    apart: bytes of the peak that need not be in memory.
    """
    low, high = 0, model.architecture.context
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if memory(model, middle).peak - apart <= budget else (low, middle - 1)
    return low
