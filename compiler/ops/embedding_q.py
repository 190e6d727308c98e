"""moec::embedding_q: rows of a quantized table, dequantized: y[i] = q[ids[i]] * s[ids[i]].

ids int64 [...]; codes [V, D/2] uint8 (bits 4) or [V, D] int8 (bits 8); scales [V, D/group_size]; y float32 [..., D].
levels: as of linear_q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ops.call import Call, V, register
from moec.compiler.ops.linear_q import check_codes
from moec.compiler.quant import QuantizedTensor


@dataclass(frozen=True)
class EmbeddingQ(Call[V]):
    ids: V
    codes: V
    scales: V
    bits: int
    group_size: int
    levels: str = ""

    def eager(self: EmbeddingQ[Tensor]) -> Tensor:
        codes, scales = self.codes[self.ids], self.scales[self.ids]
        return QuantizedTensor(codes, scales, self.bits, self.group_size, levels=self.levels).dequantize()

    def fake(self: EmbeddingQ[Tensor]) -> Tensor:
        rows, width = self.codes.shape[0], self.codes.shape[1] * (2 if self.bits == 4 else 1)
        shape = (rows, width)
        check_codes("embedding_q", "table", self.codes, self.scales, shape, self.bits, self.group_size, self.levels)
        return self.ids.new_empty((*self.ids.shape, width), dtype=torch.float32)


embedding_q = register("embedding_q", EmbeddingQ)
