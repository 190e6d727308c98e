"""fuse_recurrence: a fold over tokens becomes gated_delta or selective_scan when its step computes one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

from moec.compiler.dialect import check_dialect
from moec.compiler.errors import CompileError
from moec.compiler.ops import GatedDelta, SelectiveScan
from moec.compiler.pipeline import run_passes
from moec.compiler.states import Replaced
from moec.passes.fuse_recurrence import fuse_recurrence
from moec.passes.pipelines import fusion
from tests.harness import check_refused, check_rule
from tests.passes.state_zoo import D, Delta, E, G, H, Selective, Toy, zoo
from tests.variants import quick

Steps = dict[str, Callable[..., Any]]


def _matmul(self: Delta, s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The same rule as products of matrices: S = decay S (1 - beta k k^T) + beta k v^T."""
    q, k = self.heads(self.normal(q)) / D**0.5, self.heads(self.normal(k))
    s = s * torch.exp(g).view(1, H, 1, 1)
    old = torch.matmul(k.unsqueeze(-2), s)
    s = s - beta.view(1, H, 1, 1) * torch.matmul(k.unsqueeze(-1), old - v.unsqueeze(-2))
    return s, torch.matmul(q.unsqueeze(-2), s).squeeze(-2)


def _as_they_are(self: Delta, x: Tensor) -> Tensor:
    return x * 0.3


