"""fuse_gated_linears: gate and up of one linear meet in `act(gate) * up` and nowhere else, or nothing happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.ops import linear_q
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program, Role
from moec.compiler.spec.quantization import Quantization
from moec.passes.pipelines import fusion
from moec.passes.quantize_weights import quantize_weights
from moec.targets.xnnpack.legalize_gated import fuse_gated_linears
from moec.targets.xnnpack.legalize_linear import pack_linears
from moec.targets.xnnpack.options import Kernels, Options
from tests.harness import CALLS, VOCABULARY, export_toy, run
from tests.interpreter import Interpreter
from tests.passes.moe_zoo import Linear, parameter

D = 64
Join = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """One dense gated block; `join` makes the hidden values of gate and up."""

    def __init__(self, join: Join, width: int, bias: bool) -> None:
        super().__init__()
        self.embed, self.join = parameter(VOCABULARY, D), join
        self.gate, self.up, self.down = Linear(D, width), Linear(D, width), Linear(width, D)
        self.bias = parameter(width) if bias else None

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        h = F.embedding(tokens, self.embed)
        gate, up = F.linear(h, self.gate.weight, self.bias), self.up(h)
        return F.linear(h + self.down(self.join(gate, up)), self.embed)


def packed(join: Join, width: int = 96, bias: bool = False, quantized: bool = True) -> Program:
    roles = dict.fromkeys(("gate.weight", "up.weight", "down.weight"), Role.FFN) | {"embed": Role.EMBEDDING}
    program = run_passes(export_toy(lambda: Block(join, width, bias), roles), fusion())
    if quantized:
        scheme = {"weights": "int4", "activations": "int8", "kv_cache": "fp32", "embedding": "int4"}
        program = run(quantize_weights(Quantization.model_validate(scheme)), program).program
        assert any(node.target is linear_q for node in program.graph.nodes)
    return run(pack_linears(Options(kernels=Kernels(ffn="moec", head="moec"))), program).program


def outputs(program: Program) -> list[Tensor]:
    interpreter = Interpreter(program)
    generator = torch.Generator().manual_seed(1)
    calls = [(torch.randint(0, VOCABULARY, (1, t), generator=generator), torch.tensor([s])) for t, s in CALLS]
    return [interpreter(*call) for call in calls]


MATCH: dict[str, Join] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "up first": lambda gate, up: up * F.silu(gate),
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
}
REFUSED: dict[str, Join] = {
    "the second half is activated": lambda gate, up: F.silu(up) * gate,
    "gate has another user": lambda gate, up: F.silu(gate) * up + gate,
    "up has another user": lambda gate, up: F.silu(gate) * up + up,
    "the activation has another user": lambda gate, up: F.silu(gate) * up + F.silu(gate),
    "both are activated": lambda gate, up: F.silu(gate) * F.silu(up),
    "gate is squared": lambda gate, up: F.silu(gate) * gate + up,
    "added": lambda gate, up: F.silu(gate) + up,
    "another activation": lambda gate, up: torch.tanh(gate) * up,
    "scaled": lambda gate, up: F.silu(gate) * (up * 2.0),
}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", MATCH)
def test_fused_and_equal(name: str, quantized: bool) -> None:
    before = packed(MATCH[name], quantized=quantized)
    result = run(fuse_gated_linears(), before)
    assert result.changed == 1
    text = result.program.text()
    assert "gated_linear_packed" in text
    assert "slice" not in text
    for a, b in zip(outputs(result.program), outputs(before), strict=True):
        # the activation differs by 5e-7 of the gate; that may tip an INT8 rounding of the down projection's input
        torch.testing.assert_close(a, b, atol=2e-2 if quantized else 1e-5, rtol=1e-4)
        assert F.cosine_similarity(a, b, dim=-1).min() > (0.9999 if quantized else 0.999999)
    assert run(fuse_gated_linears(), result.program).changed == 0


@pytest.mark.parametrize("name", REFUSED)
def test_nearly_is_not_enough(name: str) -> None:
    before = packed(REFUSED[name])
    after = run(fuse_gated_linears(), before)
    assert after.changed == 0
    assert after.program.text() == before.text()


def test_a_width_without_whole_blocks_and_a_bias_are_left_alone() -> None:
    assert run(fuse_gated_linears(), packed(MATCH["silu"], width=40, quantized=False)).changed == 0
    assert run(fuse_gated_linears(), packed(MATCH["silu"], bias=True)).changed == 0
