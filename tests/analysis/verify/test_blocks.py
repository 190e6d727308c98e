"""A fused node taken apart computes what the node computes, for every form of routing and experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.analysis.verify.blocks import FusedBlock
from moec.compiler import ops
from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.quant import quantize_weight

E, K, D, F, S, T = 8, 3, 64, 32, 32, 11
ROUTINGS = [
    Routing(),
    Routing(score="sigmoid", normalize="sum", scale=2.5),
    Routing(score="sigmoid", groups=4, keep=2, group_score="top2sum", fill="zero", normalize="sum", eps=1e-20),
    Routing(after_topk=True),
    Routing(score="sigmoid", apply="input"),
]
EXPERTS = [
    Experts(),
    Experts(layout="in_out"),
    Experts(interleaved=True, alpha=1.702, gate_max=7.0, up_min=-7.0, up_max=7.0, up_offset=1.0),
    Experts(activation="relu2", gated=False),
]


def _values(routing: Routing, experts: Experts, *, biases: bool, shared: bool, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    wide = 2 * F if experts.gated else F
    out_in = experts.layout == "out_in"
    return {
        "router_weight": draw(E, D),
        "router_bias": draw(E) if biases else None,
        "selection_bias": draw(E) if biases else None,
        "w13": draw(E, wide, D) if out_in else draw(E, D, wide),
        "b13": draw(E, wide) if biases else None,
        "w2": draw(E, D, F) if out_in else draw(E, F, D),
        "b2": draw(E, D) if biases else None,
        "shared_w13": draw(2 * S if experts.gated else S, D) if shared else None,
        "shared_w2": draw(D, S) if shared else None,
        "shared_gate": draw(1, D) if shared and biases else None,
        "top_k": K,
        "routing": str(routing),
        "experts": str(experts),
    }


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_float(routing, experts, extras):
    values = _values(routing, experts, biases=extras, shared=extras, seed=3)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(4))
    expected = ops.fused_moe(x, x, *values.values())
    block = FusedBlock(ops.FusedMoe(x, x, **values), shared_input=True)
    free = block.route(x.numpy())
    torch.testing.assert_close(torch.from_numpy(block.output(x.numpy(), free.indices_TK)), expected)
    again = block.output(x.numpy(), free.indices_TK, free.weights_TK)
    torch.testing.assert_close(torch.from_numpy(again), expected)
    forced = (free.indices_TK + 1) % E
    assert not np.allclose(block.output(x.numpy(), forced), expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize(("int8", "block"), [(False, 0), (True, 0), (True, 32)])
def test_quantized(layout, int8, block):
    values = _values(ROUTINGS[1], Experts(layout=layout), biases=True, shared=True, seed=5)
    packed: dict = {}
    for name, value in values.items():
        if name not in ("w13", "w2", "shared_w13", "shared_w2"):
            packed[name] = value
            continue
        q = quantize_weight(value, bits=4, group_size=32)
        packed[f"{name}_codes"], packed[f"{name}_scales"] = q.codes, q.scales
    packed |= {"bits": 4, "group_size": 32, "int8_activations": int8, "activation_block": block}
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(6))
    expected = ops.fused_moe_q(x, x, *packed.values())
    block = FusedBlock(ops.FusedMoeQ(x, x, **packed), shared_input=True)
    actual = block.output(x.numpy(), block.route(x.numpy()).indices_TK)
    torch.testing.assert_close(torch.from_numpy(actual), expected)
