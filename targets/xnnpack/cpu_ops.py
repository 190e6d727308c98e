"""The operators of a legalized CPU graph, as PyTorch knows them: packed-weight operators, and the `.out` forms that a
`.pte` names.

T tokens, N output features, K input features, D model width, E experts. The eager form of a packed operator calls the
kernel library itself: the layout of a packed weight is known to it alone. `kernel/ops_executorch.cpp` registers the
same names with ExecuTorch. Importing this module registers everything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

import moec.compiler.ops  # noqa: F401  (registers the functional forms whose .out forms are defined below)
from moec.compiler.ops.define import NAMESPACE, define, require
from moec.targets.xnnpack.native import kernels_library


class KernelBuffer(ctypes.Structure):
    """moec_in and moec_out of moec_kernel.h: a pointer and its length in bytes; absent is (NULL, 0)."""

    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]


class _MoeArguments(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("config", ctypes.POINTER(ctypes.c_int64)),
        ("config_length", ctypes.c_uint64),
        ("params", ctypes.POINTER(ctypes.c_double)),
        ("params_length", ctypes.c_uint64),
        *(
            (name, KernelBuffer)
            for name in [
                "x",
                "router_input",
                "router_weight",
                "router_bias",
                "selection_bias",
                "w13",
                "b13",
                "w2",
                "b2",
                "shared_w13",
                "shared_w2",
                "shared_gate",
                "y",
                "indices",
                "weights",
            ]
        ),
    ]


def buffer(tensor: Tensor | None) -> KernelBuffer:
    """A view of a contiguous CPU tensor, which must outlive it."""
    if tensor is None:
        return KernelBuffer(None, 0)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("kernels take contiguous CPU tensors")
    return KernelBuffer(tensor.data_ptr() or None, tensor.numel() * tensor.element_size())


@cache
def kernels() -> ctypes.CDLL:
    """The kernel library, built if it has to be. UserError when that is impossible."""
    library = ctypes.CDLL(str(kernels_library()))
    library.moec_last_error.restype = ctypes.c_char_p
    i64, i32 = ctypes.c_int64, ctypes.c_int32
    library.moec_linear.argtypes = [i64, i64, i64, i32, *[KernelBuffer] * 4]
    library.moec_embedding.argtypes = [i64, i64, i64, i32, *[KernelBuffer] * 3]
    library.moec_moe.argtypes = [ctypes.POINTER(_MoeArguments)]
    for name in ("moec_linear", "moec_embedding", "moec_moe"):
        getattr(library, name).restype = i32
    return library


def check(status: int) -> None:
    """ValueError with the library's reason for a status that is not 0."""
    if status:
        raise ValueError(kernels().moec_last_error().decode())


