"""Large products on the CPU: operands dequantized by MLX, multiplied by numpy's BLAS.

MLX's CPU matrix products run at a few GFLOP/s, a small part of what BLAS does: verifying a model of full size would
take hours. The values multiplied are those MLX's own kernels multiply, in float32; only the order of the sums differs.
Small products, decoding among them, stay with MLX, so that a prefill compared with single steps compares the two. Never
on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ROWS_FROM = 16  # fewer rows than this are multiplied by MLX
_PART = 8192  # rows of a weight that are dequantized at a time


def quantized_matmul(mx: Any, x: Any, w: Any, scales: Any, biases: Any, *, transpose: bool, **scheme: Any) -> Any:
    """`mx.quantized_matmul` of float32 x [.., K] and one weight: [N, K] when `transpose`, else [K, N]."""
    x_MK = np.array(x).reshape(-1, x.shape[-1])
    parts = []
    if not transpose:
        parts.append(x_MK @ _dequantized(mx, w, scales, biases, scheme))
    else:
        for first in range(0, w.shape[0], _PART):
            rows = slice(first, first + _PART)
            parts.append(x_MK @ _dequantized(mx, w[rows], scales[rows], biases[rows], scheme).T)
    y = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return mx.array(y.reshape(*x.shape[:-1], -1))


def gather_qmm(
    mx: Any, x: Any, w: Any, scales: Any, biases: Any, indices: Any, *, transpose: bool, **scheme: Any
) -> Any:
    """`mx.gather_qmm` of x [P, 1, K] by sorted expert indices [P]: each expert's rows at once."""
    expert_P = np.array(indices)
    x_PK = np.array(x)[:, 0, :]
    out: np.ndarray | None = None
    for expert in np.unique(expert_P):
        e, mine = int(expert), expert_P == expert
        weight = _dequantized(mx, w[e], scales[e], biases[e], scheme)
        y = x_PK[mine] @ (weight.T if transpose else weight)
        if out is None:
            out = np.empty((len(expert_P), y.shape[-1]), np.float32)
        out[mine] = y
    assert out is not None
    return mx.array(out[:, None, :])


def matmul(mx: Any, a: Any, b: Any) -> Any:
    """a [.., K] times b [K, N], float32."""
    return mx.array(np.array(a) @ np.array(b))


def _dequantized(mx: Any, w: Any, scales: Any, biases: Any, scheme: dict[str, Any]) -> np.ndarray:
    return np.array(mx.dequantize(w, scales, biases, **scheme))
