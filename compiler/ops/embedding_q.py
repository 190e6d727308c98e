"""moec::embedding_q: rows of a quantized table, dequantized: y[i] = q[ids[i]] * s[ids[i]].

ids int64 [...]; codes [V, D/2] uint8 (bits 4) or [V, D] int8 (bits 8); scales [V, D/group_size]; y float32 [..., D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ops.define import define
from moec.compiler.ops.linear_q import check_codes
from moec.compiler.quant import QuantizedTensor


def _eager(ids: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    return QuantizedTensor(codes[ids], scales[ids], bits, group_size).dequantize()


def _fake(ids: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    rows, width = codes.shape[0], codes.shape[1] * (2 if bits == 4 else 1)
    check_codes("embedding_q", "table", codes, scales, (rows, width), bits, group_size)
    return ids.new_empty((*ids.shape, width), dtype=torch.float32)


embedding_q = define(
    "embedding_q(Tensor ids, Tensor codes, Tensor scales, int bits, int group_size) -> Tensor", _eager, _fake
)
