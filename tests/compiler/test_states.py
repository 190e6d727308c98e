"""States: their sizes by hand, what is read off a graph that writes, and how passes change the declaration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moec.compiler.architecture import Cache
from moec.compiler.dialect import check_dialect
from moec.compiler.errors import CompileError
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program, Role
from moec.compiler.spec.quantization import Quantization
from moec.compiler.states import (
    PER_TOKEN_AND_HEAD,
    Appended,
    Codes,
    Positions,
    Replaced,
    Shifted,
    State,
    coded_type,
    key_value_states,
)
from moec.passes.check_router import check_router
from moec.passes.fuse_attention import fuse_attention
from moec.passes.quantize_weights import quantize_weights
from tests.harness import CONTEXT, export_toy
from tests.passes.moe_zoo import parameter
from tests.passes.test_fuse_attention import program as attention

KEYS = State("k", (1, Positions(), 2, 64), Appended(1))


def test_a_kv_cache_grows_with_the_context() -> None:
    assert KEYS.shape_at(100) == (1, 100, 2, 64)
    assert KEYS.bytes(100) == 100 * 2 * 64 * 4
    assert KEYS.grows
    assert KEYS.rewinds


@pytest.mark.parametrize(
    ("block", "scales"),
    [
        ((1, 1, 1, None), (1, 100, 2)),  # one for each position and head
        ((1, 1, 1, 32), (1, 100, 2, 2)),  # finer than a head
        ((1, 1, None, None), (1, 100, 1)),  # one for each position
        ((1, None, 1, None), (1, 1, 2)),  # one for each head
        ((1, 64, 1, 1), (1, 2, 2, 64)),  # one for each channel and 64 positions, the last ones fewer
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_any_block(block: tuple[int | None, ...], scales: tuple[int, ...], bits: int) -> None:
    state = replace(KEYS, codes=Codes(bits, block))
    held, factor = state.tensors(100)
    assert held.shape == (1, 100, 2, 64 * bits // 8)
    assert held.dtype == ("int8" if bits == 8 else "uint8")
    assert (factor.name, factor.shape, factor.dtype) == ("k_scale", scales, "float32")
    count = 1
    for extent in scales:
        count *= extent
    assert state.bytes(100) == 100 * 2 * 64 * bits // 8 + 4 * count


def test_states_that_do_not_grow_or_cannot_go_back() -> None:
    convolution = State("conv", (1, 512, 3), Shifted(2), dtype="float16")
    assert convolution.bytes(10) == convolution.bytes(100_000) == 512 * 3 * 2
    recurrent = State("h", (1, 16, 64, 128), Replaced("delta_rule"), layer="layers.3", readers=("layers.4",))
    assert not recurrent.rewinds
    assert not recurrent.grows
    rolling = State("k", (1, Positions(most=512), 2, 64), Appended(1, window=512))
    assert rolling.shape_at(100)[1] == 100
    assert rolling.shape_at(4096)[1] == 512
    assert not rolling.rewinds, "what left the window is gone"
    windowed = State("k", (1, Positions(), 2, 64), Appended(1, window=512))
    assert windowed.rewinds
    assert windowed.rows_are_positions
    assert not rolling.rows_are_positions
    assert coded_type([recurrent, KEYS]) is None
    assert coded_type([recurrent, replace(KEYS, codes=PER_TOKEN_AND_HEAD)]) == "int8"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: State("k", (1, 2), Appended(2)),
        lambda: State("k", (1, 2), Replaced(), dtype="float8"),
        lambda: replace(KEYS, codes=Codes(8, (1, None))),
        lambda: Codes(5, (1,)),
        lambda: Codes(8, (0,)),
    ],
)
def test_what_cannot_be_declared(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"axis|type|blocks"):
        wrong()


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_the_plan_counts_what_the_program_declares(kind: str) -> None:
    """A cache of the planner and the states of a compiled attention layer, byte for byte."""
    quantization = Quantization(weights="int8", kv_cache=kind, attention="fp32", ffn="fp32")
    fused = run_passes(attention(), [fuse_attention(), check_router()])
    done = quantize_weights(quantization).run(floats(fused)).program
    _, _, heads, width = (int(s) for s in next(iter(fused.states.values())).shape_at(CONTEXT))
    planned = Cache(heads, width, width).states(quantization.cache_codes)
    assert sum(s.bytes(CONTEXT) for s in done.states.values()) == sum(s.bytes(CONTEXT) for s in planned)
    held = {n: w for n, w in done.weights.items() if done.roles[n] is Role.CACHE}
    assert set(held) == set(done.state_tensors())
    for name, tensor in done.state_tensors().items():
        assert done.weights[name].shape == tensor.shape
        assert str(done.weights[name].dtype) == f"torch.{tensor.dtype}"


def floats(program: Program) -> Program:
    """Only the cache is quantized: the toy's weights are no multiples of a group."""
    return replace(program, roles={n: r if r is Role.CACHE else Role.NORM for n, r in program.roles.items()})


