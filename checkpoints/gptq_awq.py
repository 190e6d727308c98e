"""GPTQ and AWQ checkpoints: the codes of a linear [N, K] in words of 32 bits, with zero points and scales beside them.

    GPTQ    X.qweight int32 [K*b/32, N], X.qzeros int32 [G, N*b/32], X.scales [G, N], X.g_idx int32 [K]
    AWQ     X.qweight int32 [K, N*b/32], X.qzeros int32 [G, N*b/32], X.scales [G, N]

GPTQ packs consecutive inputs, the lowest bits first, and its first format (`checkpoint_format: gptq`) stores zero
points less one; g_idx has the group of each input. AWQ (version gemm) packs 8 outputs in the order 0 2 4 6 1 3 5 7.

N outputs, K inputs, G groups of a column, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moec.checkpoints.coded import Grouped, IntEntry, lacking, unlike, unpacked
from moec.checkpoints.safetensors_file import Entry, shown
from moec.compiler.errors import CheckpointError

GPTQ, AWQ = "GPTQ", "AWQ"
_BITS = (2, 4, 8)
_SCALES = ("F16", "BF16", "F32")
_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where a word of AWQ has output i of its 8


@dataclass(frozen=True)
class _Beside:
    """The tensors of one weight."""

    qweight: Entry
    qzeros: Entry
    scales: Entry
    g_idx: Entry | None


@dataclass(frozen=True)
class GptqEntry(IntEntry):
    """`stored_less`: what zero points are stored less of."""

    parts: _Beside
    stored_less: int

    @property
    def beside(self) -> tuple[Entry, ...]:
        return _beside(self.parts)

    def read(self) -> Grouped:
        codes_NK = unpacked(self.parts.qweight.tensor().t(), self.bits)
        zeros_NG = _read_zeros(self, self.parts, self.stored_less)
        return Grouped(codes_NK, self.parts.scales.tensor().t(), zeros_NG, self.groups())

    def groups(self) -> Tensor | None:
        """The group of each input, where it is not its place by the group size. CheckpointError if there is no such."""
        if self.parts.g_idx is None:
            return None
        found_K = self.parts.g_idx.tensor()
        if bool(((found_K < 0) | (found_K >= self.parts.scales.shape[0])).any()):
            raise unlike(self.parts.g_idx, f"numbers of {self.parts.scales.shape[0]} groups")
        usual_K = torch.arange(self.shape[-1]) // self.group_size
        return None if torch.equal(found_K, usual_K.to(found_K.dtype)) else found_K.long()


@dataclass(frozen=True)
class AwqEntry(IntEntry):
    parts: _Beside

    @property
    def beside(self) -> tuple[Entry, ...]:
        return _beside(self.parts)

    def read(self) -> Grouped:
        codes_NK = _outputs_in_order(unpacked(self.parts.qweight.tensor(), self.bits)).t()
        zeros_GN = _outputs_in_order(unpacked(self.parts.qzeros.tensor(), self.bits))
        zeros_NG = _checked_zeros(self, zeros_GN.t())
        return Grouped(codes_NK.contiguous(), self.parts.scales.tensor().t(), zeros_NG)


def _beside(parts: _Beside) -> tuple[Entry, ...]:
    return (parts.qzeros, parts.scales, *(() if parts.g_idx is None else (parts.g_idx,)))


def _outputs_in_order(codes: Tensor) -> Tensor:
    return codes.unflatten(-1, (-1, 8))[..., _PLACES].flatten(-2)


def _read_zeros(entry: GptqEntry, parts: _Beside, less: int) -> Tensor | None:
    stored_NG = unpacked(parts.qzeros.tensor(), entry.bits).t()
    if less and bool((stored_NG == 2 ** (entry.bits - 1) - 1).any()):
        raise CheckpointError(
            f"tensor {shown(parts.qzeros.name)} holds a zero point of {2**entry.bits - 1} less 1, which readers of the "
            "format gptq take for 0 or for one more than a code has",
            place=str(entry.file),
            remedy="give a checkpoint of the format gptq_v2, or the BF16 one that it was made from",
        )
    return _checked_zeros(entry, stored_NG + less)


def _checked_zeros(entry: IntEntry, zeros_NG: Tensor) -> Tensor | None:
    """Zero points, or None where config.json says that there are none: then each must be the middle of the range."""
    if not entry.symmetric:
        return zeros_NG
    if bool((zeros_NG != 0).any()):
        raise CheckpointError(
            f"tensor {shown(entry.name)} has zero points, config.json says that its {entry.dtype} codes are symmetric",
            place=str(entry.file),
            remedy="correct `sym` (or `zero_point`) of its quantization_config",
        )
    return None


def with_gptq(entries: Mapping[str, Entry], section: Mapping[str, Any], place: str) -> dict[str, Entry]:
    """`entries` with each weight of GPTQ under its own name. CheckpointError for what is not read, or does not fit."""
    form = str(section.get("checkpoint_format") or section.get("format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"its {GPTQ} codes lie as {shown(form)}, not as gptq or gptq_v2", place=place)
    size, symmetric = _group_size(section, place), section.get("sym", True) is not False
    act_order = section.get("desc_act") is True
    found = dict(entries)
    for stem, parts in _parts_of(entries, found, has_groups=True):
        outputs, bits = _outputs_and_bits(parts)
        inputs = parts.qweight.shape[0] * 32 // bits
        if parts.qweight.shape[1] != outputs:
            raise unlike(parts.qweight, f"int32 [.., {outputs}]")
        if parts.g_idx is not None and (parts.g_idx.dtype, parts.g_idx.shape) != ("I32", (inputs,)):
            raise unlike(parts.g_idx, f"I32 [{inputs}]")
        own = _own_size(size, parts, inputs)
        where = _where(stem, GPTQ, (outputs, inputs), parts.qweight)
        entry = GptqEntry(
            **where,
            bits=bits,
            group_size=own,
            symmetric=symmetric,
            act_order=False,
            parts=parts,
            stored_less=int(form == "gptq"),
        )
        found[entry.name] = replace(entry, act_order=act_order and entry.groups() is not None)
    return found


def with_awq(entries: Mapping[str, Entry], section: Mapping[str, Any], place: str) -> dict[str, Entry]:
    """`entries` with each weight of AWQ under its own name. CheckpointError for what is not read, or does not fit."""
    form = str(section.get("version") or section.get("format") or "gemm").lower()
    if form != "gemm":
        raise CheckpointError(f"its {AWQ} codes lie as {shown(form)}, not as gemm", place=place)
    size, symmetric = _group_size(section, place), section.get("zero_point", True) is False
    found = dict(entries)
    for stem, parts in _parts_of(entries, found, has_groups=False):
        outputs, bits = _outputs_and_bits(parts)
        inputs = parts.qweight.shape[0]
        if bits != 4:
            raise CheckpointError(f"tensor {shown(parts.qweight.name)} has {bits} bits, {AWQ} has 4", place=place)
        if parts.qweight.shape[1] * 8 != outputs:
            raise unlike(parts.qweight, f"int32 [.., {outputs // 8}]")
        own = _own_size(size, parts, inputs)
        where = _where(stem, AWQ, (outputs, inputs), parts.qweight)
        found[f"{stem}.weight"] = AwqEntry(
            **where, bits=bits, group_size=own, symmetric=symmetric, act_order=False, parts=parts
        )
    return found


def _where(stem: str, kind: str, shape: tuple[int, int], codes: Entry) -> dict[str, Any]:
    """The fields that every Entry has."""
    place = {"file": codes.file, "begin": codes.begin, "end": codes.end, "file_size": codes.file_size}
    return {"name": f"{stem}.weight", "dtype": kind, "shape": shape, **place}


def _parts_of(entries: Mapping[str, Entry], found: dict[str, Entry], *, has_groups: bool) -> list[tuple[str, _Beside]]:
    """The tensors of each weight, taken out of `found`, by the name of its module."""
    parts = []
    for name, qweight in entries.items():
        stem = name.removesuffix(".qweight")
        if stem == name:
            continue
        beside = {end: entries.get(f"{stem}.{end}") for end in ("qzeros", "scales", "g_idx")}
        qzeros, scales = beside["qzeros"], beside["scales"]
        if qzeros is None or scales is None:
            raise lacking(f"{stem}.{'qzeros' if qzeros is None else 'scales'}", qweight)
        if f"{stem}.weight" in entries:
            raise CheckpointError(
                f"holds both {shown(name)} and {shown(stem)}.weight",
                place=str(qweight.file),
                remedy="remove one of them",
            )
        g_idx = beside["g_idx"] if has_groups else None
        for part in (qweight, qzeros, scales, g_idx):
            if part is not None:
                del found[part.name]
        parts.append((stem, _Beside(qweight, qzeros, scales, g_idx)))
    return parts


def _outputs_and_bits(parts: _Beside) -> tuple[int, int]:
    """N and b, which the shapes of scales [G, N] and zero points [G, N*b/32] tell. CheckpointError if they do not."""
    for part in (parts.qweight, parts.qzeros):
        if part.dtype != "I32" or len(part.shape) != 2 or not all(part.shape):
            raise unlike(part, "int32 words in two dimensions")
    scales = parts.scales
    if scales.dtype not in _SCALES or len(scales.shape) != 2 or not all(scales.shape):
        raise unlike(scales, "floats [groups, outputs]")
    groups, outputs = scales.shape
    words = parts.qzeros.shape[1]
    bits = words * 32 // outputs
    if parts.qzeros.shape[0] != groups or bits not in _BITS or words * 32 != outputs * bits:
        known = ", ".join(f"{groups} x {outputs * b // 32}" for b in _BITS)
        raise unlike(parts.qzeros, f"the zero points of 2, 4 or 8 bits: {known}")
    return outputs, bits


def _group_size(section: Mapping[str, Any], place: str) -> int:
    """Inputs to a scale, or -1 for all of them."""
    size = section.get("group_size", 128)
    if type(size) is not int or not (size == -1 or 0 < size < 1 << 30):
        raise CheckpointError(f"quantization_config.group_size: impossible value {shown(size)}", place=place)
    return size


def _own_size(size: int, parts: _Beside, inputs: int) -> int:
    """The group size of one weight, whose scales must be as many. CheckpointError if they are not."""
    groups = parts.scales.shape[0]
    own = inputs if size == -1 else size
    if -(-inputs // own) == groups:
        return own
    if parts.g_idx is not None and inputs % groups == 0:
        return inputs // groups  # of a weight with settings of its own; g_idx, which is compared, agrees or not
    raise unlike(parts.scales, f"{-(-inputs // own)} groups of {own} inputs")
