"""Random weights and blocks for the kernel tests, with a reference built from the operators' own definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moec.compiler import levels
from moec.compiler.instruction_sets import compiled_here
from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.fused_moe_q import linear_out_groups
from moec.compiler.ops.linear_q import linear_in_groups
from moec.compiler.ops.moe_math import apply_experts, route, shared_expert
from moec.compiler.quant import ACTIVATION_BLOCK, QuantizedTensor, pack_int4
from moec.runtime import kernel_api
from moec.runtime.moe_config import Kind, MoeConfig, WeightFormat
from moec.targets.xnnpack import packing


def instruction_sets() -> list[Any]:
    """Test parameters: every instruction set that the kernels are compiled for here. One that this machine cannot run
    is skipped with that reason."""
    available = kernel_api.available_isas()
    names = compiled_here()
    assert set(available) <= set(names), "an instruction set without tests"
    return [
        pytest.param(name, marks=() if name in available else pytest.mark.skip(reason=f"this machine has no {name}"))
        for name in names
    ]


# What the codes of a kind stand for; the kernels have a table of their own (kernels/core/levels.h)
LEVELS = {kind: levels.LEVELS[kind.name.lower()] for kind in (Kind.IQ4_NL, Kind.FP4, Kind.NL3)}


@dataclass
class Weight:
    """One stack of matrices of n outputs and k inputs: packed, and as the reference reads it."""

    format: WeightFormat
    n: int
    k: int
    packed: np.ndarray
    # [count, n, k] or, with groups along the output, [count, k, n]; of kinds with levels: INT8 codes of the same values
    quantized: QuantizedTensor | None
    dense: Tensor | None  # f32 [count, n, k]
    codes: Tensor | None = None  # as they were packed

    def apply(self, index: int, x: Tensor) -> Tensor:
        """x [T, k] -> [T, n] by the definition in compiler/ops."""
        if self.quantized is None:
            assert self.dense is not None
            return torch.nn.functional.linear(x, self.dense[index])
        q = self.quantized
        one = QuantizedTensor(q.codes[index], q.scales[index], q.bits, q.group_size)
        multiply = linear_out_groups if self.format.axis_out else linear_in_groups
        block = ACTIVATION_BLOCK if self.format.block_activations else 0
        return multiply(x, one, self.format.int8_activations, block)

    def as_int8(self) -> Weight:
        """A weight of a kind with levels, packed as MOEC_INT8."""
        assert self.format.kind in LEVELS
        assert self.quantized is not None
        q, fmt = self.quantized, replace(self.format, kind=Kind.INT8)
        packed = packing.pack(q.codes, q.scales, fmt, q.codes.shape[0], self.n, self.k).numpy()
        return Weight(fmt, self.n, self.k, packed, q, None, q.codes)

    def matrix(self, index: int = 0) -> Tensor:
        """The dequantized matrix in float64, [n, k]."""
        if self.quantized is None:
            assert self.dense is not None
            return self.dense[index].double()
        w = self.quantized.dequantize()[index].double()
        return w.t() if self.format.axis_out else w


def random_weight(rng: np.random.Generator, fmt: WeightFormat, n: int, k: int, *, count: int = 1) -> Weight:
    """Codes over their whole range (the extremes included), scales spread over two orders of magnitude."""
    if fmt.kind == Kind.F32:
        dense = rng.standard_normal((count, n, k), dtype=np.float32) * np.float32(k**-0.5)
        return Weight(fmt, n, k, kernel_api.pack(dense, None, n, k, fmt, count=count), None, torch.from_numpy(dense))
    values = torch.tensor(LEVELS.get(fmt.kind, range(-8, 8) if fmt.kind == Kind.INT4 else range(-128, 128)))
    low = int(values.min())
    shape = (count, k, n) if fmt.axis_out else (count, n, k)
    positions = torch.from_numpy(rng.integers(0, len(values), size=shape))
    positions.view(-1)[:: max(1, positions.numel() // 7)] = int(values.argmin())
    scales = 10 ** rng.uniform(-2, 0, size=(*shape[:-1], shape[-1] // fmt.group_size)) * k**-0.5 / -low
    stored = torch.from_numpy(scales.astype(np.float32 if fmt.f32_scales else np.float16))
    q = values[positions].to(torch.int8)
    codes = q if fmt.kind == Kind.INT8 else pack_int4(q if fmt.kind == Kind.INT4 else positions.to(torch.int8))
    packed = packing.pack(codes, stored, fmt, count, n, k).numpy()
    same = QuantizedTensor(codes, stored, 4, fmt.group_size) if fmt.kind == Kind.INT4 else None
    quantized = same or QuantizedTensor(q, stored, 8, fmt.group_size)
    return Weight(fmt, n, k, packed, quantized, None, codes)


@dataclass
class Block:
    """One mixture-of-experts block for the kernel (`prepared`) and by definition (`reference`)."""

    config: MoeConfig
    prepared: kernel_api.PreparedMoe
    w13: Weight
    w2: Weight
    shared_w13: Weight | None
    shared_w2: Weight | None

    def route(self, router_input: np.ndarray) -> tuple[Tensor, Tensor]:
        t = self.prepared.tensors
        return route(
            torch.from_numpy(router_input),
            torch.from_numpy(t.router_weight),
            _tensor(t.router_bias),
            _tensor(t.selection_bias),
            self.config.top_k,
            self.config.how,
        )

    def reference(self, x: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The block's output for given experts and weights (routing forced to the kernel's own)."""
        t, rows, what = self.prepared.tensors, torch.from_numpy(x), self.config.what
        b13, b2 = _tensor(t.b13), _tensor(t.b2)

        def up(e: int, r: Tensor) -> Tensor:
            return self.w13.apply(e, r) + (0.0 if b13 is None else b13[e])

        def down(e: int, r: Tensor) -> Tensor:
            return self.w2.apply(e, r) + (0.0 if b2 is None else b2[e])

        y = apply_experts(
            rows, torch.from_numpy(indices).long(), torch.from_numpy(weights), up, down, self.config.how, what
        )
        if self.shared_w13 is not None and self.shared_w2 is not None:
            w13, w2 = self.shared_w13, self.shared_w2
            gate = None if t.shared_gate is None else torch.from_numpy(t.shared_gate).view(1, -1)
            y = y + shared_expert(rows, lambda r: w13.apply(0, r), lambda r: w2.apply(0, r), gate, what)
        return y.numpy()


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def random_block(
    rng: np.random.Generator,
    *,
    experts: int,
    d: int,
    width: int,
    top_k: int,
    routed: WeightFormat,
    shared_width: int = 0,
    shared: WeightFormat | None = None,
    how: Routing | None = None,
    what: Experts | None = None,
    router_bias: bool = False,
    selection_bias: bool = False,
    biases: bool = False,
    shared_gate: bool = False,
) -> Block:
    how, what, shared = how or Routing(), what or Experts(), shared or WeightFormat()
    per = 2 if what.gated else 1

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    w13 = random_weight(rng, routed, per * width, d, count=experts)
    w2 = random_weight(rng, routed, d, width, count=experts)
    shared_w13 = random_weight(rng, shared, per * shared_width, d) if shared_width else None
    shared_w2 = random_weight(rng, shared, d, shared_width) if shared_width else None
    tensors = kernel_api.MoeTensors(
        router_weight=normal(experts, d, scale=3 * d**-0.5),
        w13=w13.packed,
        w2=w2.packed,
        router_bias=normal(experts) if router_bias else None,
        selection_bias=normal(experts, scale=0.3) if selection_bias else None,
        b13=normal(experts, per * width) if biases else None,
        b2=normal(experts, d) if biases else None,
        shared_w13=shared_w13.packed if shared_w13 else None,
        shared_w2=shared_w2.packed if shared_w2 else None,
        shared_gate=normal(d, scale=d**-0.5) if shared_gate else None,
    )
    config = MoeConfig(
        experts=experts,
        d_model=d,
        expert_width=width,
        top_k=top_k,
        how=how,
        what=what,
        w13=routed,
        w2=routed,
        shared_width=shared_width,
        shared_w13=shared if shared_width else WeightFormat(),
        shared_w2=shared if shared_width else WeightFormat(),
    )
    return Block(config, kernel_api.PreparedMoe(config, tensors), w13, w2, shared_w13, shared_w2)
