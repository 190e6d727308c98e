"""The operators of a legalized CPU graph registered with PyTorch: packed-weight operators, and the `.out` forms of
`.pte`.

T tokens, N output features, K input features, D model width, E experts. The eager form of a packed operator calls the
kernel library, since only the library knows the layout of packed weights. `kernels/registration/ops_executorch.cpp`
registers the same names with ExecuTorch. Importing this module registers everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.ops import MoeCall
from moec.compiler.ops.call import NAMESPACE, Call, V, register, require
from moec.runtime import kernel_api
from moec.runtime.moe_config import WeightFormat


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _optional(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else _array(tensor)


# ---- packed operators


@dataclass(frozen=True)
class LinearPacked(Call[V]):
    """x float32 [..., K], w uint8 [bytes], bias [N] -> float32 [..., N]; `format`: `WeightFormat.encode`."""

    x: V
    w: V
    bias: V | None
    n: int
    k: int
    format: int

    def eager(self: LinearPacked[Tensor]) -> Tensor:
        _check_packed("linear_packed", self.x, self.w, self.k)
        rows, form = _array(self.x).reshape(-1, self.k), WeightFormat.decode(self.format)
        y = kernel_api.linear(rows, _array(self.w), self.n, form, _optional(self.bias))
        return torch.from_numpy(y).view(*self.x.shape[:-1], self.n)

    def fake(self: LinearPacked[Tensor]) -> Tensor:
        _check_packed("linear_packed", self.x, self.w, self.k)
        require(self.bias is None or tuple(self.bias.shape) == (self.n,), "linear_packed", "bias must be [N]")
        return self.x.new_empty((*self.x.shape[:-1], self.n))


linear_packed = register("linear_packed", LinearPacked)


@dataclass(frozen=True)
class GatedLinearPacked(Call[V]):
    """x float32 [..., K], w uint8 [bytes] of gate and up -> float32 [..., F]; `activation`: its number."""

    x: V
    w: V
    f: int
    k: int
    format: int
    activation: int

    def eager(self: GatedLinearPacked[Tensor]) -> Tensor:
        _check_packed("gated_linear_packed", self.x, self.w, self.k)
        rows, form = _array(self.x).reshape(-1, self.k), WeightFormat.decode(self.format)
        y = kernel_api.gated_linear(rows, _array(self.w), self.f, form, self.activation)
        return torch.from_numpy(y).view(*self.x.shape[:-1], self.f)

    def fake(self: GatedLinearPacked[Tensor]) -> Tensor:
        _check_packed("gated_linear_packed", self.x, self.w, self.k)
        return self.x.new_empty((*self.x.shape[:-1], self.f))


gated_linear_packed = register("gated_linear_packed", GatedLinearPacked)


@dataclass(frozen=True)
class HeadLinearPacked(Call[V]):
    """x float32 [1, T, H, K], w uint8 [bytes] of H matrices -> float32 [1, T, H, N]; `format` as of LinearPacked."""

    x: V
    w: V
    heads: int
    n: int
    k: int
    format: int

    def eager(self: HeadLinearPacked[Tensor]) -> Tensor:
        _check_packed("head_linear_packed", self.x, self.w, self.k)
        y = kernel_api.head_linear(_array(self.x)[0], _array(self.w), self.n, WeightFormat.decode(self.format))
        return torch.from_numpy(y)[None]

    def fake(self: HeadLinearPacked[Tensor]) -> Tensor:
        _check_packed("head_linear_packed", self.x, self.w, self.k)
        require(self.x.dim() == 4 and self.x.shape[2] == self.heads, "head_linear_packed", "x must be [1, T, H, K]")
        return self.x.new_empty((*self.x.shape[:3], self.n))


head_linear_packed = register("head_linear_packed", HeadLinearPacked)


@dataclass(frozen=True)
class EmbeddingPacked(Call[V]):
    """ids int64 [...], w uint8 [bytes] of a table [N, K] -> float32 [..., K]."""

    ids: V
    w: V
    n: int
    k: int
    format: int

    def eager(self: EmbeddingPacked[Tensor]) -> Tensor:
        require(self.ids.dtype == torch.int64, "embedding_packed", "ids must be int64")
        form = WeightFormat.decode(self.format)
        y = kernel_api.embedding(_array(self.ids).reshape(-1), _array(self.w), self.n, self.k, form)
        return torch.from_numpy(y).view(*self.ids.shape, self.k)

    def fake(self: EmbeddingPacked[Tensor]) -> Tensor:
        require(self.ids.dtype == torch.int64, "embedding_packed", "ids must be int64")
        require(self.w.dtype == torch.uint8 and self.w.dim() == 1, "embedding_packed", "w must be uint8 [bytes]")
        return self.ids.new_empty((*self.ids.shape, self.k), dtype=torch.float32)


embedding_packed = register("embedding_packed", EmbeddingPacked)


@dataclass(frozen=True)
class FusedMoePacked(MoeCall[V]):
    """`fused_moe` with packed weights; `config` and `params`: `MoeConfig.encode`."""

    w13: V
    b13: V | None
    w2: V
    b2: V | None
    shared_w13: V | None
    shared_w2: V | None
    shared_gate: V | None
    config: Sequence[int]
    params: Sequence[float]

    def eager(self: FusedMoePacked[Tensor]) -> Tensor:
        tensors = kernel_api.MoeTensors(
            _array(self.router_weight),
            _array(self.w13),
            _array(self.w2),
            router_bias=_optional(self.router_bias),
            selection_bias=_optional(self.selection_bias),
            b13=_optional(self.b13),
            b2=_optional(self.b2),
            shared_w13=_optional(self.shared_w13),
            shared_w2=_optional(self.shared_w2),
            shared_gate=_optional(self.shared_gate),
        )
        y = kernel_api.moe(self.config, self.params, tensors, _array(self.x), _array(self.router_input))
        return torch.from_numpy(y)

    def fake(self: FusedMoePacked[Tensor]) -> Tensor:
        op = "fused_moe_packed"
        for name in ("x", "router_input", "router_weight"):
            require(getattr(self, name).dtype == torch.float32, op, f"{name} must be float32")
        for name in ("w13", "w2", "shared_w13", "shared_w2"):
            blob: Tensor | None = getattr(self, name)
            packed = blob is None or (blob.dtype == torch.uint8 and blob.dim() == 1)
            require(packed, op, f"{name} must be uint8 [bytes]")
        return torch.empty_like(self.x, memory_format=torch.contiguous_format)


fused_moe_packed = register("fused_moe_packed", FusedMoePacked)


def _check_packed(op: str, x: Tensor, w: Tensor, k: int) -> None:
    require(x.dtype == torch.float32, op, "x must be float32")
    require(w.dtype == torch.uint8 and w.dim() == 1, op, "w must be uint8 [bytes]")
    require(x.shape[-1] == k, op, f"x has {x.shape[-1]} features, the weight {k}")


# ---- .out forms


def _define_out(name: str, overload: str) -> Any:
    """`moec::name.overload`: the functional schema with a keyword argument `out` that receives the result."""
    functional = getattr(torch.ops.moec, name).default
    schema = str(functional._schema)
    arguments = schema[schema.index("(") + 1 : schema.rindex(") -> ")]
    alias = chr(ord("a") + arguments.count("!)"))
    qualified = f"{NAMESPACE}::{name}.{overload}"
    torch.library.define(qualified, f"({arguments}, *, Tensor({alias}!) out) -> Tensor({alias}!)")
    torch.library.impl(qualified, "CompositeExplicitAutograd")(_into(functional))
    return getattr(getattr(torch.ops.moec, name), overload)


def _into(functional: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any, out: Tensor) -> Tensor:
        result = functional(*arguments)
        out.resize_(result.shape)
        return out.copy_(result)

    return run


OUT_FORMS = {
    name: _define_out(name, overload)
    for name, overload in {
        "rms_norm": "out",
        "rope": "out",
        "cached_attention": "softcap_out",  # earlier forms: kernels/registration/old_operators.cpp
        "latent_attention": "out",
        "short_conv": "out",
        "gated_delta": "out",
        "selective_scan": "out",
        "linear_packed": "out",
        "gated_linear_packed": "out",
        "head_linear_packed": "out",
        "embedding_packed": "out",
        "fused_moe_packed": "out",
    }.items()
}