# ---- what a graph writes


class Toy(nn.Module):
    """`step(self, x [1, T, 6], start_pos)` with buffers that it writes."""

    def __init__(self, step: Callable[..., Tensor], **buffers: tuple[int, ...]) -> None:
        super().__init__()
        self.embed, self.step = parameter(40, 6), step
        for name, shape in buffers.items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x = nn.functional.embedding(tokens, self.embed)
        return self.step(self, x, start_pos + torch.arange(tokens.shape[1]))


def states(step: Callable[..., Tensor], **buffers: tuple[int, ...]) -> dict[str, State]:
    program = export_toy(lambda: Toy(step, **buffers))
    check_dialect(program, after="export")
    return dict(program.states)


def _append(axis: int) -> Callable[..., Tensor]:
    def step(toy: Toy, x: Tensor, at: Tensor) -> Tensor:
        rows = x if axis == 1 else x.transpose(1, 2)
        toy.k_cache.index_copy_(axis, at, rows)
        return x + toy.k_cache.sum()

    return step


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_rows_that_are_appended(axis: int) -> None:
    shape = (1, CONTEXT, 6) if axis == 1 else (1, 6, CONTEXT)
    (state,) = states(_append(axis), k_cache=shape).values()
    assert state.update == Appended(axis % 3)
    assert state.shape_at(7) == tuple(7 if s == CONTEXT else s for s in shape)


def test_a_buffer_shorter_than_the_context_rolls_and_a_longer_one_is_fixed() -> None:
    (short,) = states(_append(1), k_cache=(1, CONTEXT - 1, 6)).values()
    assert short.shape[1] == Positions(CONTEXT - 1)
    (long,) = states(_append(1), k_cache=(1, CONTEXT + 1, 6)).values()
    assert long.shape[1] == CONTEXT + 1


def test_what_is_written_otherwise_is_replaced() -> None:
    def recurrence(toy: Toy, x: Tensor, at: Tensor) -> Tensor:
        toy.h_cache.copy_(0.5 * toy.h_cache + x.sum(1))
        return x + toy.h_cache

    def two_axes(toy: Toy, x: Tensor, at: Tensor) -> Tensor:
        toy.h_cache.index_copy_(0, at[:1] * 0, x.sum(1))
        toy.h_cache.index_copy_(1, at[:1] * 0, x.sum(1)[:, :1])
        return x + toy.h_cache

    def through_a_view(toy: Toy, x: Tensor, at: Tensor) -> Tensor:
        toy.h_cache[:, 1:].add_(x.sum(1)[:, 1:])
        return x + toy.h_cache

    for step in (recurrence, two_axes, through_a_view):
        (state,) = states(step, h_cache=(1, 6)).values()
        assert state.update == Replaced(), step.__name__
        assert not state.rewinds


def test_what_is_only_read_is_no_state() -> None:
    assert states(lambda toy, x, at: x + toy.table, table=(1, 6)) == {}


# ---- passes


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_attention_and_quantization_keep_the_declaration(kind: str) -> None:
    fused = run_passes(attention(), [fuse_attention(), check_router()])
    assert {s.update for s in fused.states.values()} == {Appended(1)}
    assert all(s.layer for s in fused.states.values())
    quantization = Quantization(weights="int8", kv_cache=kind)
    done = quantize_weights(quantization).run(floats(fused)).program
    check_dialect(done, after="quantize_weights")
    assert {s.codes for s in done.states.values()} == {quantization.cache_codes}
    assert set(done.states) == set(fused.states)


def test_a_buffer_that_is_written_and_not_declared_is_illegal() -> None:
    fused = run_passes(attention(), [fuse_attention(), check_router()])
    with pytest.raises(CompileError, match="k_cache is written and is no state of the program"):
        check_dialect(replace(fused, states={}), after="a pass")
    name, state = next(iter(fused.states.items()))
    wrong = replace(fused, states={**fused.states, name: replace(state, codes=PER_TOKEN_AND_HEAD)})
    with pytest.raises(CompileError, match="is declared as"):
        check_dialect(wrong, after="a pass")


def test_key_and_value_states_may_differ_in_width() -> None:
    keys, values = key_value_states("layers.0", 2, 64, 32, window=5, codes=PER_TOKEN_AND_HEAD)
    assert (keys.name, values.name) == ("layers.0.k_cache", "layers.0.v_cache")
    assert keys.bytes(10) + values.bytes(10) == 10 * 2 * (64 + 32 + 8)
