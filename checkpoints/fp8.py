"""FP8 weights with scales, as DeepSeek and Qwen3 are released: no kernel of ours multiplies them, so that their values
are read, and only where a spec says so.

    X.weight F8_E4M3 [.., N, K], X.weight_scale_inv [.., N/128, K/128]     w = code * scale of its block

Scales of whole rows [N, 1], of a row's groups [N, G] or of the whole weight ([1] or []) are read as well
(X.weight_scale). Stacked experts are called X and X_scale_inv. How large a block is, config.json says: the last ones of
a weight may be cut, so that the number of scales does not tell.

N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.checkpoints.coded import CodedEntry, unlike
from moec.checkpoints.safetensors_file import FLOATS, TYPES, Entry, shown
from moec.compiler.errors import CheckpointError
from moec.compiler.quant import QuantizedTensor
from moec.compiler.weights import CodeFormat

NAME = "FP8"
FP8_TYPES = ("F8_E4M3", "F8_E5M2")
_SCALES = (*FLOATS, "F8_E8M0")
_BLOCK = [128, 128]  # of a quantization_config that does not say, as transformers reads it


@dataclass(frozen=True)
class Fp8Entry(CodedEntry):
    """`kept`: the tensor of the codes. block: rows and columns to a scale."""

    kept: Entry
    scales: Entry
    block: tuple[int, int]

    @property
    def beside(self) -> tuple[Entry, ...]:
        return (self.scales,)

    @property
    def format(self) -> CodeFormat | None:
        return None

    @property
    def reason(self) -> str:
        return "there are no kernels for FP8"

    def codes(self) -> QuantizedTensor:
        raise AssertionError("FP8 has no codes of ours")

    def tensor(self) -> Tensor:
        values = self.kept.tensor().to(torch.float32)
        scales = self.scales.tensor().to(torch.float32)
        if scales.dim() < 2:
            return values.mul_(scales.reshape(-1)[0])
        rows, columns = (torch.arange(n) // b for n, b in zip(self.shape[-2:], self.block, strict=True))
        return values.mul_(scales[..., rows, :][..., columns])


def with_fp8(entries: Mapping[str, Entry], section: Mapping[str, Any], place: str) -> dict[str, Entry]:
    """`entries` with each FP8 weight that has scales beside it. CheckpointError for scales that do not fit."""
    given = section.get("weight_block_size", _BLOCK)
    blocks = () if given is None else (block_of(given, "weight_block_size", place),)
    found = dict(entries)
    for name, kept in entries.items():
        if kept.dtype not in FP8_TYPES:
            continue
        scale = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in entries), None)
        if scale is not None:
            with_scales(entries, found, NAME, kept, scale, blocks)
    return found


def block_of(given: Any, key: str, place: str) -> tuple[int, int]:
    """Rows and columns of a block as config.json gives them. CheckpointError for anything but two sizes."""
    if isinstance(given, list) and len(given) == 2 and all(type(n) is int and 0 < n < 1 << 30 for n in given):
        return given[0], given[1]
    raise CheckpointError(f"quantization_config: {key} has the impossible value {shown(given)}", place=place)


def with_scales(
    entries: Mapping[str, Entry],
    found: dict[str, Entry],
    kind: str,
    kept: Entry,
    scale: str,
    blocks: Collection[tuple[int, int]],
) -> None:
    """Put one weight of FP8 codes `kept` and scales `scale` into `found`, if they are there. `blocks`: the sizes that
    config.json names."""
    scales = entries.get(scale)
    if scales is None:
        return
    if len(kept.shape) < 2 or not all(kept.shape):
        raise unlike(kept, "codes in two dimensions or more")
    place = (kept.name, kind, kept.shape, kept.file, kept.begin, kept.end, kept.file_size)
    del found[scale]
    found[kept.name] = Fp8Entry(*place, kept, scales, _block(kept, scales, blocks))


def _block(kept: Entry, scales: Entry, blocks: Collection[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns to a scale: as config.json says, else those of scales that each row has for itself.

    CheckpointError where neither fits, or two of `blocks` do.
    """
    (outputs, inputs), shape = kept.shape[-2:], scales.shape
    if scales.dtype in _SCALES and scales.dtype in TYPES:
        if shape in ((), (1,)):
            return outputs, inputs
        if len(shape) == len(kept.shape) and shape[:-2] == kept.shape[:-2] and all(shape):
            fit = {
                (rows, columns)
                for rows, columns in blocks
                if shape[-2:] == (-(-outputs // rows), -(-inputs // columns))
            }
            if len({(min(rows, outputs), min(columns, inputs)) for rows, columns in fit}) == 1:
                return fit.pop()
            if not fit and shape[-2] == outputs and inputs % shape[-1] == 0:
                return 1, inputs // shape[-1]
            if not fit and shape[-2:] == (1, 1):
                return outputs, inputs
    sizes = " or ".join(f"{rows} x {columns}" for rows, columns in blocks)
    raise unlike(scales, f"floats, one for each block of {list(kept.shape)}" + (f", of {sizes}" if sizes else ""))
