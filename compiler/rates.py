"""Speeds of kernels on a device, as a plan adds them up: those of our own from what a device file measured.

A device without measurements is given the reference machine's fractions of its own peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.compiler.spec.device import Device, KernelRates

#: Compute peak of float activations over INT8: FP32 lanes are a quarter as many and FMA counts two operations.
FP32_OVER_INT8 = 0.25
#: What recurrences reached on a machine with AVX2, for device files without a measurement: a share of DRAM bandwidth at
#: one token, where each element of a state is read and written, and of the float peak in a prompt.
STATE_DRAM, STATE_PEAK = 0.47, 0.33


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
    state_decode: float  # operations/s of recurrences, three multiply-accumulates of an element of a state and token
    state_prefill: float
    instruction: float
    last_cache: float


def cpu_peak(device: Device, *, integer: bool) -> float:
    """Operations per second of the assumed threads, INT8 or float as activations are."""
    peak = device.int8_gop_per_s.number * 1e9 * device.cores.threads
    return peak if integer else peak * FP32_OVER_INT8


def kernel_rates(device: Device, reference: Device | None) -> Rates | None:
    """What our CPU kernels reach on `device`; None without measurements there or on `reference`."""
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
        state_decode=(
            STATE_DRAM * device.dram_gb_per_s.number * 1e9 * 6 / 8  # six operations on four bytes, moved twice
            if k.state_decode_gop_per_s is None
            else k.state_decode_gop_per_s.number * 1e9 * memory
        ),
        state_prefill=(
            STATE_PEAK * cpu_peak(device, integer=False)
            if k.state_prefill_gop_per_s is None
            else k.state_prefill_gop_per_s.number * 1e9 * compute
        ),
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