def _einsum(
    self: Selective, s: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    b, c = self.heads(b), self.heads(c)
    s = s * torch.exp(dt * a)[..., None, None] + torch.einsum("bh,bhp,bhn->bhpn", dt, x, b)
    return s, torch.einsum("bhpn,bhn->bhp", s, c) + x * self.skip[:, None]


def _no_skip(
    self: Selective, s: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    b, c = self.heads(b), self.heads(c)
    s = s * (dt * a).exp()[..., None, None] + (dt[..., None] * x)[..., None] * b[..., None, :]
    return s, (s * c[..., None, :]).sum(-1)


FUSED: dict[str, tuple[type[Toy], Steps]] = {
    "delta": (Delta, {}),
    "delta by matrices": (Delta, {"step": _matmul}),
    "scan": (Selective, {}),
    "scan by einsum": (Selective, {"step": _einsum}),
    "scan without a skip": (Selective, {"step": _no_skip}),
}


@pytest.mark.parametrize("name", quick(FUSED, ("delta", "delta by matrices", "scan by einsum")))
def test_fused(name: str) -> None:
    kind, steps = FUSED[name]
    after = check_rule(fuse_recurrence(), zoo(kind, **steps), count=1)
    (call,) = [c for n in after.graph.nodes if (c := GatedDelta.find(n) or SelectiveScan.find(n))]
    if isinstance(call, GatedDelta):
        assert call.eps == 1e-6
        assert call.scale == pytest.approx(D**-0.5)
    else:
        assert (call.d is None) == ("without" in name)
    state = after.states["state_cache"]
    assert state.update == Replaced("gated_delta" if kind is Delta else "selective_scan")
    assert not state.rewinds
    assert not any(n.op == "get_attr" for n in after.graph.nodes)


def test_keys_that_are_not_normalized_are_taken_as_they_are() -> None:
    """A factor of both is no part of the operator: keys times 0.3 are another recurrence, queries another scale."""
    check_refused(fuse_recurrence(), zoo(Delta, normal=_as_they_are), "neither state nor result")

    def plain(self: Delta, x: Tensor) -> Tensor:
        return x

    after = check_rule(fuse_recurrence(), zoo(Delta, normal=plain), count=1)
    (call,) = [GatedDelta.of(n) for n in after.graph.nodes if GatedDelta.find(n)]
    assert call.eps < 0


# ---- what must not match: the nearest misses


def _changed(line: str) -> Callable[..., Any]:
    """The step of Delta with one line of it as given."""

    def step(self: Delta, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        q, k = self.heads(self.normal(q)) * D**-0.5, self.heads(self.normal(k))
        if line == "tiled heads":
            k = k.view(1, G, H // G, D).transpose(1, 2).reshape(1, H, D)
        if line == "value clamped":
            v = v.clamp(-50, 50)
        decayed = state * (g.exp() if line != "decay taken as a factor" else g)[..., None, None]
        if line == "a decay of keys":
            decayed = state * g.exp()[..., None, None] * 0.999
        recalled = ((state if line == "recalled before it fades" else decayed) * k[..., None]).sum(-2)
        rate = beta if line != "rate squared" else beta.square()
        delta = (
            (v - recalled) * rate[..., None] if line != "rate of the value alone" else v * rate[..., None] - recalled
        )
        new = decayed + k[..., None] * delta[..., None, :]
        if line == "nothing is replaced":
            new = decayed + k[..., None] * (v * beta[..., None])[..., None, :]
        read = {"read before the update": decayed, "read from the old state": state}.get(line, new)
        y = (read * q[..., None]).sum(-2)
        if line == "a norm of the result":
            y = y / (1e-3 + y.square().mean(-1, keepdim=True))
        if line == "the value is added":
            y = y + v
        if line == "the state is a mean":
            new = 0.5 * (new + new.mean(1, keepdim=True))
        return new, y

    return step


DELTAS = {
    "tiled heads": "neither state nor result",
    "value clamped": "is no arithmetic",
    "decay taken as a factor": "neither state nor result",
    "a decay of keys": "neither state nor result",
    "recalled before it fades": "neither state nor result",
    "rate squared": "neither state nor result",
    "rate of the value alone": "neither state nor result",
    "nothing is replaced": "neither state nor result",
    "read before the update": "the state is its, the result is not",
    "read from the old state": "the state is its, the result is not",
    "a norm of the result": "the state is its, the result is not",
    "the value is added": "the state is its, the result is not",
    "the state is a mean": "neither state nor result",
}


@pytest.mark.parametrize(
    "line",
    quick(DELTAS, ("value clamped", "decay taken as a factor", "recalled before it fades", "read from the old state")),
)
def test_refused_delta(line: str) -> None:
    check_refused(fuse_recurrence(), zoo(Delta, step=_changed(line)), DELTAS[line])


def _other_scan(line: str) -> Callable[..., Any]:
    def step(self: Selective, s: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Any:
        b, c = self.heads(b), self.heads(c)
        input_ = x if line == "input without its step" else dt[..., None] * x
        if line == "step limited":
            dt = dt.clamp(max=30.0)
        if line == "no step in the decay":
            dt = torch.ones_like(dt)
        faded = s * (dt * a).exp()[..., None, None]
        new = faded + input_[..., None] * b[..., None, :]
        if line == "bilinear":
            new = s * ((1 + dt * a / 2) / (1 - dt * a / 2))[..., None, None] + input_[..., None] * b[..., None, :]
        read = faded if line == "read before the update" else new
        y = (read * (b if line == "read by B" else c)[..., None, :]).sum(-1)
        return new, y if line == "skip of the state" else y + self.skip[:, None] * (
            x if line != "skip squared" else x * x
        )

    return step


SCANS = {
    "input without its step": "neither state nor result",
    "step limited": "is no arithmetic",
    "no step in the decay": "neither|no inputs",
    "bilinear": "neither state nor result",
    "read before the update": "the state is its, the result is not",
    "read by B": "the state is its, the result is not|no inputs",
    "skip squared": "the state is its, the result is not",
}


@pytest.mark.parametrize("line", quick(SCANS, ("input without its step", "step limited", "skip squared")))
def test_refused_scan(line: str) -> None:
    check_refused(fuse_recurrence(), zoo(Selective, step=_other_scan(line)), SCANS[line])


def test_a_fold_that_does_not_go_on_from_its_state_is_refused() -> None:
    def from_zero(self: Delta, x: Tensor, start: Tensor) -> Tensor:
        q, k = (w(x).unflatten(-1, (G, D)) for w in (self.q, self.k))
        given = (q, k, self.v(x).unflatten(-1, (H, E)), self.decay(x), self.b(x).sigmoid())
        state, y = scan(lambda s, t: self.step(s, *t), torch.zeros(1, H, D, E), given, dim=1)
        self.state_cache.copy_(state + 0.0 * self.state_cache)
        return self.o(y.flatten(2))

    check_refused(fuse_recurrence(), zoo(Delta, mix=from_zero), "not returned as the new content")


def test_what_is_left_is_an_error_with_its_place_and_reason() -> None:
    with pytest.raises(CompileError, match=r"recurrent layer was not fused.*the result is not") as caught:
        run_passes(zoo(Delta, step=_changed("the value is added")), fusion())
    assert caught.value.remedy is not None
    assert "gated delta rule" in caught.value.remedy


def test_the_text_of_a_program_shows_the_step() -> None:
    one, other = zoo(Delta), zoo(Delta, step=_changed("the value is added"))
    assert one.digest() != other.digest()
    check_dialect(one, after="export")