# ---- packed operators


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, n: int, k: int, format: int) -> Tensor:
    require(x.dtype == torch.float32, "linear_packed", "x must be float32")
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    check(kernels().moec_linear(y.numel() // n, n, k, format, buffer(x), buffer(w), buffer(bias), buffer(y)))
    return y


def _linear_fake(x: Tensor, w: Tensor, bias: Tensor | None, n: int, k: int, format: int) -> Tensor:
    require(x.dtype == torch.float32, "linear_packed", "x must be float32")
    require(w.dtype == torch.uint8 and w.dim() == 1, "linear_packed", "w must be uint8 [bytes]")
    require(x.shape[-1] == k, "linear_packed", f"x has {x.shape[-1]} features, the weight {k}")
    if bias is not None:
        require(tuple(bias.shape) == (n,), "linear_packed", "bias must be [N]")
    return x.new_empty((*x.shape[:-1], n))


linear_packed = define(
    "linear_packed(Tensor x, Tensor w, Tensor? bias, int n, int k, int format) -> Tensor", _linear, _linear_fake
)


def _embedding(ids: Tensor, w: Tensor, n: int, k: int, format: int) -> Tensor:
    require(ids.dtype == torch.int64, "embedding_packed", "ids must be int64")
    ids = ids.contiguous()
    y = torch.empty((*ids.shape, k), dtype=torch.float32)
    check(kernels().moec_embedding(ids.numel(), n, k, format, buffer(ids), buffer(w), buffer(y)))
    return y


def _embedding_fake(ids: Tensor, w: Tensor, n: int, k: int, format: int) -> Tensor:
    require(ids.dtype == torch.int64, "embedding_packed", "ids must be int64")
    require(w.dtype == torch.uint8 and w.dim() == 1, "embedding_packed", "w must be uint8 [bytes]")
    return ids.new_empty((*ids.shape, k), dtype=torch.float32)


embedding_packed = define(
    "embedding_packed(Tensor ids, Tensor w, int n, int k, int format) -> Tensor", _embedding, _embedding_fake
)


def _moe(
    x: Tensor,
    router_input: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    w13: Tensor,
    b13: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    shared_gate: Tensor | None,
    config: Sequence[int],
    params: Sequence[float],
) -> Tensor:
    x, router_input = x.contiguous(), router_input.contiguous()
    y = torch.empty_like(x)
    arguments = _MoeArguments(
        x.numel() // x.shape[-1],
        (ctypes.c_int64 * len(config))(*config),
        len(config),
        (ctypes.c_double * len(params))(*params),
        len(params),
        *map(buffer, (x, router_input, router_weight, router_bias, selection_bias, w13, b13, w2, b2)),
        *map(buffer, (shared_w13, shared_w2, shared_gate, y, None, None)),
    )
    check(kernels().moec_moe(ctypes.byref(arguments)))
    return y


def _moe_fake(
    x: Tensor,
    router_input: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    w13: Tensor,
    b13: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    shared_gate: Tensor | None,
    config: Sequence[int],
    params: Sequence[float],
) -> Tensor:
    op = "fused_moe_packed"
    for name, value in (("x", x), ("router_input", router_input), ("router_weight", router_weight)):
        require(value.dtype == torch.float32, op, f"{name} must be float32")
    for name, blob in (("w13", w13), ("w2", w2), ("shared_w13", shared_w13), ("shared_w2", shared_w2)):
        require(blob is None or (blob.dtype == torch.uint8 and blob.dim() == 1), op, f"{name} must be uint8 [bytes]")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


fused_moe_packed = define(
    "fused_moe_packed(Tensor x, Tensor router_input, Tensor router_weight, Tensor? router_bias, "
    "Tensor? selection_bias, Tensor w13, Tensor? b13, Tensor w2, Tensor? b2, Tensor? shared_w13, Tensor? shared_w2, Tensor? shared_gate, "
    "int[] config, float[] params) -> Tensor",
    _moe,
    _moe_fake,
)


# ---- .out forms


def _define_out(name: str) -> Any:
    """`moec::name.out`: the functional schema with a keyword argument `out` that receives the result."""
    functional = getattr(torch.ops.moec, name).default
    schema = str(functional._schema)
    arguments = schema[schema.index("(") + 1 : schema.rindex(") -> ")]
    alias = chr(ord("a") + arguments.count("!)"))
    torch.library.define(f"{NAMESPACE}::{name}.out", f"({arguments}, *, Tensor({alias}!) out) -> Tensor({alias}!)")
    torch.library.impl(f"{NAMESPACE}::{name}.out", "CompositeExplicitAutograd")(_into(functional))
    return getattr(torch.ops.moec, name).out


def _into(functional: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any, out: Tensor) -> Tensor:
        result = functional(*arguments)
        out.resize_(result.shape)
        return out.copy_(result)

    return run


OUT_FORMS = {
    name: _define_out(name)
    for name in (
        "rms_norm",
        "rope",
        "cached_attention",
        "cached_attention_q8",
        "linear_packed",
        "embedding_packed",
        "fused_moe_packed",
    )
}
