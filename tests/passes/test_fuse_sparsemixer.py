"""Routers that choose one expert at a time (sparsemixer): read in any spelling, refused where one step differs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.errors import CompileError
from moec.compiler.ops import FusedMoe, Routing
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program, module_path
from moec.passes.fuse_moe import fuse_moe
from moec.passes.narrow_routing import narrow_routing
from moec.passes.pipelines import fusion
from tests.harness import check_equal, run
from tests.passes import hand_zoo
from tests.passes.hand_zoo import Block, E, Forward, dense_loop, gathered, rows, scattered
from tests.passes.test_fuse_moe_mutants import no_mutant_is_miscompiled
from tests.variants import quick

INF = float("inf")
T = 0.75  # beyond the released 0.02: of five random logits some are near the best, some are not
Router = Callable[[Block, Tensor], tuple[Tensor, Tensor]]
FUSED: dict[str, tuple[Router, Routing, int]] = {}
REFUSED: dict[str, tuple[Router, str]] = {}


def fused(top_k: int = 2, **attributes: float | str) -> Callable[[Router], Router]:
    def add(router: Router) -> Router:
        routing = Routing(**{"score": "sparsemixer", "threshold": T, **attributes})  # type: ignore[arg-type]
        FUSED[router.__name__] = router, routing, top_k
        return router

    return add


def refused(reason: str) -> Callable[[Router], Router]:
    def add(router: Router) -> Router:
        REFUSED[router.__name__] = router, reason
        return router

    return add


def block(router: Router) -> Forward:
    def forward(s: Block, h: Tensor) -> Tensor:
        x = rows(h)
        weights, indices = router(s, F.linear(x, s.router))
        return gathered(s, x, weights, indices).view_as(h)

    return forward


def pick(left: Tensor, logits: Tensor, threshold: float = T) -> tuple[Tensor, Tensor]:
    """As it is released: (weight, index), both [N, 1]."""
    best, index = left.max(-1, keepdim=True)
    far = ((best - logits) / logits.abs().clamp(min=best)) > threshold
    return left.masked_fill(far, -INF).softmax(-1).gather(-1, index), index


def picks(logits: Tensor, count: int = 2, threshold: float = T) -> tuple[Tensor, Tensor]:
    left, found = logits, []
    for _ in range(count):
        found.append(pick(left, logits, threshold))
        left = left.scatter(-1, found[-1][1], -INF)
    return torch.cat([w for w, _ in found], -1), torch.cat([i for _, i in found], -1)


@fused()
def released(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    return picks(logits)


@fused(threshold=0.02)
def released_threshold(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    return picks(logits, threshold=0.02)


@fused(top_k=3)
def three_experts(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    return picks(logits, 3)


@fused(top_k=1)
def one_expert(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    return pick(logits, logits)


@fused(top_k=5)
def all_experts(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    return picks(logits, E)


@fused(normalize="sum", scale=2.0)
def normalized(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, indices = picks(logits)
    return weights / weights.sum(-1, keepdim=True) * 2.0, indices


@fused()
def by_argmax(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    """argmax, where, maximum, stack; the threshold over what is left, the lowest number for -inf."""
    left, weights, indices = logits, [], []
    for _ in range(2):
        index = left.argmax(-1)
        best = logits.gather(-1, index.unsqueeze(-1))
        far = (best - left) / torch.maximum(best, left.abs()) > T
        shares = F.softmax(torch.where(~far, left, torch.finfo(torch.float32).min), dim=-1)
        weights.append(shares.gather(-1, index[:, None]).squeeze(-1))
        indices.append(index)
        left = left.scatter(-1, index[:, None], torch.full_like(best, -INF))
    return torch.stack(weights, -1), torch.stack(indices, dim=1)


@fused()
def by_topk(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    first = logits.topk(1, -1).indices
    best = logits.amax(-1, keepdim=True)
    far = (best - logits) / logits.abs().clamp_min(best) > T
    w1 = torch.where(far, -INF, logits).softmax(-1).gather(-1, first)
    w2, second = pick(logits.scatter(-1, first, -INF), logits)
    return torch.concat((w1, w2), -1), torch.concat((first, second), -1)


@refused("expert 2 has the threshold 0.5, the first 0.75")
def two_thresholds(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    w1, first = pick(logits, logits)
    w2, second = pick(logits.scatter(-1, first, -INF), logits, 0.5)
    return torch.cat((w1, w2), -1), torch.cat((first, second), -1)


@refused("a finite number from 0 on")
def threshold_below_zero(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    return picks(logits, threshold=-0.1)


def _one_changed(mask: Callable[[Tensor, Tensor], Tensor], fill: float = -INF) -> Router:
    """The second expert's share is of other experts than `mask` (best, logits) leaves by the equations."""

    def router(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
        w1, first = pick(logits, logits)
        left = logits.scatter(-1, first, -INF)
        best, second = left.max(-1, keepdim=True)
        w2 = left.masked_fill(mask(best, logits), fill).softmax(-1).gather(-1, second)
        return torch.cat((w1, w2), -1), torch.cat((first, second), -1)

    return router


def _far(best: Tensor, logits: Tensor) -> Tensor:
    return (best - logits) / logits.abs().clamp(min=best) > T


RATIO = r"not \(best - logits\)"
for name, other, reason in (
    ("at_the_threshold_too", lambda b, v: (b - v) / v.abs().clamp(min=b) >= T, "not those beyond a threshold"),
    ("an_absolute_threshold", lambda b, v: b - v > T, RATIO),
    ("relative_to_the_best", lambda b, v: (b - v) / b > T, RATIO),
    ("relative_to_each", lambda b, v: (b - v) / v.abs() > T, RATIO),
    ("relative_to_the_smaller", lambda b, v: (b - v) / v.abs().clamp(max=b) > T, RATIO),
    ("signed", lambda b, v: (b - v) / v.clamp(min=b) > T, RATIO),
    ("the_near_ones", lambda b, v: ~_far(b, v), "not its share"),
    ("the_other_way", lambda b, v: (v - b) / v.abs().clamp(min=b) > T, RATIO),
    ("of_the_last_expert", lambda b, v: (v[:, -1:] - v) / v.abs().clamp(min=b) > T, RATIO),
):
    REFUSED[name] = _one_changed(other), reason
REFUSED["a_fill_that_softmax_sees"] = _one_changed(_far, -3.0), "not its share"


@refused("not its share")
def another_temperature(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    w1, first = pick(logits, logits)
    left = logits.scatter(-1, first, -INF)
    best, second = left.max(-1, keepdim=True)
    w2 = (left.masked_fill(_far(best, logits), -INF) * 2.0).softmax(-1).gather(-1, second)
    return torch.cat((w1, w2), -1), torch.cat((first, second), -1)


@refused("not taken of the experts that are left")
def shares_of_all(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    w1, first = pick(logits, logits)
    best, second = logits.scatter(-1, first, -INF).max(-1, keepdim=True)
    w2 = logits.masked_fill(_far(best, logits), -INF).softmax(-1).gather(-1, second)
    return torch.cat((w1, w2), -1), torch.cat((first, second), -1)


@refused("not taken of the experts that are left|not chosen from what is left")
def first_is_not_taken_out(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Its place gets the lowest of the others' logits, not -inf."""
    w1, first = pick(logits, logits)
    w2, second = pick(logits.scatter(-1, first, -2.0), logits)
    return torch.cat((w1, w2), -1), torch.cat((first, second), -1)


@refused("not chosen from what is left")
def second_of_the_near_ones(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Experts that are far from the first cannot be the second."""
    w1, first = pick(logits, logits)
    near = logits.masked_fill(_far(logits.gather(-1, first), logits), -1e3)
    w2, second = pick(near.scatter(-1, first, -INF), logits)
    return torch.cat((w1, w2), -1), torch.cat((first, second), -1)


@refused("not gathered with its own index")
def weights_exchanged(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    w1, one = pick(logits, logits)
    w2, two = pick(logits.scatter(-1, one, -INF), logits)
    return torch.cat((w2, w1), -1), torch.cat((one, two), -1)


@refused("not the best of those that are left|not chosen from what is left")
def twice_the_first(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    w1, first = pick(logits, logits)
    w2, second = pick(logits, logits)
    return torch.cat((w1, w2), -1), torch.cat((first, second), -1)


@refused("indices do not come from topk")
def the_worst_second(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    w1, first = pick(logits, logits)
    second = logits.scatter(-1, first, -INF).topk(1, -1, largest=False).indices
    return torch.cat((w1, w1), -1), torch.cat((first, second), -1)


@refused("not its share")
def by_sigmoid(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    w1, first = pick(logits, logits)
    left = logits.scatter(-1, first, -INF)
    best, second = left.max(-1, keepdim=True)
    w2 = left.masked_fill(_far(best, logits), -INF).sigmoid().gather(-1, second)
    return torch.cat((w1, w2), -1), torch.cat((first, second), -1)


@refused("not taken of the experts that are left|logits do not come from a linear|not \\(best - logits\\)")
def chosen_by_other_scores(s: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    """A bias changes the choice of the first and not its weight."""
    first = (logits + s.router_bias).argmax(-1, keepdim=True)
    best = logits.gather(-1, first)
    w1 = logits.masked_fill(_far(best, logits), -INF).softmax(-1).gather(-1, first)
    w2, second = pick(logits.scatter(-1, first, -INF), logits)
    return torch.cat((w1, w2), -1), torch.cat((first, second), -1)


def _in_a_loop(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    return dense_loop(s, x, scattered(x, *picks(F.linear(x, s.router)))).view_as(h)


def _biased(s: Block, h: Tensor) -> Tensor:
    x = rows(h)
    return gathered(s, x, *picks(F.linear(x, s.router, s.router_bias))).view_as(h)


def _blocks() -> dict[str, Forward]:
    blocks = {name: block(router) for name, (router, _, _) in FUSED.items()}
    return {**blocks, "in_a_loop": _in_a_loop, "biased": _biased}


@pytest.fixture(scope="module")
def before() -> Program:
    return hand_zoo.zoo(_blocks())


def test_fused_and_equal(before: Program) -> None:
    after = run_passes(before, fusion())
    check_equal(before, after)
    calls = {module_path(n): call for n in after.graph.nodes if (call := FusedMoe.find(n)) is not None}
    assert len(calls) == len(_blocks())
    for name, (_, routing, top_k) in FUSED.items():
        call = next(c for path, c in calls.items() if f".is_{name}." in f"{path}.")
        assert call.selection == routing
        assert call.top_k == top_k
    (biased,) = (c for path, c in calls.items() if ".is_biased" in path)
    assert biased.router_bias is not None
    assert any(".is_in_a_loop" in path for path in calls)


@pytest.mark.parametrize(
    "name", quick(REFUSED, ("two_thresholds", "another_temperature", "first_is_not_taken_out", "by_sigmoid"))
)
def test_refused(name: str) -> None:
    router, reason = REFUSED[name]
    program = hand_zoo.zoo({name: block(router)})
    result = run(fuse_moe(), run(narrow_routing(), program).program)
    assert result.changed == 0
    assert any(re.search(reason, r.reason) for r in result.refusals), [r.reason for r in result.refusals]
    with pytest.raises(CompileError, match="not fused") as caught:
        run_passes(program, fusion())
    assert ";" in str(caught.value), "a remedy is missing"


@pytest.mark.parametrize("name", quick(["released", "by_argmax"], ("released",)))
def test_no_mutant_is_miscompiled(name: str) -> None:
    no_mutant_is_miscompiled(hand_zoo.zoo({name: _blocks()[name]}))
