"""Graphs made functional by renaming: the same as tracing them anew, and never when something else sees the write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.compiler import build
from moec.compiler.export import assemble, export_module, zeros
from moec.compiler.functional import functional
from moec.compiler.program import LazyWeight, ModelInfo, Program, Role, Stage
from moec.compiler.spec import Spec
from moec.passes.canonicalize import canonicalize
from tests.interpreter import Interpreter
from tests.passes.moe_zoo import parameter

D, S = 6, 12
COMMON = {"layers": 2, "d_model": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "vocab_size": 40, "context": 24}
ROPE = {"rope": {"theta": 10000.0, "interleaved": True}}
MODELS = {
    "moe": {"architecture": "mobilemoe", **COMMON, **ROPE, "moe": {"experts": 4, "top_k": 2, "expert_width": 32}},
    "dense": {"architecture": "mobilellm", **COMMON, **ROPE, "ffn_width": 32},
}


def traced(program: Program) -> Program:
    """canonicalize the long way."""
    again = replace(program, exported=program.exported.run_decompositions({}), stage=Stage.CANONICAL)
    return replace(canonicalize().run(again).program)


@pytest.mark.parametrize("name", MODELS)
def test_our_models_come_out_as_if_traced(name: str) -> None:
    spec = Spec.model_validate({"name": "small", "model": MODELS[name], "quantization": "none"})
    program, _ = build.program_and_passes(spec, None)
    assert functional(program) is not None
    assert canonicalize().run(program).program.text() == traced(program).text()


Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class Toy(nn.Module):
    """`step(x [T, D], start [1], cache [S, D])`"""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.embed, self.step = parameter(40, D), step
        self.register_buffer("cache", torch.zeros(S, D))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return self.step(F.embedding(tokens, self.embed).flatten(0, 1), start_pos, self.cache)[None]


def exported(step: Step) -> Program:
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = Toy(step)
    program = export_module(module, context=S, max_tokens=8)
    embed = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    weights = {"embed": LazyWeight((40, D), torch.float32, lambda: embed), "cache": zeros((S, D))}
    return assemble(program, weights, {"cache": Role.CACHE}, ModelInfo("toy", 40, S, 8))


def rows(x: Tensor, start: Tensor) -> Tensor:
    return start + torch.arange(x.shape[0])


def _write(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    cache.index_copy_(0, rows(x, start), x)
    return x + cache.sum(0)


def _write_twice(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    before = cache.sum(0)
    cache.index_copy_(0, rows(x, start), x)
    middle = cache.sum(0)
    cache.mul_(2.0)
    return x + before + 10 * middle + 100 * cache.sum(0)


def _write_a_value(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    y = x * 2
    z = y + 1
    y.add_(x)
    return y + z


def _view_before(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    part = cache[2:4]
    cache.index_copy_(0, rows(x, start), x)
    return x + part.sum(0)


def _view_of_a_value(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:].add_(1.0)
    return y


def _reshaped_before(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    y = x * 2
    flat = y.reshape(-1)
    y.add_(1.0)
    return y + flat.sum()


def _cast_before(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    y = x * 2
    same = y.to(torch.float32)
    y.add_(1.0)
    return y + same


def _copied_before(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    y = x * 2
    other = y.to(torch.float32, copy=True)
    y.add_(1.0)
    return y + 10 * other


def _half(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * 2, second.contiguous()], -1).unflatten(-1, (2, 3)).flatten(-2).view_as(x)


def _expanded(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    return x * x[:, :1].expand_as(x) + start.to(x).expand_as(x)


def _expanded_before(x: Tensor, start: Tensor, cache: Tensor) -> Tensor:
    y = x[:, :1] * 2
    wide = y.expand_as(x)
    y.add_(1.0)
    return wide + y


STEPS = {
    f.__name__: f
    for f in (
        _write, _write_twice, _write_a_value, _view_before, _view_of_a_value, _reshaped_before, _cast_before,
        _copied_before, _half, _expanded, _expanded_before,
    )
}  # fmt: skip
MUST_TRACE = {"_view_before", "_view_of_a_value", "_reshaped_before", "_expanded_before"}


@pytest.mark.parametrize("name", STEPS)
def test_same_values_as_the_module(name: str) -> None:
    program = exported(STEPS[name])
    assert (functional(program) is None) == (name in MUST_TRACE)
    after = canonicalize().run(program).program
    assert not any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in after.graph.nodes)
    module = Toy(STEPS[name])
    module.embed.data.copy_(program.weights["embed"].load())
    graph = Interpreter(after)
    generator = torch.Generator().manual_seed(1)
    for count, start in ((5, 0), (1, 5), (3, 6)):
        tokens, position = torch.randint(0, 40, (1, count), generator=generator), torch.tensor([start])
        with torch.no_grad():
            expected = module(tokens, position)
        # one graph, the same operators in the same order: nothing may differ
        assert torch.equal(graph(tokens, position), expected)
        assert name not in ("_write", "_write_twice") or torch.equal(graph.state["cache"], module.cache)
