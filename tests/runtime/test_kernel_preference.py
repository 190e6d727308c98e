"""Cache-aware selection in the kernel: which experts of a token that is run alone are selected, against numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from moec.compiler.ops.attributes import Routing
from moec.runtime import kernel_api
from moec.runtime.moe_config import WeightFormat
from tests.runtime.kernel_cases import random_block
from tests.runtime.test_kernel_moe import ROUTINGS

EXPERTS, TOP_K = 24, 5
_BEGIN = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
)
_PREFERRED = ctypes.CFUNCTYPE(
    ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)
)


class _Source(ctypes.Structure):
    """moec_expert_source: `begin` declines, so that experts are read from memory."""

    _fields_ = (
        ("user", ctypes.c_void_p),
        ("begin", _BEGIN),
        ("acquire", ctypes.c_void_p),
        ("release", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("preferred", _PREFERRED),
        ("routed", ctypes.c_void_p),
    )


class Preferring:
    """Installs flags and a share for this thread's calls; counts how often the kernel asked."""

    def __init__(self, flags: np.ndarray, share: float) -> None:
        self.flags, self.share, self.asked = np.ascontiguousarray(flags, np.uint8), share, 0
        self._source = _Source(None, _BEGIN(lambda *_: 0), None, None, None, _PREFERRED(self._preferred), None)

    def _preferred(self, _user: int, _w13: int, experts: int, flags: ctypes._Pointer[ctypes.c_void_p]) -> float:
        assert experts == len(self.flags)
        self.asked += 1
        flags[0] = self.flags.ctypes.data
        return self.share

    def __enter__(self) -> Preferring:
        kernel_api.library().moec_use_expert_source(ctypes.byref(self._source))
        return self

    def __exit__(self, *_: object) -> None:
        kernel_api.library().moec_use_expert_source(None)


@pytest.fixture(autouse=True)
def _own_pool() -> Iterator[None]:
    kernel_api.use_own_pool()
    yield
    kernel_api.set_threads(1)


def choices(how: Routing, logits: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """What a token's experts are selected by, [E]; NaN where their group was left out."""
    shift = np.zeros_like(logits) if bias is None else bias

    def score(x: np.ndarray) -> np.ndarray:
        if how.score == "softmax":
            return np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        return 1 / (1 + np.exp(-x)) if how.score == "sigmoid" else np.sqrt(np.log1p(np.exp(x)))

    if how.selects_logits:
        found = logits + shift
    else:
        found = score(logits + shift) if how.bias_on == "logits" else score(logits) + shift
    if how.groups:
        groups = found.reshape(how.groups, -1)
        best = np.sort(groups)[:, -2:].sum(1) if how.group_score == "top2sum" else groups.max(1)
        groups[np.argsort(-best)[how.keep :]] = np.nan
    return found


@pytest.mark.parametrize("share", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("how", ROUTINGS, ids=str)
def test_the_rule(how: Routing, share: float) -> None:
    rng = np.random.default_rng(7)
    bias = how.score != "sparsemixer"
    block = random_block(
        rng, experts=EXPERTS, d=64, width=8, top_k=TOP_K, routed=WeightFormat(), how=how, router_bias=True,
        selection_bias=bias,
    )  # fmt: skip
    tensors = block.prepared.tensors
    agree = changed = 0
    for _ in range(100):
        x = rng.standard_normal((1, 64), dtype=np.float32)
        flags = rng.random(EXPERTS) < 0.4
        plain, plain_weights = block.prepared(x)[1:]
        with Preferring(flags, share) as source:
            _, indices, weights = block.prepared(x)
            pair = block.prepared(np.concatenate([x, x]))
        assert source.asked == 1  # not for two tokens
        assert np.array_equal(pair[1][0], plain[0])
        logits = (x.astype(np.float64) @ tensors.router_weight.T.astype(np.float64))[0] + tensors.router_bias
        choice = choices(how, logits, tensors.selection_bias if bias else None)
        allowed = ~np.isnan(choice)
        raised = choice + share * (np.nanmax(choice) - np.nanmin(choice)) * flags
        raised[np.nanargmax(choice)] = np.inf
        raised[~allowed] = -np.inf
        wanted = np.argsort(-raised)[:TOP_K]
        agree += set(wanted) == set(indices[0])
        changed += set(plain[0]) != set(indices[0])
        # whatever rounding does: distinct, the best one first, and in the router's own order
        assert len(set(indices[0])) == TOP_K
        assert indices[0, 0] == plain[0, 0]
        if set(wanted) == set(indices[0]):
            assert (np.diff(choice[indices[0]]) < 1e-6).all()
        if set(plain[0]) == set(indices[0]):
            assert np.array_equal(weights, plain_weights)
    # logits differ in the last bits of fp32, so only a choice nearer than 1e-6 to the next can fall the other way
    assert agree >= 99
    assert changed > 20 or share < 0.1


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_preferred_or_everything_changes_nothing(threads: int) -> None:
    kernel_api.set_threads(threads)
    rng = np.random.default_rng(1)
    block = random_block(
        rng, experts=EXPERTS, d=64, width=32, top_k=TOP_K, routed=WeightFormat(), how=Routing(score="sigmoid"),
    )  # fmt: skip
    x = rng.standard_normal((1, 64), dtype=np.float32)
    plain = block.prepared(x)
    for flags, share in ((np.zeros(EXPERTS), 0.5), (np.ones(EXPERTS), 0.5), (np.ones(EXPERTS), 0.0)):
        with Preferring(flags, share):
            for mine, theirs in zip(block.prepared(x), plain, strict=True):
                assert np.array_equal(mine, theirs)


def test_values_that_are_no_numbers_give_valid_experts() -> None:
    rng = np.random.default_rng(2)
    block = random_block(rng, experts=EXPERTS, d=64, width=8, top_k=TOP_K, routed=WeightFormat(), how=Routing())
    for value in (np.nan, np.inf, 0.0, 3e38):
        with Preferring(rng.random(EXPERTS) < 0.5, 1.0):
            indices = block.prepared(np.full((1, 64), value, np.float32))[1][0]
        assert len(set(indices)) == TOP_K
        assert indices.min() >= 0
        assert indices.max() < EXPERTS
