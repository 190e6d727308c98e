"""Weights into the CPU kernels' packed layout, and back, in torch terms.

N output features, K input features, g group size. One packed weight is a uint8 tensor of
`count * packed_bytes(n, k, fmt)` bytes; its layout is the kernel's own business (kernels/moec_kernel.h). Codes and
scales are carried bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.runtime import kernel_api
from moec.runtime.moe_config import Kind, WeightFormat


def packed_bytes(n: int, k: int, fmt: WeightFormat) -> int:
    """Bytes of one packed matrix. Pure arithmetic, so that graphs can be shaped before the kernel library is built."""
    if fmt.kind == Kind.F32:
        return 4 * n * k
    blocks, padded_k = -(-n // 16), -(-k // 8) * 8
    codes = blocks * 16 * padded_k * fmt.kind.bits // 8
    scales = n // fmt.group_size * padded_k if fmt.axis_out else blocks * 16 * (k // fmt.group_size)
    return codes + scales * (4 if fmt.f32_scales else 2)


def pack(
    codes: Tensor, scales: Tensor | None, fmt: WeightFormat, count: int, n: int, k: int, *, transposed: bool = False
) -> Tensor:
    """uint8 [count * packed_bytes(n, k, fmt)] of `count` stacked matrices.

    codes: uint8 [..., K/2] or int8 [..., K] with rows of outputs (groups along the input), uint8 [..., N/2] or int8
    [..., N] with rows of inputs (`fmt.axis_out`), float32 [..., N, K] ([..., K, N] when `transposed`). scales: one per
    group, float16 or float32 as `fmt.f32_scales` says. KernelError when a size does not fit.
    """
    wanted = torch.uint8 if fmt.kind.nibbles else torch.float32 if fmt.kind == Kind.F32 else torch.int8
    if codes.dtype != wanted:
        raise TypeError(f"{fmt.kind.name} weights are {wanted}, not {codes.dtype}")
    if scales is not None and scales.dtype != (torch.float32 if fmt.f32_scales else torch.float16):
        raise TypeError(f"scales of {fmt} have dtype {scales.dtype}")
    packed = torch.empty(count * packed_bytes(n, k, fmt), dtype=torch.uint8)
    kernel_api.pack_into(
        packed.numpy(),
        codes.detach().contiguous().numpy(),
        None if scales is None else scales.detach().contiguous().numpy(),
        n,
        k,
        fmt,
        count=count,
        transposed=transposed,
    )
    return packed


def unpack(packed: Tensor, fmt: WeightFormat, count: int, n: int, k: int) -> tuple[Tensor, Tensor | None]:
    """(codes, scales) of `pack`, bit for bit: [count, rows, ...]."""
    codes, scales = kernel_api.unpack(packed.contiguous().numpy(), n, k, fmt, count=count)
    return torch.from_numpy(codes), None if scales is None else torch.from_numpy(scales)
