"""A weight that a safetensors checkpoint holds as codes in several tensors, read under the weight's own name and shape.

`CodedEntry` is what every format gives; `IntEntry` is an integer weight of any of them:

    w[n, k] = scale[n, k // g] * (q[n, k] - zero[n, k // g])          q of b bits, g inputs share a scale

Without zero points q is in -2^(b-1) .. 2^(b-1) - 1, which are codes of ours; with them q - zero needs a bit more, so
that 4 bits become INT8 codes of the same values. To be carried, scales must be float16 numbers, which bfloat16 ones
from 2^-17 to 65280 are.

N outputs, K inputs, G groups of a row, W words of 32 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moec.checkpoints.safetensors_file import Entry, shown
from moec.compiler.errors import CheckpointError
from moec.compiler.quant import QuantizedTensor, packed_codes, unpack_int4
from moec.compiler.weights import CodeFormat

_GROUPS = (256, 128, 64, 32)  # elements that share a scale in our kernels


@dataclass(frozen=True)
class CodedEntry(Entry):
    """A weight under its own name and logical shape; `dtype` is the name of its format, the bytes are of its codes."""

    transposed: ClassVar[bool] = False  # whether `codes` are transposed in the last two dimensions beside the weight
    same_codes: ClassVar[bool] = True  # whether `codes` are those of the file, not others of the same values

    @property
    @abstractmethod
    def beside(self) -> tuple[Entry, ...]:
        """The tensors that the weight is made of, beside its codes."""

    @property
    @abstractmethod
    def format(self) -> CodeFormat | None:
        """The format of ours that holds the values exactly; None where none does, `reason` says why."""

    @property
    def reason(self) -> str:
        return ""

    @abstractmethod
    def codes(self) -> QuantizedTensor:
        """Codes of `format` with the same values. CheckpointError for contents that have none."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The values, float32 of `shape`."""


@dataclass(frozen=True)
class Grouped:
    """An integer weight as it was read: codes and zero points int8, relative to the middle of their range."""

    codes_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor | None
    group_K: Tensor | None = None  # the group of each input, where it is not k // group_size


@dataclass(frozen=True)
class IntEntry(CodedEntry):
    """Integer codes of `bits`, `group_size` inputs to a scale (the last group of a row may be shorter)."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool  # inputs share scales in an order of their own

    @abstractmethod
    def read(self) -> Grouped:
        """The contents; CheckpointError where they contradict what config.json says of them."""

    @property
    def same_codes(self) -> bool:  # type: ignore[override]
        return self.symmetric and self.bits in (4, 8)

    @property
    def format(self) -> CodeFormat | None:
        needed = self.bits if self.symmetric else self.bits + 1
        group = next((g for g in _GROUPS if self.group_size % g == 0 and self.shape[-1] % g == 0), None)
        if needed > 8 or group is None or self.act_order:
            return None
        return CodeFormat(4 if needed <= 4 else 8, group)

    @property
    def reason(self) -> str:
        if self.act_order:
            return "its inputs share scales in the order of their activations (desc_act), not side by side"
        if self.bits == 8 and not self.symmetric:
            return "8 bits with zero points need 9"
        if self.format is None:
            return f"no group of {_GROUPS[-1]} to {_GROUPS[0]} inputs lies within its groups of {self.group_size}"
        return ""

    def codes(self) -> QuantizedTensor:
        wanted, found = self.format, self.read()
        assert wanted is not None
        codes_NK = found.codes_NK
        if found.group_K is not None:
            raise self._contradicts(
                "g_idx gives inputs scales in an order of their own, desc_act says that it does not"
            )
        if found.zeros_NG is not None:
            steps_NK = self._by_input(found.zeros_NG.to(torch.int16), None)
            codes_NK = (codes_NK.to(torch.int16) - steps_NK).to(torch.int8)
        scales_NG = self._held(found.scales_NG, codes_NK)
        groups = torch.arange(self.shape[-1] // wanted.group_size) * wanted.group_size // self.group_size
        scales_NG = scales_NG[:, groups]
        return QuantizedTensor(packed_codes(codes_NK, wanted.grid), scales_NG, wanted.bits, wanted.group_size)

    def tensor(self) -> Tensor:
        found = self.read()
        values_NK = found.codes_NK.float()
        if found.zeros_NG is not None:
            values_NK -= self._by_input(found.zeros_NG.float(), found.group_K)
        return values_NK.mul_(self._by_input(found.scales_NG.float(), found.group_K))

    def _by_input(self, of_groups_NG: Tensor, group_K: Tensor | None) -> Tensor:
        """[N, K] of what a group has."""
        if group_K is None:
            group_K = torch.arange(self.shape[-1]) // self.group_size
        return of_groups_NG[:, group_K]

    def _held(self, scales_NG: Tensor, codes_NK: Tensor) -> Tensor:
        """The scales in float16; CheckpointError for one that is no float16 number, unless all its codes are zero."""
        held = scales_NG.to(torch.float16)
        lost = (held.float() != scales_NG.float()) | ~torch.isfinite(held)
        if not bool(lost.any()):
            return held
        lost &= self._any_code(codes_NK, scales_NG.shape[-1])
        if bool(lost.any()):
            value = float(scales_NG[lost][0])
            raise CheckpointError(
                f"tensor {shown(self.name)} has a scale of {value:.6g} ({self.dtype}), which float16 does not hold",
                place=str(self.file),
                remedy=f"`dequantize: [{self.dtype}]` in the model's section, which rounds its values anew",
            )
        return torch.where(torch.isfinite(held), held, 0.0)

    def _any_code(self, codes_NK: Tensor, groups: int) -> Tensor:
        """Whether a group has a code that is not zero: bool [N, G]."""
        missing = groups * self.group_size - codes_NK.shape[-1]
        padded = torch.nn.functional.pad(codes_NK, (0, missing)) if missing else codes_NK
        return (padded.unflatten(-1, (groups, self.group_size)) != 0).any(-1)

    def _contradicts(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"tensor {shown(self.name)}: {what}", place=str(self.file), remedy="use the config.json of these files"
        )


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int8 codes [..., W * 32 / bits] of int32 words [..., W]: unsigned codes, the lowest bits first, less the middle
    of their range. `bits`: 2, 4 or 8."""
    # flat: a tensor of one column counts as contiguous with any stride, which no view of bytes accepts
    held = words.reshape(-1).view(torch.uint8).reshape(*words.shape[:-1], -1)
    if bits == 8:
        return (held ^ 0x80).view(torch.int8)
    if bits == 4:
        return unpack_int4(held ^ 0x88)  # the upper bit of an unsigned code, inverted, is the sign of code - 8
    return torch.stack([((held >> shift) & 3).to(torch.int8) - 2 for shift in (0, 2, 4, 6)], -1).flatten(-2)


def unlike(entry: Entry, wanted: str) -> CheckpointError:
    """The error for a tensor of a shape or type that its format does not have."""
    return CheckpointError(
        f"tensor {shown(entry.name)} is {entry.dtype} {list(entry.shape)}, expected {wanted}",
        place=str(entry.file),
        remedy="use the checkpoint as it was made, with its own config.json",
    )


def lacking(name: str, entry: Entry) -> CheckpointError:
    """The error for a tensor that belongs beside `entry` and is not there."""
    return CheckpointError(
        f"tensor {shown(name)} is missing, which {shown(entry.name)} needs",
        place=str(entry.file),
        remedy="use a complete checkpoint",
    )
