"""fuse_short_conv: a depthwise convolution over carried inputs becomes one operator, however it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.ops import ShortConv
from moec.compiler.states import Shifted
from moec.passes.fuse_short_conv import fuse_short_conv
from tests.harness import check_refused, check_rule
from tests.passes.state_zoo import C, Conv, K, zoo
from tests.variants import quick

Steps = dict[str, Callable[..., Any]]


def _padded(self: Conv, z: Tensor) -> Tensor:
    """As transformers has it: zeros on both sides, of which the result's end is taken."""
    return F.conv1d(z, self.taps, self.bias, padding=K - 1, groups=C)[..., : z.shape[2]]


def _taps_in_turn(self: Conv, z: Tensor) -> Tensor:
    t = z.shape[2] - (K - 1)
    return sum(self.taps[:, 0, j, None] * z[..., j : j + t] for j in range(K)) + self.bias[:, None]  # type: ignore[return-value]


def _no_bias(self: Conv, z: Tensor) -> Tensor:
    return F.conv1d(z, self.taps, None, groups=C)


def _linear(self: Conv, y: Tensor) -> Tensor:
    return y


def _sigmoid_times(self: Conv, y: Tensor) -> Tensor:
    return torch.sigmoid(y) * y


def _times(self: Conv, state: Tensor, start: Tensor) -> Tensor:
    return state * (start > 0)


def _not_at_zero(self: Conv, state: Tensor, start: Tensor) -> Tensor:
    return torch.where(start >= 1, state, torch.zeros_like(state))


FUSED: dict[str, Steps] = {
    "plain": {},
    "padded": {"convolve": _padded},
    "taps in turn": {"convolve": _taps_in_turn},
    "no bias": {"convolve": _no_bias},
    "no activation": {"act": _linear},
    "its own sigmoid": {"act": _sigmoid_times},
    "state times a comparison": {"fresh": _times},
    "where the other way": {"fresh": _not_at_zero},
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    after = check_rule(fuse_short_conv(), zoo(Conv, **FUSED[name]), count=1)
    (call,) = [ShortConv.of(n) for n in after.graph.nodes if ShortConv.find(n)]
    assert (call.bias is None) == (name == "no bias")
    assert call.silu == (name != "no activation")
    state = after.states["conv_cache"]
    assert (state.shape, state.update) == ((1, K - 1, C), Shifted(axis=1))
    assert not state.rewinds


def test_a_state_that_is_longer_than_the_taps_need_is_cut() -> None:
    class Longer(Conv):
        kept = K + 2

    after = check_rule(fuse_short_conv(), zoo(Longer), count=1)
    assert after.states["conv_cache"].shape == (1, K - 1, C)


# ---- what must not match


def _forever(self: Conv, state: Tensor, start: Tensor) -> Tensor:
    return state.clone()


def _late(self: Conv, state: Tensor, start: Tensor) -> Tensor:
    return torch.where(start <= 1, torch.zeros(()), state)


def _never_at_nine(self: Conv, state: Tensor, start: Tensor) -> Tensor:
    return torch.where(start == 9, torch.zeros(()), torch.where(start == 0, torch.zeros(()), state))


def _ones(self: Conv, state: Tensor, start: Tensor) -> Tensor:
    return torch.where(start == 0, torch.ones(()), state)


def _behind(self: Conv, state: Tensor, x: Tensor) -> Tensor:
    return torch.cat((x, state), -1)


def _oldest(self: Conv, z: Tensor) -> Tensor:
    return z[..., : K - 1]


def _one_late(self: Conv, z: Tensor) -> Tensor:
    return z[..., -K:-1]


def _turned(self: Conv, z: Tensor) -> Tensor:
    return z[..., -(K - 1) :].flip(-1)


def _one_early(self: Conv, z: Tensor) -> Tensor:
    return F.conv1d(F.pad(z, (1, 0))[..., :-1], self.taps, self.bias, groups=C)


def _across(self: Conv, z: Tensor) -> Tensor:
    """Each channel sees its neighbour as well."""
    return F.conv1d(z + z.roll(1, 1), self.taps, self.bias, groups=C)


def _squared(self: Conv, z: Tensor) -> Tensor:
    return F.conv1d(z, self.taps.square(), self.bias, groups=C)


def _reversed(self: Conv, z: Tensor) -> Tensor:
    return F.conv1d(z, self.taps.flip(-1), self.bias, groups=C)


def _relu(self: Conv, y: Tensor) -> Tensor:
    return F.relu(y)


def _steeper(self: Conv, y: Tensor) -> Tensor:
    return y * torch.sigmoid(1.0001 * y)


def _bias_twice(self: Conv, y: Tensor) -> Tensor:
    return F.silu(y + 0.5)


REFUSED: dict[str, tuple[Steps, str]] = {
    "goes on where a sequence begins": ({"fresh": _forever}, "goes on where a sequence begins"),
    "zero at position one too": ({"fresh": _late}, "goes on where a sequence begins"),
    "zero at position nine too": ({"fresh": _never_at_nine}, "not put in front"),
    "one where a sequence begins": ({"fresh": _ones}, "goes on where a sequence begins"),
    "behind the call's inputs": ({"join": _behind}, "not put in front"),
    "the oldest are kept": ({"keep": _oldest}, "not the last"),
    "all but the newest are kept": ({"keep": _one_late}, "not the last"),
    "one tap early": ({"convolve": _one_early}, "does not compute"),
    "across channels": ({"convolve": _across}, "no value .* alone"),
    "squared taps": ({"convolve": _squared}, "does not compute"),
    "reversed taps": ({"convolve": _reversed}, "no value .* alone"),
}


@pytest.mark.parametrize(
    "name",
    quick(
        REFUSED,
        (
            "goes on where a sequence begins",
            "zero at position nine too",
            "behind the call's inputs",
            "all but the newest are kept",
            "one tap early",
            "across channels",
        ),
    ),
)
def test_refused(name: str) -> None:
    steps, reason = REFUSED[name]
    check_refused(fuse_short_conv(), zoo(Conv, **steps), reason)


@pytest.mark.parametrize("act", [_relu, _steeper, _bias_twice])
def test_what_follows_is_left_where_it_is(act: Callable[..., Any]) -> None:
    """Another activation is no part of the operator: the convolution alone is fused."""
    after = check_rule(fuse_short_conv(), zoo(Conv, act=act), count=1)
    (call,) = [ShortConv.of(n) for n in after.graph.nodes if ShortConv.find(n)]
    assert not call.silu


def test_a_state_kept_in_another_order_is_another_one() -> None:
    result = fuse_short_conv().run(zoo(Conv, keep=_turned))
    assert result.changed == 0
