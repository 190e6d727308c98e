"""Experts that a safetensors checkpoint holds in MXFP4, as gpt-oss is released: FP4 codes with a power of two as the
scale of each 32.

    NAME_blocks uint8 [E, N, K/32, 16], NAME_scales uint8 [E, N, K/32]   ->   NAME [E, K, N]

A byte of a block holds two codes, the low nibble first. A code (E2M1) is one of +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, a
scale is 2^(byte - 127), or NaN for 255 (OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1). Codes are kept as they
are. They number levels of twice their values (`compiler/levels.py`: fp4), so that scales are 2^(byte - 128).

E experts, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moec.checkpoints.coded import CodedEntry
from moec.checkpoints.safetensors_file import Entry, shown
from moec.compiler.errors import CheckpointError
from moec.compiler.quant import QuantizedTensor
from moec.compiler.weights import CodeFormat

NAME = "MXFP4"
FORMAT = CodeFormat(4, 32, levels="fp4")
_SCALE_BIAS = 128  # one more than MXFP4's, since the codes are doubled
_SMALLEST, _LARGEST = -24, 15  # exponents of the powers of two that float16 represents
_FAMILIES = {"gpt_oss"}  # types with experts [E, K, N]: in others the blocks could be of the transpose


@dataclass(frozen=True)
class Mxfp4Entry(CodedEntry):
    """The blocks of a tensor under its own name and shape [E, K, N]; `scales` beside them."""

    transposed: ClassVar[bool] = True
    scales: Entry

    @property
    def beside(self) -> tuple[Entry, ...]:
        return (self.scales,)

    @property
    def format(self) -> CodeFormat | None:
        return FORMAT

    def codes(self) -> QuantizedTensor:
        """Codes [E, N, K/2] in groups of 32 along K, and scales [E, N, K/32].

        CheckpointError for a scale that float16 does not represent, unless all its codes are zero.
        """
        experts, inputs, outputs = self.shape
        codes = torch.empty((experts, outputs, inputs // 2), dtype=torch.uint8)
        scales = torch.empty((experts, outputs, inputs // FORMAT.group_size), dtype=torch.float16)
        for expert, (blocks, bytes_NG) in enumerate(zip(self._blocks().tensor(), self.scales.tensor(), strict=True)):
            scales[expert] = scales_of(bytes_NG, blocks, self.scales.name, str(self.file))
            codes[expert] = blocks.flatten(-2)
        return QuantizedTensor(codes, scales, FORMAT.bits, FORMAT.group_size, levels=FORMAT.levels)

    def tensor(self) -> Tensor:
        """float32 [E, K, N], the values of the codes."""
        return self.codes().dequantize().transpose(-1, -2)

    def _blocks(self) -> Entry:
        experts, inputs, outputs = self.shape
        shape = (experts, outputs, inputs // FORMAT.group_size, FORMAT.group_size // 2)
        return Entry(f"{self.name}_blocks", "U8", shape, self.file, self.begin, self.end, self.file_size)


def scales_of(bytes_NG: Tensor, blocks: Tensor, name: str, place: str) -> Tensor:
    """float16 scales [.., N, G] of scale bytes, for codes that number twice their values: uint8 [.., N, G, 16].

    CheckpointError, about the tensor `name`, for a scale that float16 does not represent, unless all its codes are 0.
    """
    exponents = bytes_NG.to(torch.int16) - _SCALE_BIAS
    held = exponents.clamp(_SMALLEST, _LARGEST)
    outside = (exponents != held) & ((blocks & 0x77) != 0).any(-1)  # but for the sign, a code of zero is 0
    if bool(outside.any()):
        byte = int(bytes_NG[outside][0])
        what = "is NaN" if byte == 255 else f"is 2^{byte - 127}, outside the range of float16 scales"
        raise CheckpointError(
            f"a scale of {shown(name)} {what}", place=place, remedy="give the BF16 checkpoint that it was made from"
        )
    return torch.exp2(held.float()).to(torch.float16)


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a config.json declares experts in MXFP4."""
    section = config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    return config.get("model_type") in _FAMILIES and method == "mxfp4"


def with_mxfp4(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Entry]:
    """`entries`, with each pair of blocks and scales as one Mxfp4Entry if `config` is of a family that is released so.

    A pair whose types or shapes do not match is left as it is; like other codes, it is refused later.
    """
    found = dict(entries)
    if config.get("model_type") not in _FAMILIES:
        return found
    for name, blocks in entries.items():
        stem = name.removesuffix("_blocks")
        scales = entries.get(f"{stem}_scales")
        if stem == name or scales is None or stem in entries or not _fit(blocks, scales):
            continue
        experts, outputs, groups, _ = blocks.shape
        shape = (experts, groups * FORMAT.group_size, outputs)
        del found[name], found[scales.name]
        place = (blocks.file, blocks.begin, blocks.end, blocks.file_size)
        found[stem] = Mxfp4Entry(stem, NAME, shape, *place, scales)
    return found


def _fit(blocks: Entry, scales: Entry) -> bool:
    return (
        (blocks.dtype, scales.dtype) == ("U8", "U8")
        and len(blocks.shape) == 4
        and blocks.shape[:-1] == scales.shape
        and blocks.shape[-1] == FORMAT.group_size // 2
    )
