"""The references of the layers with a state: against torch's own convolution, against closed forms, cut anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.ops import GatedDelta, SelectiveScan, ShortConv
from moec.compiler.ops.call import Call

T = 13
CUTS = [(0, 13), (0, 1, 13), (0, 5, 6, 13), (0, 12, 13), tuple(range(14))]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) * 1000 + sum(shape)))


def conv(silu: bool = True, taps: int = 4, channels: int = 6) -> ShortConv[Tensor]:
    bias = _random(channels) if silu else None
    x, weight, state = _random(1, T, channels), _random(taps, channels), _random(1, taps - 1, channels)
    return ShortConv(x, weight, bias, state, torch.tensor([3]), silu)


def delta(eps: float = 1e-6) -> GatedDelta[Tensor]:
    g, h, d, e = 2, 4, 5, 3
    decay, beta = -F.softplus(_random(1, T, h)), torch.sigmoid(_random(1, T, h))
    keys = [F.normalize(_random(1, T, g, d + i)[..., :d], dim=-1) for i in (0, 1)]
    return GatedDelta(*keys, _random(1, T, h, e), decay, beta, _random(1, h, d, e), torch.tensor([3]), 0.4, eps)


def selective(columns: int = 1, skip: bool = True) -> SelectiveScan[Tensor]:
    g, h, p, n = 2, 4, 3, 5
    dt, a = F.softplus(_random(1, T, h)), -_random(h, columns).exp()
    d = _random(h) if skip else None
    b, c = _random(1, T, g, n), _random(1, T, g, n + 1)[..., :n]
    return SelectiveScan(_random(1, T, h, p), dt, a, b, c, d, _random(1, h, p, n), torch.tensor([3]))


MADE: dict[str, Callable[[], Any]] = {
    "conv": conv,
    "conv of two taps, no silu": lambda: conv(silu=False, taps=2),
    "delta": delta,
    "delta of keys as they are": lambda: delta(eps=-1.0),
    "scan": selective,
    "scan, a decay for each n, no skip": lambda: selective(columns=5, skip=False),
}
FOLDED = {"x", "q", "k", "v", "decay", "beta", "dt", "b", "c"}


def pieces(call: Call[Tensor], cuts: tuple[int, ...], start: int = 3) -> tuple[Tensor, Tensor]:
    """Results of the pieces of a call, joined, and the state behind the last."""
    state = call.state.clone()  # type: ignore[attr-defined]
    results = []
    for a, b in itertools.pairwise(cuts):
        given = {n: getattr(call, n)[:, a:b] for n in FOLDED if getattr(call, n, None) is not None}
        part = type(call)(**{**vars(call), **given, "state": state, "start_pos": torch.tensor([start + a])})
        results.append(part.eager())
    return torch.cat(results, 1), state


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("cuts", CUTS[1:])
def test_a_sequence_cut_anywhere_gives_the_same_state_and_results(name: str, cuts: tuple[int, ...]) -> None:
    call = MADE[name]()
    (whole, state), (parts, other) = pieces(call, CUTS[0]), pieces(call, cuts)
    # torch rounds the sigmoid of the last elements of an array otherwise than the ones before
    torch.testing.assert_close(parts, whole, atol=1e-7 if name == "conv" else 0, rtol=0)
    torch.testing.assert_close(other, state, atol=0, rtol=0)


@pytest.mark.parametrize("name", MADE)
def test_position_zero_begins_anew(name: str) -> None:
    call = MADE[name]()
    zero = type(call)(**{**vars(call), "state": torch.zeros_like(call.state)})
    for a, b in zip(pieces(call, (0, 4, 13), start=0), pieces(zero, (0, 4, 13)), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("taps", [2, 3, 4, 7])
def test_short_conv_is_torch_s(taps: int) -> None:
    call = conv(silu=False, taps=taps)
    rows = torch.cat((call.state, call.x), 1).transpose(1, 2)
    wanted = F.conv1d(rows, call.weight.t().unsqueeze(1), groups=6).transpose(1, 2)
    torch.testing.assert_close(call.eager(), wanted, atol=1e-5, rtol=1e-5)  # fp32 sums of up to seven terms
    torch.testing.assert_close(call.state, rows.transpose(1, 2)[:, -(taps - 1) :], atol=0, rtol=0)


def chunked_delta(call: GatedDelta[Tensor]) -> tuple[Tensor, Tensor]:
    """The chunked form with one chunk (arXiv 2412.06464, section 3.3): a triangular system instead of a recurrence."""
    q, k = (call._normalized(x)[0].transpose(0, 1).double() for x in (call.q, call.k))  # [H, T, d]
    v, state = call.v[0].transpose(0, 1).double(), call.state[0].double()
    beta, total = call.beta[0].t().double()[..., None], call.decay[0].t().double().cumsum(-1)[..., None]
    fading = (total - total.transpose(1, 2)).exp().tril()
    system = torch.eye(T, dtype=torch.float64) + ((beta * k) @ k.transpose(1, 2) * fading).tril(-1)
    new = torch.linalg.solve_triangular(system, beta * (v - total.exp() * (k @ state)), upper=False)
    y = total.exp() * (q @ state) + ((q @ k.transpose(1, 2)) * fading) @ new
    end = total[:, -1:]
    after = end.exp() * state + ((end - total).exp() * k).transpose(1, 2) @ new
    return call.scale * y.transpose(0, 1).flatten(1)[None], after[None]


@pytest.mark.parametrize("eps", [1e-6, -1.0])
def test_the_delta_rule_in_chunks_is_the_recurrence(eps: float) -> None:
    call = delta(eps)
    y, state = chunked_delta(call)
    # the recurrence in fp32 against float64: thirteen steps, values of order one
    torch.testing.assert_close(call.eager().double(), y, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(call.state.double(), state, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("columns", [1, 5])
def test_the_scan_as_one_product_is_the_recurrence(columns: int) -> None:
    """y_t = sum over s <= t of c_t exp(sum of dt a) b_s dt_s x_s, the masked product of Mamba-2 (arXiv 2405.21060)."""
    call = selective(columns)
    dt, x = call.dt[0].double(), call.x[0].double()
    b, c = (v[0].double().repeat_interleave(2, 1) for v in (call.b, call.c))
    total = (dt[..., None] * call.a.double().expand(4, 5)).cumsum(0)  # [T, H, n]
    fading = (total[:, None] - total[None]).exp() * torch.ones(T, T).tril()[..., None, None]
    y = torch.einsum("thn,tshn,shn,sh,shp->thp", c, fading, b, dt, x)
    y = y + torch.einsum("thn,thn,hpn->thp", c, total.exp(), call.state[0].double()) + call.d.double()[:, None] * x
    torch.testing.assert_close(call.eager().double(), y.flatten(1)[None], atol=2e-5, rtol=1e-4)


WRONG: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "one tap": (conv, {"weight": _random(1, 6), "state": _random(1, 0, 6)}, "two taps or more"),
    "other channels": (conv, {"x": _random(1, T, 5)}, "x has 5 along 2"),
    "a state of other taps": (conv, {"state": _random(1, 4, 6)}, "state has 4 along 1"),
    "heads that do not divide": (delta, {"q": _random(1, T, 3, 5), "k": _random(1, T, 3, 5)}, "multiple of key heads"),
    "a rate for each key": (delta, {"beta": _random(1, T, 2)}, "beta has 2"),
    "a of another width": (selective, {"a": _random(4, 3)}, "a must be"),
    "groups that do not divide": (selective, {"b": _random(1, T, 3, 5)}, "multiple of groups"),
}


@pytest.mark.parametrize("name", WRONG)
def test_shapes_that_no_kernel_may_be_given(name: str) -> None:
    make, changes, message = WRONG[name]
    call = make()
    with pytest.raises(ValueError, match=message):
        type(call)(**{**vars(call), **changes}).fake()


@pytest.mark.parametrize("name", MADE)
def test_a_negative_position_is_refused(name: str) -> None:
    call = MADE[name]()
    with pytest.raises(ValueError, match="start_pos is -1"):
        type(call)(**{**vars(call), "start_pos": torch.tensor([-1])}).eager()
