"""A device as a spec: what a model may use there, and what each figure rests on.

A figure is a number with its source. `memory_budget_mb` (10^6 bytes) is what one app in the foreground may keep
resident; rates are for the whole device (`dram_gb_per_s`, `gpu_fp16_gflop_per_s`) or for one thread on a big core
(`int8_gop_per_s`, multiplies and adds counted apart). The files are in `specs/devices/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moec.compiler.instruction_sets import instruction_sets
from moec.compiler.spec.strict import Fault, Section, shown, suggestion
from moec.compiler.spec.targets import options_class, target_packages

Source = Annotated[str, Field(min_length=8, max_length=600)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, le=1e9)]


# The kernels' names (`neon` stands for dotprod as well), and one that they have no code for yet.
_CPU_ISAS = (*(s.name for s in instruction_sets()), "sme")


def isa_names() -> tuple[str, ...]:
    """What `isa:` may list: instruction sets of CPUs, and what targets add."""
    return (*_CPU_ISAS, *(name for target in target_packages() for name in options_class(target).device_isas))


def _isa_fault(raw: Any, loc: tuple[str | int, ...]) -> Iterator[Fault]:
    if isinstance(raw, str) and raw not in _CPU_ISAS and raw not in (known := isa_names()):
        yield Fault(loc, f"expected one of {', '.join(known)}, got {shown(raw)}")


def number_of(raw: Any, key: str) -> float | None:
    """`raw[key]` if that is a number; a raw value may be anything."""
    found = raw.get(key) if isinstance(raw, Mapping) else None
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


class Figure(Section):
    """A number and what it rests on. `low` and `high` are the spread of a measured figure."""

    number: PositiveFloat
    source: Source
    low: PositiveFloat | None = None
    high: PositiveFloat | None = None

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        number, low, high = (number_of(raw, key) for key in ("number", "low", "high"))
        if (low is None) != (high is None):
            yield Fault(("low" if low is None else "high",), "a spread has both ends: give low and high")
        if number is not None and low is not None and high is not None and not low <= number <= high:
            yield Fault(("number",), f"must lie in its spread, {shown(low)} to {shown(high)}; got {shown(number)}")

    @property
    def spread(self) -> tuple[float, float]:
        """The ends of the spread; the number twice when there is none."""
        return (self.low or self.number, self.high or self.number)


class Cores(Section):
    """Cores that a model's threads may run on. `threads` is what the planner assumes."""

    big: Annotated[int, Field(ge=1, le=1024)]
    little: Annotated[int, Field(ge=0, le=1024)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)]
    source: Source

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        big, little, threads = raw.get("big"), raw.get("little", 0), raw.get("threads")
        counted = [n for n in (big, little, threads) if type(n) is int and n >= 0]
        if len(counted) == 3 and threads > big + little:
            yield Fault(("threads",), f"must be at most big + little ({big + little}), got {shown(threads)}")


class KernelRates(Section):
    """Our kernels as `moec device measure` timed them there, all `threads` together.

    `dense` is a linear with groups along the input, `experts_in` and `experts_out` a routed block with groups along
    either dimension. `stream` is packed weights read from DRAM at one token, `cached` the same from the last cache,
    GB/s; `prefill` is at 128 tokens, GOP/s. `attention_decode` and `attention_cached`: one token over 2048 positions of
    INT8 keys and values, from DRAM and from a cache (`attention_narrow`: heads half as wide, two a key/value head);
    `attention_prefill`: 128 tokens. `state_decode` and `state_prefill`: the recurrence of 32 heads of 128 x 128 at one
    token, states from DRAM, and at 128; without them the shares of its peaks that another machine reached.
    `instruction_us`: one instruction of a program whose tensors are small, the fixed costs of its kernels included.
    """

    threads: Annotated[int, Field(ge=1, le=1024)]
    isa: str
    dense_stream_gb_per_s: Figure
    dense_cached_gb_per_s: Figure
    dense_prefill_gop_per_s: Figure
    experts_in_stream_gb_per_s: Figure
    experts_in_cached_gb_per_s: Figure
    experts_in_prefill_gop_per_s: Figure
    experts_out_stream_gb_per_s: Figure
    experts_out_cached_gb_per_s: Figure
    experts_out_prefill_gop_per_s: Figure
    attention_decode_gop_per_s: Figure
    attention_cached_gop_per_s: Figure
    attention_narrow_gop_per_s: Figure
    attention_prefill_gop_per_s: Figure
    state_decode_gop_per_s: Figure | None = None
    state_prefill_gop_per_s: Figure | None = None
    instruction_us: Figure

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        yield from _isa_fault(raw.get("isa"), ("isa",))


NAME = r"^[a-z0-9][a-z0-9.-]{0,63}$"


class Device(Section):
    """One device. `backend` is the target that a spec without `targets` would use there.

    `storage_gb_per_s`: reads past the page cache of about a megabyte at random places, several at once, as experts are
    read; `storage_sequential_gb_per_s`: of large blocks one after the other.
    """

    name: Annotated[str, Field(pattern=NAME)]
    title: Annotated[str, Field(min_length=1, max_length=120)]
    backend: str
    memory_budget_mb: Figure
    memory_total_mb: Figure
    cores: Cores
    isa: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    dram_gb_per_s: Figure
    int8_gop_per_s: Figure
    last_cache_mb: Figure | None = None
    storage_gb_per_s: Figure | None = None
    storage_sequential_gb_per_s: Figure | None = None
    gpu_fp16_gflop_per_s: Figure | None = None
    runtime_mb: Figure | None = None
    kernels: KernelRates | None = None

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        budget, total = (number_of(raw.get(key), "number") for key in ("memory_budget_mb", "memory_total_mb"))
        if budget is not None and total is not None and budget > total:
            yield Fault(
                ("memory_budget_mb", "number"), f"must be at most memory_total_mb ({shown(total)}), got {shown(budget)}"
            )
        for index, name in enumerate(isas if isinstance(isas := raw.get("isa"), (list, tuple)) else ()):
            yield from _isa_fault(name, ("isa", index))
        backend = raw.get("backend")
        if not isinstance(backend, str):
            return
        if backend not in target_packages():
            yield Fault(("backend",), f"unknown target {shown(backend)}" + suggestion(backend, target_packages()))
            return
        for key in options_class(backend).device_needs:
            if raw.get(key) is None:
                yield Fault((key,), f"a device whose backend is {backend} needs this key")

    @property
    def budget(self) -> int:
        """Bytes that the app may keep resident."""
        return round(self.memory_budget_mb.number * 1e6)


def device_files() -> dict[str, Path]:
    """The shipped devices by name. Like targets, a new one is a new file."""
    folder = Path(__file__).resolve().parent
    # a checkout has specs/ beside compiler/; an installed package too (moec/specs, moec/compiler)
    return {file.stem: file for file in sorted((folder.parent.parent / "specs" / "devices").glob("*.yaml"))}


def is_device_file(name: str) -> bool:
    """Whether a `device:` or --device names a file rather than a shipped device."""
    return "/" in name or name.endswith((".yaml", ".yml"))
