"""Grids that codes are on: whole numbers of some bits, or the levels of a table, 16 or 8, that codes number.

A weight is scale * level. The levels of a table are INT8 values, so a weight in such a format has the same values as
INT8 codes, and integer kernels multiply it as they multiply those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_CHUNK = 1 << 20

LEVELS: dict[str, tuple[int, ...]] = {
    # of GGUF's IQ4_NL: denser around zero, as weights are; a quarter less squared error than whole numbers
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    # twice the values of E2M1 in the order of its codes (OCP Microscaling Formats 1.0, section 5.3.3)
    "fp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    # of three bits: of all with a range of at most 32, which AVX2 sums in 16 bits, those with the least squared error
    # on the weights of SmolLM2-135M, each group of 32 with its best scale; an eighth less than whole numbers have
    "nl3": (-16, -10, -6, -2, 1, 4, 8, 13),
}


@dataclass(frozen=True)
class Grid:
    """What codes stand for: whole numbers of `bits` bits in two's complement, or the levels of the table `levels`.

    bits: of a code as tensors hold it. Codes of tables are held in four, those of nl3, too; `packed_bits` are what the
    CPU kernels' layout takes. ValueError for a table that is not known, or with other bits than four.
    """

    bits: int
    levels: str = ""

    def __post_init__(self) -> None:
        if self.levels and (self.levels not in LEVELS or self.bits != 4):
            raise ValueError(f"no levels {self.levels!r} for codes of {self.bits} bits")

    def __str__(self) -> str:
        return self.levels or f"int{self.bits}"

    @property
    def packed_bits(self) -> int:
        """Bits of a code as CPU kernels read it: 3 where the table has no more than 8 levels."""
        return 3 if self.levels and len(LEVELS[self.levels]) <= 8 else self.bits

    @property
    def low(self) -> int:
        """The least value; none is larger in magnitude."""
        return min(LEVELS[self.levels]) if self.levels else -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest value."""
        return max(LEVELS[self.levels]) if self.levels else 2 ** (self.bits - 1) - 1

    @property
    def span(self) -> float:
        """Scales of the range that `rtn` gives to twice the largest magnitude of a group."""
        return 2.0 * -self.low if self.levels else 2.0**self.bits - 1

    def nearest_(self, x: Tensor) -> Tensor:
        """`x`, floats, each changed to the nearest value in place; whole numbers take the even one of two."""
        if not self.levels:
            return x.round_().clamp_(self.low, self.high)
        nearest, _ = _tables(self.levels)
        # the middle between two levels is a multiple of a half, so that the half in which x lies decides; fmin and fmax
        # take a NaN, too, into the range
        half = torch.fmax(torch.fmin(x, torch.tensor(float(self.high)), out=x), torch.tensor(float(self.low)), out=x)
        index = half.mul_(2).floor_().sub_(2 * self.low).to(torch.int32)
        return x.copy_(torch.index_select(nearest, 0, index.reshape(-1)).view(x.shape))

    def index(self, q: Tensor) -> Tensor:
        """The codes of values of the grid, int8 [...]; of two codes of one value the lower."""
        if not self.levels:
            return q
        return _looked_up(_tables(self.levels)[1], q, 128)

    def values(self, codes: Tensor) -> Tensor:
        """int8 values of codes 0..15 of a table. One of 8 levels repeats: kernels read three bits."""
        levels = LEVELS[self.levels]
        return _looked_up(torch.tensor(levels * (16 // len(levels)), dtype=torch.int8), codes)


def _looked_up(table: Tensor, index: Tensor, first: int = 0) -> Tensor:
    """table[index + first]; indices must be int32, so some are widened at a time."""
    result = torch.empty(index.shape, dtype=table.dtype)
    for out, part in zip(result.view(-1).split(_CHUNK), index.reshape(-1).split(_CHUNK), strict=True):
        torch.index_select(table, 0, part.int() + first, out=out)
    return result


@cache
def _tables(name: str) -> tuple[Tensor, Tensor]:
    """The nearest value in every half from the least value to the largest, and the code of each value from -128 on."""
    levels = LEVELS[name]
    values = torch.tensor(sorted(set(levels)), dtype=torch.float32)
    within = torch.arange(2 * min(levels), 2 * max(levels) + 1) / 2 + 0.25
    codes = torch.zeros(256, dtype=torch.int8)
    for value in set(levels):
        codes[value + 128] = levels.index(value)
    return values[(within.unsqueeze(-1) - values).abs().argmin(-1)], codes
