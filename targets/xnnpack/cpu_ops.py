"""The operators of a legalized CPU graph, as PyTorch knows them: packed-weight operators, and the `.out` forms that a
`.pte` names.

T tokens, N output features, K input features, D model width, E experts. The eager form of a packed operator calls the
kernel library itself: the layout of a packed weight is known to it alone. `kernel/ops_executorch.cpp` registers the
same names with ExecuTorch. Importing this module registers everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moec.compiler.ops  # noqa: F401  (registers the functional forms whose .out forms are defined below)
from moec.compiler.ops.define import NAMESPACE, define, require
from moec.runtime import kernel_api
from moec.runtime.moe_config import WeightFormat


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _optional(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else _array(tensor)


# ---- packed operators


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, n: int, k: int, format: int) -> Tensor:
    require(x.dtype == torch.float32 and x.shape[-1] == k, "linear_packed", f"x must be float32 with {k} features")
    y = kernel_api.linear(_array(x).reshape(-1, k), _array(w), n, WeightFormat.decode(format), _optional(bias))
    return torch.from_numpy(y).view(*x.shape[:-1], n)


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


def _gated(x: Tensor, w: Tensor, f: int, k: int, format: int, activation: int) -> Tensor:
    require(
        x.dtype == torch.float32 and x.shape[-1] == k, "gated_linear_packed", f"x must be float32 with {k} features"
    )
    y = kernel_api.gated_linear(_array(x).reshape(-1, k), _array(w), f, WeightFormat.decode(format), activation)
    return torch.from_numpy(y).view(*x.shape[:-1], f)


def _gated_fake(x: Tensor, w: Tensor, f: int, k: int, format: int, activation: int) -> Tensor:
    require(x.dtype == torch.float32, "gated_linear_packed", "x must be float32")
    require(w.dtype == torch.uint8 and w.dim() == 1, "gated_linear_packed", "w must be uint8 [bytes]")
    require(x.shape[-1] == k, "gated_linear_packed", f"x has {x.shape[-1]} features, the weight {k}")
    return x.new_empty((*x.shape[:-1], f))


gated_linear_packed = define(
    "gated_linear_packed(Tensor x, Tensor w, int f, int k, int format, int activation) -> Tensor", _gated, _gated_fake
)


def _embedding(ids: Tensor, w: Tensor, n: int, k: int, format: int) -> Tensor:
    require(ids.dtype == torch.int64, "embedding_packed", "ids must be int64")
    y = kernel_api.embedding(_array(ids).reshape(-1), _array(w), n, k, WeightFormat.decode(format))
    return torch.from_numpy(y).view(*ids.shape, k)


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
    tensors = kernel_api.MoeTensors(
        _array(router_weight),
        _array(w13),
        _array(w2),
        router_bias=_optional(router_bias),
        selection_bias=_optional(selection_bias),
        b13=_optional(b13),
        b2=_optional(b2),
        shared_w13=_optional(shared_w13),
        shared_w2=_optional(shared_w2),
        shared_gate=_optional(shared_gate),
    )
    return torch.from_numpy(kernel_api.moe(config, params, tensors, _array(x), _array(router_input)))


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
    "Tensor? selection_bias, Tensor w13, Tensor? b13, Tensor w2, Tensor? b2, Tensor? shared_w13, "
    "Tensor? shared_w2, Tensor? shared_gate, int[] config, float[] params) -> Tensor",
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
        "gated_linear_packed",
        "embedding_packed",
        "fused_moe_packed",
    )
}
