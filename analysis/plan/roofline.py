"""Tokens per second: what the device's peaks allow (roofline), and what our kernels are expected to reach.

Roofline of a step: max(bytes / DRAM bandwidth, operations / peak), Williams et al. 2009; nothing is faster.
Expected, where the target has rates for the device (`Footprint.rates`): the sum over kernels of bytes / rate for one
token, operations / rate for a prompt, plus a fixed time for each instruction of the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moec.analysis.plan.memory import Model
from moec.compiler.architecture import Architecture, Weight
from moec.compiler.rates import Rates
from moec.compiler.spec.device import Device

#: A model whose weights of one token take less than this share of the last cache finds them there at the next token.
CACHED_SHARE = 0.5


@dataclass(frozen=True)
class Step:
    """One decoded token at `position`, or a prompt of `tokens` tokens. Seconds; `parts`: expected time by kind."""

    tokens: int
    position: int
    flops: int
    bytes: float
    roofline_s: float
    bound: str  # memory or compute
    expected_s: float | None
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def roofline_tokens_per_s(self) -> float:
        return self.tokens / self.roofline_s

    @property
    def expected_tokens_per_s(self) -> float | None:
        return None if self.expected_s is None else self.tokens / self.expected_s


def peak_operations(model: Model, device: Device) -> float:
    """Operations per second that the target's hardware on `device` can do, for the model's activations."""
    integer = model.quantization is not None and model.quantization.int8_activations
    return model.footprint.peak(device, integer=integer)


def decode(model: Model, device: Device, rates: Rates | None, position: int) -> Step:
    """One token at `position` (from 0), earlier positions in the cache."""
    a = model.architecture
    read = sum(model.read_per_token(w) for w in a.weights)
    moved, flops = read + model.cache_read(position), a.flops(position)
    parts = {} if rates is None else dict(_decode_parts(model, rates, read, position))
    return _step(model, device, 1, position, flops, moved, parts)


def _decode_parts(model: Model, rates: Rates, read: float, position: int) -> Iterator[tuple[str, float]]:
    a = model.architecture
    hot = read <= CACHED_SHARE * rates.last_cache
    table = rates.cached if hot else rates.weights
    by_role: dict[str, float] = {}
    for weight in a.weights:
        seconds = model.read_per_token(weight) / table[_kind(model, weight)]
        by_role[weight.role] = by_role.get(weight.role, 0.0) + seconds
    yield from by_role.items()
    reading = (model.cache_read(position) - 2 * a.fixed_bytes) / table["dense"]
    rows = sum(n * c.kv_heads * c.seen(position) for c, n in a.alike)
    attending = rows * rates.attention_row + 2 * a.attention_macs(position) * rates.attention_operation
    if not hot:  # from DRAM, slower by what the measured shape was
        attending *= max(1.0, rates.attention_cached / rates.attention_decode)
    yield "attention over the cache", max(reading, attending)
    if a.fixed:
        yield "states", _state_seconds(a, rates)
    yield "instructions", model.footprint.instructions(a) * rates.instruction


def _state_seconds(a: Architecture, rates: Rates) -> float:
    """One token of all recurrences: as measured from DRAM; states that stay in the last cache move through that."""
    if a.fixed_bytes > CACHED_SHARE * rates.last_cache:
        return 2 * a.state_macs / rates.state_decode
    return 2 * a.state_macs / rates.state_prefill + 2 * a.fixed_bytes / rates.cached["dense"]


def prefill(model: Model, device: Device, rates: Rates | None, tokens: int) -> Step:
    """A prompt of `tokens` tokens from an empty cache, in chunks as long as the target takes."""
    a = model.architecture
    chunk = min(tokens, model.footprint.chunk(model.options))
    chunks = -(-tokens // chunk)
    moved = chunks * sum(_read_by_chunk(model, w, chunk) for w in a.weights) + model.cache_bytes(tokens)
    parts = {} if rates is None else dict(_prefill_parts(model, rates, tokens, chunk, chunks))
    return _step(model, device, tokens, 0, a.prefill_flops(tokens), moved, parts)


def _read_by_chunk(model: Model, weight: Weight, tokens: int) -> float:
    moe = model.architecture.experts
    if weight.role == "expert" and moe is not None:
        return model.stored(weight) * moe.touched(tokens) / moe.experts
    return model.read_per_token(weight)


def _prefill_parts(model: Model, rates: Rates, tokens: int, chunk: int, chunks: int) -> Iterator[tuple[str, float]]:
    """A kernel takes the longer of reading its weights once a chunk and its products."""
    by_role: dict[str, float] = {}
    for weight in model.architecture.weights:
        kind = _kind(model, weight)
        reading = chunks * _read_by_chunk(model, weight, chunk) / rates.weights[kind]
        rows = chunks if weight.role == "head" else tokens
        seconds = max(reading, 2 * weight.macs * rows / rates.prefill[kind])
        by_role[weight.role] = by_role.get(weight.role, 0.0) + seconds
    yield from by_role.items()
    pairs = sum(model.architecture.attention_macs(p) for p in range(tokens))
    yield "attention over the cache", 2 * pairs / rates.attention_prefill
    if model.architecture.fixed:
        yield "states", 2 * tokens * model.architecture.state_macs / rates.state_prefill
    yield "instructions", chunks * model.footprint.instructions(model.architecture) * rates.instruction


def _kind(model: Model, weight: Weight) -> str:
    if weight.role != "expert":
        return "dense"
    scheme = model.scheme(weight)
    return "experts_out" if scheme is not None and scheme.axis == "out" else "experts_in"


def _step(
    model: Model, device: Device, tokens: int, position: int, flops: int, moved: float, parts: dict[str, float]
) -> Step:
    memory = moved / (device.dram_gb_per_s.number * 1e9)
    compute = flops / peak_operations(model, device)
    expected = sum(parts.values()) if parts else None
    return Step(
        tokens,
        position,
        flops,
        moved,
        max(memory, compute),
        "memory" if memory >= compute else "compute",
        # a rate above the roofline would be a contradiction within the device file: never report it
        None if expected is None else max(expected, memory if _from_dram(model, device) else 0.0, compute),
        parts,
    )


def _from_dram(model: Model, device: Device) -> bool:
    read = sum(model.read_per_token(w) for w in model.architecture.weights)
    cache = device.last_cache_mb.number * 1e6 if device.last_cache_mb else 0.0
    return read > CACHED_SHARE * cache
