"""Tokens per second: what the device's peaks allow (roofline), and what our kernels are expected to reach.

Roofline of a step: max(bytes / DRAM bandwidth, operations / peak), Williams et al. 2009; nothing is faster.
Expected, where kernels were measured (`KernelRates`): the sum over kernels of bytes / rate for one token, operations /
rate for a prompt, plus a fixed time for each instruction of the program. A device without measurements is given the
reference machine's fractions of its own peaks; for Metal there are none, so there is no expectation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moec.analysis.plan.memory import Model
from moec.compiler.architecture import Weight
from moec.compiler.spec.device import Device, KernelRates

#: A model whose weights of one token take less than this share of the last cache finds them there at the next token.
CACHED_SHARE = 0.5
#: Compute peak of float activations over INT8: FP32 lanes are a quarter as many and FMA counts two operations.
FP32_OVER_INT8 = 0.25


@dataclass(frozen=True)
class Rates:
    """Rates of one device in bytes/s, operations/s and seconds; `basis` says what they rest on, for people."""

    basis: str
    weights: dict[str, float]  # kind -> bytes/s at one token, from DRAM
    cached: dict[str, float]  # kind -> bytes/s at one token, from the last cache
    prefill: dict[str, float]  # kind -> operations/s
    attention_decode: float  # operations/s of heads of 64, 4 a key/value head
    attention_cached: float
    attention_row: float  # seconds of one key/value row apart from its operations, from a cache
    attention_operation: float  # seconds of one operation, from a cache
    attention_prefill: float
    instruction: float
    last_cache: float


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


def rates_of(device: Device, target: str, reference: Device | None) -> Rates | None:
    """What our kernels reach on `device`; None where nothing can be said (Metal, or no reference installed)."""
    if target != "xnnpack":
        return None
    if device.kernels is not None:
        return _measured(device, device.kernels, 1.0, 1.0, f"kernels measured on {device.name}")
    if reference is None or reference.kernels is None:
        return None
    memory = device.dram_gb_per_s.number / reference.dram_gb_per_s.number
    peak = reference.int8_gop_per_s.number * reference.kernels.threads
    compute = device.int8_gop_per_s.number * device.cores.threads / peak
    basis = f"not measured: the shares of its peaks that our kernels reach on {reference.name}"
    return _measured(device, reference.kernels, memory, compute, basis)


def _measured(device: Device, k: KernelRates, memory: float, compute: float, basis: str) -> Rates:
    def table(what: str, unit: str, factor: float) -> dict[str, float]:
        kinds = ("dense", "experts_in", "experts_out")
        return {kind: getattr(k, f"{kind}_{what}_{unit}").number * 1e9 * factor for kind in kinds}

    row, operation = _attention_costs(k)
    return Rates(
        basis=basis,
        weights=table("stream", "gb_per_s", memory),
        cached=table("cached", "gb_per_s", compute),
        prefill=table("prefill", "gop_per_s", compute),
        attention_decode=k.attention_decode_gop_per_s.number * 1e9 * compute,
        attention_cached=k.attention_cached_gop_per_s.number * 1e9 * compute,
        attention_row=row / compute,
        attention_operation=operation / compute,
        attention_prefill=k.attention_prefill_gop_per_s.number * 1e9 * compute,
        instruction=k.instruction_us.number * 1e-6 / min(1.0, compute),
        last_cache=device.last_cache_mb.number * 1e6 if device.last_cache_mb else 0.0,
    )


def _attention_costs(k: KernelRates) -> tuple[float, float]:
    """Seconds of a key/value row and of an operation, from two shapes: 4 heads of 64 on a row, and 2 of 32.

    A row of the first is 4 * 4 * 64 operations, of the second 4 * 2 * 32; the rest is the row's own.
    """
    wide, narrow = 1024.0, 256.0
    t_wide = wide / (k.attention_cached_gop_per_s.number * 1e9)
    t_narrow = min(narrow / (k.attention_narrow_gop_per_s.number * 1e9), t_wide)
    operation = (t_wide - t_narrow) / (wide - narrow)
    row = t_narrow - narrow * operation
    # noise can put the line below the origin: then all is operations
    return (row, operation) if row >= 0 else (0.0, t_wide / wide)


def peak_operations(model: Model, device: Device) -> float:
    """Operations per second: of the GPU for Metal, else of the assumed threads, INT8 or float as activations are."""
    if model.footprint.target == "metal":
        assert device.gpu_fp16_gflop_per_s is not None
        return device.gpu_fp16_gflop_per_s.number * 1e9
    peak = device.int8_gop_per_s.number * 1e9 * device.cores.threads
    integer = model.quantization is not None and model.quantization.int8_activations
    return peak if integer else peak * FP32_OVER_INT8


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
    reading = model.cache_read(position) / table["dense"]
    rows = sum(c.kv_heads * c.seen(position) for c in a.caches)
    attending = rows * rates.attention_row + 2 * (a.attention_macs(position) + a.call_macs) * rates.attention_operation
    if not hot:  # from DRAM, slower by what the measured shape was
        attending *= max(1.0, rates.attention_cached / rates.attention_decode)
    yield "attention over the cache", max(reading, attending)
    yield "instructions", model.footprint.instructions(a) * rates.instruction


def prefill(model: Model, device: Device, rates: Rates | None, tokens: int) -> Step:
    """A prompt of `tokens` tokens from an empty cache, in chunks as long as the target takes."""
    a = model.architecture
    chunk = min(tokens, model.footprint.chunk(model.options))
    chunks = -(-tokens // chunk)
    moved = chunks * sum(_read_by_chunk(model, w, chunk) for w in a.weights) + model.cache_bytes(tokens)
    parts = {} if rates is None else dict(_prefill_parts(model, rates, tokens, chunk, chunks))
    flops = a.prefill_flops(tokens) + 2 * (chunks - 1) * a.call_macs
    return _step(model, device, tokens, 0, flops, moved, parts)


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
    pairs = sum(model.architecture.attention_macs(p) for p in range(tokens)) + chunks * model.architecture.call_macs
    yield "attention over the cache", 2 * pairs / rates.attention_prefill
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
