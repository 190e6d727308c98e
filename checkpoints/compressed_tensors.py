"""Checkpoints of compressed-tensors (llm-compressor): integer codes packed into words, or one byte each, and FP8.

    pack-quantized      X.weight_packed int32 [N, ceil(K*b/32)], X.weight_shape [2], X.weight_scale [N, G]
    int-quantized       X.weight int8 [N, K], X.weight_scale [N, G]            (naive-quantized likewise)
    float-quantized     X.weight FP8 [N, K], X.weight_scale: see `fp8.py`

Packed codes are unsigned (code + 2^(b-1)), the lowest bits first. A zero point beside them (X.weight_zero_point) is
int8 [N, G], or packed along N: int32 [ceil(N*b/32), G]. X.weight_g_idx has the group of each input where they were
ordered. Bits, group size and zero points are read off the tensors, so that modules may have settings of their own.

N outputs, K inputs, G groups of a row, b bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.checkpoints.coded import Grouped, IntEntry, lacking, unlike, unpacked
from moec.checkpoints.fp8 import FP8_TYPES, block_of, with_scales
from moec.checkpoints.safetensors_file import Entry, shown
from moec.compiler.errors import CheckpointError

NAME = "compressed-tensors"
_FORMATS = {"pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision", "dense"}
_BITS = (2, 4, 8)
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class CompressedEntry(IntEntry):
    """`kept`: the tensor of the codes. zeros: None where all are 0."""

    kept: Entry
    scales: Entry
    zeros: Entry | None
    others: tuple[Entry, ...]  # weight_shape, weight_g_idx, zero points that are all 0

    @property
    def beside(self) -> tuple[Entry, ...]:
        return (self.scales, *(() if self.zeros is None else (self.zeros,)), *self.others)

    def read(self) -> Grouped:
        outputs, inputs = self.shape
        codes_NK = self.kept.tensor()
        if self.kept.dtype == "I32":
            codes_NK = unpacked(codes_NK, self.bits)[:, :inputs].contiguous()
        groups = inputs // self.group_size
        scales_NG = self.scales.tensor().reshape(-1, groups).expand(outputs, -1)
        zeros_NG = None if self.zeros is None else _zeros(self.zeros, self.bits, outputs, groups)
        g_idx = next((e for e in self.others if e.name.endswith("_g_idx")), None)
        group_K = None if g_idx is None or not self.act_order else _groups(g_idx, groups)
        return Grouped(codes_NK, scales_NG, zeros_NG, group_K)


def _zeros(entry: Entry, bits: int, outputs: int, groups: int) -> Tensor:
    """Zero points int8 [N, G], relative to the middle of the range."""
    held = entry.tensor()
    if entry.dtype == "I8":
        return held.reshape(-1, groups).expand(outputs, -1)
    return unpacked(held.t(), bits).t()[:outputs]


def _groups(entry: Entry, groups: int) -> Tensor:
    found_K = entry.tensor().long()
    if bool(((found_K < 0) | (found_K >= groups)).any()):
        raise unlike(entry, f"numbers of {groups} groups")
    return found_K


def with_compressed(entries: Mapping[str, Entry], section: Mapping[str, Any], place: str) -> dict[str, Entry]:
    """`entries` with each weight under its own name; as they are, if config.json names a format that is not read.

    CheckpointError for rotations that are computed as the model runs, and for tensors that do not fit.
    """
    if section.get("transform_config"):
        raise CheckpointError(
            "quantization_config has a transform_config: rotations computed as the model runs, which are not read",
            place=place,
            remedy="give the BF16, F16 or F32 checkpoint that it was made from",
        )
    if not _formats(section) <= _FORMATS or _is_sparse(section):
        return dict(entries)
    blocks = _blocks(section, place)
    found = dict(entries)
    for name, kept in entries.items():
        stem, _, end = name.rpartition(".")
        if (end == "weight_packed" and kept.dtype == "I32") or (end == "weight" and kept.dtype == "I8"):
            entry = _entry(entries, stem, kept)
            del found[name]
            for other in entry.beside:
                del found[other.name]
            found[entry.name] = entry
        elif end == "weight" and kept.dtype in FP8_TYPES:
            with_scales(entries, found, NAME, kept, f"{stem}.weight_scale", blocks)
    return found


def _blocks(section: Mapping[str, Any], place: str) -> set[tuple[int, int]]:
    """The blocks, rows and columns, in which groups of modules have scales; written [128, 128] or "128x128"."""
    groups = section.get("config_groups")
    found = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        given = weights.get("block_structure") if isinstance(weights, Mapping) else None
        if isinstance(given, str) and re.fullmatch(r"[0-9]{1,9} ?x ?[0-9]{1,9}", given):
            given = [int(size) for size in given.split("x")]
        if given is not None:
            found.add(block_of(given, "block_structure", place))
    return found


def _formats(section: Mapping[str, Any]) -> set[str]:
    groups = section.get("config_groups")
    held = [section, *(groups.values() if isinstance(groups, Mapping) else ())]
    return {str(part["format"]) for part in held if isinstance(part, Mapping) and part.get("format") is not None}


def _is_sparse(section: Mapping[str, Any]) -> bool:
    sparsity = section.get("sparsity_config")
    return isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense"


def _entry(entries: Mapping[str, Entry], stem: str, kept: Entry) -> CompressedEntry:
    scales = entries.get(f"{stem}.weight_scale")
    if scales is None:
        raise lacking(f"{stem}.weight_scale", kept)
    zeros, shape, g_idx = (entries.get(f"{stem}.weight_{part}") for part in ("zero_point", "shape", "g_idx"))
    if kept.dtype == "I32" and f"{stem}.weight" in entries:
        raise CheckpointError(
            f"holds both {shown(kept.name)} and {shown(stem)}.weight", place=str(kept.file), remedy="remove one of them"
        )
    outputs, inputs, bits = _sizes(kept, shape)
    groups = _checked_scales(scales, outputs, inputs)
    others = [part for part in (shape, g_idx) if part is not None]
    size = inputs // groups
    if g_idx is not None and (g_idx.shape != (inputs,) or g_idx.dtype not in ("I32", "I64")):
        raise unlike(g_idx, f"integers [{inputs}]")
    act_order = g_idx is not None and not torch.equal(_groups(g_idx, groups), torch.arange(inputs) // size)
    if zeros is not None:
        is_bytes = zeros.dtype == "I8" and zeros.shape in ((outputs, groups), scales.shape)
        if not is_bytes and (zeros.dtype, zeros.shape) != ("I32", (-(-outputs * bits // 32), groups)):
            raise unlike(zeros, f"int8 [{outputs}, {groups}], or those packed")
        if not bool(_zeros(zeros, bits, outputs, groups).any()):
            others.append(zeros)
            zeros = None
    return CompressedEntry(
        f"{stem}.weight", NAME, (outputs, inputs), kept.file, kept.begin, kept.end, kept.file_size,
        bits, size, zeros is None, act_order, kept, scales, zeros, tuple(others),
    )  # fmt: skip


def _sizes(kept: Entry, shape: Entry | None) -> tuple[int, int, int]:
    """N, K and b of a tensor of codes; `shape` holds N and K where they are packed."""
    if len(kept.shape) != 2 or not all(kept.shape):
        raise unlike(kept, "codes in two dimensions")
    outputs, width = kept.shape
    if kept.dtype == "I8":
        return outputs, width, 8
    if shape is None:
        raise lacking(kept.name.removesuffix("packed") + "shape", kept)
    if shape.dtype not in ("I32", "I64") or shape.shape != (2,):
        raise unlike(shape, "two integers")
    rows, inputs = (int(extent) for extent in shape.tensor())
    bits = next((b for b in _BITS if inputs > 0 and -(-inputs * b // 32) == width), None)
    if rows != outputs or bits is None:
        raise CheckpointError(
            f"tensor {shown(kept.name)} has {width} words in each of {outputs} rows, which are not codes of 2, 4 or 8 "
            f"bits of a weight [{rows}, {inputs}]",
            place=str(kept.file),
            remedy="give the BF16, F16 or F32 checkpoint that it was made from",
        )
    return outputs, inputs, bits


def _checked_scales(scales: Entry, outputs: int, inputs: int) -> int:
    """G of scales [N, G], or of one for all, [1] or []."""
    if scales.dtype in _SCALES and scales.shape in ((), (1,), (1, 1)):
        return 1
    if scales.dtype in _SCALES and len(scales.shape) == 2 and scales.shape[0] == outputs:
        groups = scales.shape[1]
        if groups and inputs % groups == 0:
            return groups
    raise unlike(scales, f"floats [{outputs}, groups of {inputs} inputs]")
