"""The element formats of a GGUF file: codes that are carried as they are, floats, and formats that are dequantized.

Those that are carried are symmetric codes in blocks of 32 along the input, as ours: a float16 scale of either sign
(MXFP4: a byte, of a power of two), then
- Q4_0: 16 bytes, byte i with element i in its low nibble and element i + 16 in its high one, w = scale * (nibble - 8);
- Q8_0: 32 signed bytes, w = scale * byte;
- Q5_0: 32 bits, the fifth of each element, then nibbles as Q4_0, w = scale * (nibble + 16 * bit - 16); INT8 here;
- IQ4_NL and MXFP4: nibbles as Q4_0, each the number of a level, w = scale * level; MXFP4's levels are twice those of
  the format, and its scale half of what the byte says (`checkpoints/mxfp4.py`).
Every other quantized type has a minimum beside the scale, groups of 16, or scales that are products which float16
cannot hold exactly; those are dequantized by the library gguf, in float32.

R rows, B blocks of a row, K elements of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from moec.checkpoints.gguf_file import TYPES
from moec.checkpoints.mxfp4 import FORMAT as MXFP4
from moec.checkpoints.mxfp4 import scales_of
from moec.compiler.errors import CheckpointError
from moec.compiler.extras import require
from moec.compiler.quant import QuantizedTensor
from moec.compiler.weights import CodeFormat

BLOCK = 32
#: Types whose codes are carried, and the format that holds them exactly.
CARRIED: Mapping[str, CodeFormat] = {
    "Q4_0": CodeFormat(4, BLOCK),
    "Q8_0": CodeFormat(8, BLOCK),
    "Q5_0": CodeFormat(8, BLOCK),
    "IQ4_NL": CodeFormat(4, BLOCK, levels="iq4_nl"),
    "MXFP4": MXFP4,
}
#: Those of them whose codes are ours in another order; the others become codes of more bits and of the same values.
BIT_FOR_BIT = frozenset({"Q4_0", "Q8_0", "IQ4_NL", "MXFP4"})
FLOATS = ("F32", "F16", "BF16", "F64")
_AT_ONCE = 1 << 22  # elements that are dequantized at once: the library's temporaries are several times as large


def is_quantized(kind: str) -> bool:
    """Whether elements of this type share a scale."""
    return next(block for name, block, _ in TYPES.values() if name == kind) > 1


def bits_per_weight(kind: str) -> float:
    """Bits that an element takes, scales included."""
    _, block, size = next(known for known in TYPES.values() if known[0] == kind)
    return 8 * size / block


def carried_codes(kind: str, blocks_RB: np.ndarray, name: str, place: str) -> QuantizedTensor:
    """Codes [R, K] and scales [R, K/32] of the bytes of a tensor of a `CARRIED` type, uint8 [R, B * bytes of a block].

    CheckpointError for scales that are not finite, and powers of two that float16 does not represent.
    """
    size = next(size for known, _, size in TYPES.values() if known == kind)
    rows = blocks_RB.shape[0]
    whole = blocks_RB.reshape(rows, -1, size)
    if kind == "MXFP4":
        body = _repacked(torch.from_numpy(np.ascontiguousarray(whole[..., 1:])))
        scales = scales_of(torch.from_numpy(np.ascontiguousarray(whole[..., 0])), body, name, place)
        return QuantizedTensor(body.reshape(rows, -1), scales, MXFP4.bits, BLOCK, levels=MXFP4.levels)
    scales = torch.from_numpy(np.ascontiguousarray(whole[..., :2])).view(torch.float16).reshape(rows, -1)
    if not torch.isfinite(scales).all():
        raise CheckpointError(f"tensor {name} has scales that are not finite", place=place, remedy="use another file")
    body = torch.from_numpy(np.ascontiguousarray(whole[..., 2:]))
    if kind == "Q4_0":
        # nibble - 8 in two's complement is the nibble with its highest bit turned
        return QuantizedTensor((_repacked(body) ^ 0x88).reshape(rows, -1), scales, 4, BLOCK)
    if kind == "IQ4_NL":
        return QuantizedTensor(_repacked(body).reshape(rows, -1), scales, 4, BLOCK, levels="iq4_nl")
    return QuantizedTensor(_bytes(kind, body).reshape(rows, -1), scales, 8, BLOCK)


def _repacked(nibbles: torch.Tensor) -> torch.Tensor:
    """Q4_0's 16 bytes of a block in our order: elements 2i and 2i+1 of ours are both in its low nibbles (the first half
    of the block) or both in the high ones."""
    halves = [half[..., 0::2] | (half[..., 1::2] << 4) for half in (nibbles & 0xF, nibbles >> 4)]
    return torch.cat(halves, -1)


def _bytes(kind: str, body: torch.Tensor) -> torch.Tensor:
    """INT8 codes [R, B, 32] of what follows the scales of Q8_0 or Q5_0."""
    if kind == "Q8_0":
        return body.view(torch.int8)
    packed = body[..., -BLOCK // 2 :]
    nibbles = torch.cat((packed & 0xF, packed >> 4), -1)
    places = torch.arange(8, dtype=torch.uint8)
    fifth = ((body[..., :4, None] >> places) & 1).flatten(-2)  # bit i, little endian, is of element i
    return (nibbles | (fifth << 4)).to(torch.int8) - 16


def float_values(kind: str, blocks_RB: np.ndarray, width: int) -> torch.Tensor:
    """Values [R, K] of a tensor of any type, float32. MissingExtra where a quantized one needs the library gguf."""
    raw = torch.from_numpy(blocks_RB)
    if kind in FLOATS:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[kind]
        return raw.view(dtype).to(torch.float32)
    require("gguf", "gguf", f"dequantizing {kind}")
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    step = max(1, _AT_ONCE // max(width, 1))
    values = torch.empty(len(blocks_RB), width, dtype=torch.float32)
    for start in range(0, len(blocks_RB), step):
        try:
            part = gguf.dequantize(blocks_RB[start : start + step], number)
        except NotImplementedError:  # what the library raises for a type that it only names
            raise CheckpointError(f"the library gguf does not dequantize {kind}", remedy="use another file") from None
        values[start : start + step] = torch.from_numpy(np.ascontiguousarray(part, np.float32))
    return values
