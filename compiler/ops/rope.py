"""moec::rope: rotary position embedding of heads.

T tokens, H heads, d head width. For each pair (a, b): (a, b) -> (a*cos - b*sin, b*cos + a*sin).
`interleaved`: the pairs are (2i, 2i+1); otherwise (i, i + d/2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.ops.define import define, require


def _eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    c, s = cos[None, :, None, :], sin[None, :, None, :]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    require(x.dim() == 4, "rope", "x must be [1, T, H, d]")
    require(cos.dim() == 2 and sin.dim() == 2, "rope", "cos and sin must be [T, d/2]")
    require(x.shape[-1] == 2 * cos.shape[-1] == 2 * sin.shape[-1], "rope", "cos and sin must have d/2 columns")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


rope = define("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", _eager, _fake)
