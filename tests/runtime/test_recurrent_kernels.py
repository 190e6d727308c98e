"""The kernels of layers with a state against their references: odd sizes, instruction sets, cuts, threads, faults."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.ops import GatedDelta, SelectiveScan, ShortConv
from moec.runtime import kernel_api
from tests.runtime.kernel_cases import instruction_sets
from tests.runtime.recurrent_calls import arguments, fault, run
from tests.variants import few

# Both sides round fp32 sums of up to 128 terms in another order, some forty tokens deep; e^x differs in its last bits.
ATOL, RTOL = 3e-5, 2e-4
FOLDED = {"x", "q", "k", "v", "decay", "beta", "dt", "b", "c"}


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    kernel_api.set_isa(request.param)
    yield request.param
    kernel_api.set_isa("auto")


def _made(seed: int) -> Any:
    """A call of random odd sizes, of each operator in turn."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = int(rng.choice([1, 1, 2, 3, 7, 40]))
    start = torch.tensor([int(rng.choice([0, 5]))])
    groups = int(rng.integers(1, 4))
    heads = groups * int(rng.integers(1, 4))
    if seed % 3 == 0:
        taps, channels = int(rng.integers(2, 6)), int(rng.choice([1, 15, 16, 17, 64, 200]))
        bias = random(channels) if rng.random() < 0.5 else None
        x, weight, state = random(1, tokens, channels), random(taps, channels), random(1, taps - 1, channels)
        return ShortConv(x, weight, bias, state, start, bool(rng.random() < 0.5))
    if seed % 3 == 1:
        d, e = int(rng.choice([1, 6, 64, 128])), int(rng.choice([1, 15, 16, 33, 96]))
        eps = 1e-6 if rng.random() < 0.7 else -1.0
        q, k = (F.normalize(random(1, tokens, groups, d), dim=-1) * (1.0 if eps < 0 else 3.0) for _ in range(2))
        decay, beta = -F.softplus(random(1, tokens, heads)), torch.sigmoid(random(1, tokens, heads))
        return GatedDelta(q, k, random(1, tokens, heads, e), decay, beta, random(1, heads, d, e), start, 0.3, eps)
    p, n = int(rng.choice([1, 3, 16, 64])), int(rng.choice([1, 15, 16, 40, 128]))
    columns = int(rng.choice([1, n]))
    dt, a = F.softplus(random(1, tokens, heads)), -random(heads, columns).exp()
    b, c = (random(1, tokens, groups, n) * n**-0.5 for _ in range(2))
    skip = random(heads) if rng.random() < 0.5 else None
    return SelectiveScan(random(1, tokens, heads, p), dt, a, b, c, skip, random(1, heads, p, n), start)


def _copied(call: Any) -> Any:
    return type(call)(**{**vars(call), "state": call.state.clone()})


@pytest.mark.parametrize("seed", few(range(60), 18))
def test_the_kernel_computes_the_reference(isa: str, seed: int) -> None:
    call, other = _made(seed), _copied(_made(seed))
    found, wanted = run(call), other.eager()
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=RTOL)
    torch.testing.assert_close(call.state, other.state, atol=ATOL, rtol=RTOL)


def _cut(call: Any, cuts: list[int]) -> tuple[Tensor, Tensor]:
    state, results, start = call.state.clone(), [], int(call.start_pos)
    for a, b in itertools.pairwise(cuts):
        given = {n: getattr(call, n)[:, a:b] for n in FOLDED if getattr(call, n, None) is not None}
        part = type(call)(**{**vars(call), **given, "state": state, "start_pos": torch.tensor([start + a])})
        results.append(run(part))
    return torch.cat(results, 1), state


@pytest.mark.parametrize("seed", range(18))
def test_cuts_threads_and_instruction_sets_do_not_change_a_bit(seed: int) -> None:
    call = _made(seed)
    tokens = call.fake().shape[1]
    kernel_api.set_isa("scalar")
    wanted = _cut(call, [0, tokens])
    try:
        for name in kernel_api.available_isas():
            kernel_api.set_isa(name)
            for cuts in ([0, tokens], list(range(tokens + 1)), sorted({0, tokens // 3, tokens})):
                for threads in (1, 4):
                    kernel_api.set_threads(threads)
                    for a, b in zip(_cut(call, cuts), wanted, strict=True):
                        assert torch.equal(a, b), f"{name}, cut at {cuts}, {threads} threads"
    finally:
        kernel_api.set_isa("auto")
        kernel_api.set_threads(1)


def test_large_decays_and_steps_stay_finite(isa: str) -> None:
    """e^-1000 is nothing, as in the reference."""
    call = _made(1)
    call.decay.fill_(-1000.0)
    other = _copied(call)
    torch.testing.assert_close(run(call), other.eager(), atol=ATOL, rtol=RTOL)


def test_no_tokens_leave_the_state_as_it_is(isa: str) -> None:
    for seed in range(3):
        call = _made(seed)
        given = {n: getattr(call, n)[:, :0] for n in FOLDED if getattr(call, n, None) is not None}
        empty = type(call)(**{**vars(call), **given, "state": call.state.clone()})
        assert run(empty).shape[1] == 0
        assert torch.equal(empty.state, call.state)


SIZES = {
    0: ["tokens", "channels", "taps"],
    1: ["tokens", "key_heads", "heads", "key_dim", "value_dim"],
    2: ["tokens", "heads", "groups", "head_dim", "state_dim", "a_columns"],
}
HOSTILE = [-1, 0, 1 << 20, (1 << 31) - 1, 1 << 32, 1 << 62, (1 << 63) - 1]


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_hostile_sizes_are_refused(seed: int) -> None:
    """Every size one at a time, and every buffer a byte short, absent or askew: an error with a name, no access."""
    call = _made(seed)
    before = call.state.clone()
    for field in SIZES[seed % 3]:
        for value in HOSTILE:
            out = np.zeros(tuple(call.fake().shape), np.float32)
            name, args, kept = arguments(call, out)
            if value == getattr(args, field) or (field == "a_columns" and value == 1):
                continue
            setattr(args, field, value)
            if field == "tokens" and value == 0:
                continue  # buffers of more than nothing: refused below
            assert fault(name, args).startswith(name.removeprefix("moec_"))
            assert torch.equal(call.state, before)
            del kept
    out = np.zeros(tuple(call.fake().shape), np.float32)
    name, args, kept = arguments(call, out)
    for field, kind in args._fields_:
        if kind is ctypes.c_int64 or not hasattr(getattr(args, field), "bytes") or not getattr(args, field).bytes:
            continue
        buffer = getattr(args, field)
        data, size = buffer.data, buffer.bytes
        for wrong in ((data, size - 1), (data, size + 4), (data + 1, size), (None, size)):
            buffer.data, buffer.bytes = wrong
            assert field in fault(name, args)
        buffer.data, buffer.bytes = data, size
    args.start_pos = -1
    assert "position -1" in fault(name, args)
    assert torch.equal(call.state, before)
    del kept
