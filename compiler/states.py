"""What a model carries from one call to the next, declared as data: KV caches, windows, recurrent states.

A `State` says how its buffer is shaped as a function of the context, how it is stored, and how a call updates it.
Plans, manifests and targets take sizes from `State.tensors` and `State.bytes` only.

    keys of a layer             [1, positions, KV, d], appended at start_pos
    the same in INT8            ... `codes=PER_TOKEN_AND_HEAD`, or a finer `Codes.block`
    a sliding window            `Appended(axis, window=512)`; a rolling buffer has `Positions(most=512)`
    a short convolution         [1, channels, 3], `Shifted(axis=2)`: the last inputs
    SSM, delta rule             [1, heads, d, n], `Replaced("ssm")`: a function of the old content and the tokens
    one buffer for many layers  `readers` names the layers that read what `layer` writes

This file knows neither torch nor a target.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class Positions:
    """An extent that grows with the context: one entry a position, the last `most` of them where that is given."""

    most: int | None = None

    def at(self, context: int) -> int:
        return context if self.most is None else min(context, self.most)

    def __str__(self) -> str:
        return "positions" if self.most is None else f"positions<={self.most}"


Extent = int | Positions


@dataclass(frozen=True)
class Codes:
    """Symmetric integers: value = code * scale.

    `block`: how many elements along each axis share a scale, None for the whole axis. Keys [1, positions, KV, d] with
    (1, 1, 1, None) have a scale per position and head, with (1, 1, 1, 32) one per 32 elements of a head, and with
    (1, None, 1, None) one per head for all positions.
    """

    bits: int
    block: tuple[int | None, ...]
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or any(b is not None and b < 1 for b in self.block):
            raise ValueError(f"codes of {self.bits} bits in blocks of {self.block} are not possible")

    @property
    def dtype(self) -> str:
        """Of the buffer: two codes of four bits are a byte."""
        return "int8" if self.bits == 8 else "uint8"


PER_TOKEN_AND_HEAD = Codes(8, (1, 1, 1, None))


@dataclass(frozen=True)
class Appended:
    """The tokens of a call are written at start_pos, start_pos + 1, ... along `axis`; older content stays.

    `window` > 0: only the last so many positions are read. A call may begin anywhere up to the position reached.
    """

    axis: int
    window: int = 0

    def __str__(self) -> str:
        return f"appended along {self.axis}" + (f", window {self.window}" if self.window else "")


@dataclass(frozen=True)
class Shifted:
    """The last `shape[axis]` inputs: a call's tokens come in at the end, the oldest leave."""

    axis: int

    def __str__(self) -> str:
        return f"shifted along {self.axis}"


@dataclass(frozen=True)
class Replaced:
    """Every call replaces the whole content by a function of the old content and the tokens; `recurrence` names it."""

    recurrence: str = ""

    def __str__(self) -> str:
        return f"replaced by {self.recurrence}" if self.recurrence else "replaced"


Update = Appended | Shifted | Replaced


@dataclass(frozen=True)
class StateTensor:
    """One buffer that holds a state, or the scales of one."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class State:
    """`name`: its buffer. `dtype`: what it holds as a float, or without `codes` what is stored. `layer`: who writes it
    ("" if nobody said); `readers`: other layers that read it."""

    name: str
    shape: tuple[Extent, ...]
    update: Update
    dtype: str = "float32"
    codes: Codes | None = None
    layer: str = ""
    readers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise ValueError(f"{self.name}: there is no type {self.dtype!r}")
        axis = None if isinstance(self.update, Replaced) else self.update.axis
        if axis is not None and not 0 <= axis < len(self.shape):
            raise ValueError(f"{self.name}: axis {axis} of {len(self.shape)} dimensions")
        if self.codes is not None and len(self.codes.block) != len(self.shape):
            raise ValueError(f"{self.name}: blocks of {self.codes.block} do not fit {len(self.shape)} dimensions")

    @property
    def rewinds(self) -> bool:
        """Whether a call may begin at an earlier position than the last one reached: what was written is still there.

        Not for a recurrence, nor for a buffer that forgets.
        """
        rolling = any(isinstance(extent, Positions) and extent.most is not None for extent in self.shape)
        return isinstance(self.update, Appended) and not rolling

    @property
    def rows_are_positions(self) -> bool:
        """Whether row p along axis 1 of each of its buffers is what position p appended, and nothing else is there."""
        if not self.rewinds or len(self.shape) < 2 or self.shape[:2] != (1, Positions()):
            return False
        assert isinstance(self.update, Appended)
        return self.update.axis == 1 and (self.codes is None or self.codes.block[1] == 1)

    @property
    def grows(self) -> bool:
        """Whether its size depends on the context."""
        return any(isinstance(extent, Positions) for extent in self.shape)

    def shape_at(self, context: int) -> tuple[int, ...]:
        """Its shape for a context of so many positions."""
        return tuple(e.at(context) if isinstance(e, Positions) else e for e in self.shape)

    def tensors(self, context: int) -> tuple[StateTensor, ...]:
        """The buffers: the state, or its codes and their scales. Blocks of one element leave an axis as it is; an axis
        that one scale covers to its end is dropped when it is the last."""
        shape = self.shape_at(context)
        if self.codes is None:
            return (StateTensor(self.name, shape, self.dtype),)
        blocks = [size if b is None else b for size, b in zip(shape, self.codes.block, strict=True)]
        scales = tuple(-(-size // b) for size, b in zip(shape, blocks, strict=True))
        if self.codes.block[-1] is None:
            scales = scales[:-1]
        stored = (*shape[:-1], -(-shape[-1] * self.codes.bits // 8))  # two codes of four bits are a byte
        return (
            StateTensor(self.name, stored, self.codes.dtype),
            StateTensor(f"{self.name}_scale", scales, self.codes.scale_dtype),
        )

    def bytes(self, context: int) -> int:
        """Bytes of all its buffers for a context of so many positions."""
        return sum(t.bytes for t in self.tensors(context))


def key_value_states(
    layer: str,
    kv_heads: int,
    key_width: int,
    value_width: int,
    *,
    window: int = 0,
    dtype: str = "float32",
    codes: Codes | None = None,
) -> tuple[State, State]:
    """The KV cache of one attention layer: keys [1, positions, kv_heads, key_width], and values likewise."""
    update = Appended(axis=1, window=window)
    keys, values = (
        State(f"{layer}.{part}_cache" if layer else f"{part}_cache", (1, Positions(), kv_heads, width), update, dtype,
              codes, layer)
        for part, width in (("k", key_width), ("v", value_width))
    )  # fmt: skip
    return keys, values


def coded_type(states: Iterable[State]) -> str | None:
    """`int8`, `int4`: what the states that are held as codes are; None if none is."""
    return next((f"int{state.codes.bits}" for state in states if state.codes is not None), None)
