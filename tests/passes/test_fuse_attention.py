"""fuse_attention: a cache update and masked attention become one operator, if the mask and the positions are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from moec.compiler.matching import evaluate
from moec.compiler.ops import CachedAttention
from moec.compiler.program import Program, Role
from moec.passes.fuse_attention import fuse_attention
from tests.harness import CONTEXT, check_refused, check_rule, replace_steps, run
from tests.passes.attention_zoo import export_residual
from tests.passes.moe_zoo import Linear, parameter

HEADS, KV, WIDTH, D = 4, 2, 6, 10


class Attention(nn.Module):
    """Grouped-query attention over a cache; every step is a method that a variant can replace."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, **steps: Callable[..., Any]) -> None:
        super().__init__()
        self.q, self.k, self.v = Linear(D, HEADS * WIDTH), Linear(D, KV * WIDTH), Linear(D, KV * WIDTH)
        self.o = Linear(HEADS * WIDTH, D)
        self.register_buffer("k_cache", torch.zeros(1, CONTEXT, KV, WIDTH))
        self.register_buffer("v_cache", torch.zeros(1, CONTEXT, KV, WIDTH))
        replace_steps(self, steps)

    def positions(self, x: Tensor, start: Tensor) -> Tensor:
        return start + torch.arange(x.shape[1])

    def mask(self, positions: Tensor) -> Tensor:
        return torch.arange(CONTEXT) <= positions.unsqueeze(1)

    def write(self, positions: Tensor, k: Tensor, v: Tensor) -> None:
        self.k_cache.index_copy_(1, positions, k)
        self.v_cache.index_copy_(1, positions, v)

    def attend(self, q: Tensor, mask: Tensor) -> Tensor:
        k, v = self.k_cache.transpose(1, 2), self.v_cache.transpose(1, 2)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)

    def merge(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(-2)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        positions = self.positions(x, start)
        q = self.q(x).unflatten(-1, (HEADS, WIDTH))
        k, v = (p(x).unflatten(-1, (KV, WIDTH)) for p in (self.k, self.v))
        self.write(positions, k, v)
        return self.o(self.merge(self.attend(q, self.mask(positions))))


def program(**steps: Callable[..., Any]) -> Program:
    return export_residual(lambda: Attention(**steps), D)


def _call(after: Program) -> CachedAttention[Node]:
    return next(call for n in after.graph.nodes if (call := CachedAttention[Node].find(n)) is not None)


def test_global() -> None:
    after = check_rule(fuse_attention(), program(), count=1, golden="fuse_attention")
    assert "index_copy" not in after.text()
    assert _call(after).scale == pytest.approx(WIDTH**-0.5)
    assert _call(after).window == 0
    assert after.roles["attention.k_cache"] is Role.CACHE


@pytest.mark.parametrize("window", [1, 5, CONTEXT - 1])
def test_window(window: int) -> None:
    def mask(self: Attention, positions: Tensor) -> Tensor:
        keys = torch.arange(CONTEXT)
        return (keys <= positions.unsqueeze(1)) & (keys > positions.unsqueeze(1) - window)

    assert _call(check_rule(fuse_attention(), program(mask=mask), count=1)).window == window


@pytest.mark.parametrize(("chunk", "window"), [(None, 0), (1 << 16, None)])
def test_a_large_cache_is_sampled_in_few_rows(chunk: int | None, window: int | None) -> None:
    """Of so many elements only; whoever attends within chunks is still refused."""
    size, rows = 1 << 22, []

    def values(calls: list[evaluate.Call]) -> Iterator[Tensor]:
        keys = torch.arange(size, dtype=torch.int32)[None, :]
        for call in calls:
            rows.append(call.tokens)
            at = torch.arange(call.start, call.start + call.tokens, dtype=torch.int32)[:, None]
            causal = keys <= at
            yield causal if chunk is None else causal & (keys // chunk == at // chunk)

    assert evaluate.window_of_mask(values, size, max_tokens=128) == window
    assert max(rows) * size <= evaluate.MAX_ELEMENTS
    assert chunk is not None or max(rows) == 16


def test_additive_mask() -> None:
    def mask(self: Attention, positions: Tensor) -> Tensor:
        hidden = torch.arange(CONTEXT) > positions.unsqueeze(1)
        return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]

    assert _call(check_rule(fuse_attention(), program(mask=mask), count=1)).window == 0


def test_scale() -> None:
    def attend(self: Attention, q: Tensor, mask: Tensor) -> Tensor:
        k, v = self.k_cache.transpose(1, 2), self.v_cache.transpose(1, 2)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=0.3, enable_gqa=True)

    assert _call(check_rule(fuse_attention(), program(attend=attend), count=1)).scale == 0.3


# ------------------------------------------------------------------------------------------------- what must be refused


def _not_causal(self: Attention, positions: Tensor) -> Tensor:
    return torch.arange(CONTEXT) <= positions.unsqueeze(1) + 1


def _without_itself(self: Attention, positions: Tensor) -> Tensor:
    return (torch.arange(CONTEXT) < positions.unsqueeze(1)) | (torch.arange(CONTEXT) == 0)


def _chunked(self: Attention, positions: Tensor) -> Tensor:
    keys = torch.arange(CONTEXT)
    same = keys // 8 == positions.unsqueeze(1) // 8
    return (keys <= positions.unsqueeze(1)) & same


def _sink(self: Attention, positions: Tensor) -> Tensor:
    """A window that also keeps the first position: right at every call shorter than the window."""
    keys = torch.arange(CONTEXT)
    near = keys > positions.unsqueeze(1) - 6
    return (keys <= positions.unsqueeze(1)) & (near | (keys == 0))


def _soft(self: Attention, positions: Tensor) -> Tensor:
    hidden = torch.arange(CONTEXT) > positions.unsqueeze(1)
    return torch.zeros(hidden.shape).masked_fill(hidden, -100.0)


def _reversed(self: Attention, x: Tensor, start: Tensor) -> Tensor:
    return start + x.shape[1] - 1 - torch.arange(x.shape[1])


def _strided(self: Attention, x: Tensor, start: Tensor) -> Tensor:
    return (start + 2 * torch.arange(x.shape[1])) % CONTEXT


def _from_zero(self: Attention, x: Tensor, start: Tensor) -> Tensor:
    return start * 0 + torch.arange(x.shape[1])


def _rolling(self: Attention, x: Tensor, start: Tensor) -> Tensor:
    return (start + torch.arange(x.shape[1])) % (CONTEXT - 4)


def _another_reader(self: Attention, y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(-2) + self.k_cache.mean()


def _reader_of_a_view(self: Attention, q: Tensor, mask: Tensor) -> Tensor:
    k, v = self.k_cache.transpose(1, 2), self.v_cache.transpose(1, 2)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True) + v.mean()


def _no_mask(self: Attention, q: Tensor, mask: Tensor) -> Tensor:
    k, v = self.k_cache.transpose(1, 2), self.v_cache.transpose(1, 2)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)


def _values_are_keys(self: Attention, q: Tensor, mask: Tensor) -> Tensor:
    k = self.k_cache.transpose(1, 2)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, k, attn_mask=mask, enable_gqa=True)


def _added(self: Attention, positions: Tensor, k: Tensor, v: Tensor) -> None:
    self.k_cache.index_add_(1, positions, k)
    self.v_cache.index_copy_(1, positions, v)


def _not_kept(self: Attention, positions: Tensor, k: Tensor, v: Tensor) -> None:
    """The update is used and forgotten: the buffer keeps its old content."""
    self.written = (self.k_cache.index_copy(1, positions, k), self.v_cache.index_copy(1, positions, v))


def _of_the_forgotten(self: Attention, q: Tensor, mask: Tensor) -> Tensor:
    k, v = (c.transpose(1, 2) for c in self.written)  # type: ignore[union-attr]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)


def _heads_not_merged(self: Attention, y: Tensor) -> Tensor:
    return y.transpose(1, 3).flatten(-2).transpose(1, 2).reshape(1, -1, HEADS * WIDTH)


REFUSED: list[tuple[dict[str, Callable[..., Any]], str]] = [
    ({"mask": _not_causal}, "mask is neither causal"),
    ({"mask": _without_itself}, "mask is neither causal"),
    ({"mask": _chunked}, "mask is neither causal"),
    ({"mask": _sink}, "mask is neither causal"),
    ({"mask": _soft}, "mask is neither causal"),
    ({"positions": _reversed}, "not written at start_pos"),
    ({"positions": _strided}, "not written at start_pos"),
    ({"positions": _from_zero}, "not written at start_pos"),
    ({"positions": _rolling}, "not written at start_pos"),
    ({"merge": _another_reader}, "another reader"),
    ({"attend": _reader_of_a_view}, "another reader"),
    ({"attend": _no_mask}, "without a mask"),
    ({"attend": _values_are_keys}, "another reader|two caches"),
    ({"write": _added}, "index_copy"),
    ({"write": _not_kept, "attend": _of_the_forgotten}, "not returned as the new content"),
    ({"merge": _heads_not_merged}, "heads are not merged"),
]


@pytest.mark.parametrize(
    ("steps", "reason"), REFUSED, ids=["+".join(f.__name__.strip("_") for f in s.values()) for s, _ in REFUSED]
)
def test_refused(steps: dict[str, Callable[..., Any]], reason: str) -> None:
    check_refused(fuse_attention(), program(**steps), reason)


# ---- one cache that several layers read


class Sharing(Attention):
    """A second attention with queries of its own over the cache that the first one writes."""

    def __init__(self, **steps: Callable[..., Any]) -> None:
        super().__init__(**steps)
        self.q2, self.o2 = Linear(D, HEADS * WIDTH), Linear(HEADS * WIDTH, D)

    def second_mask(self, positions: Tensor) -> Tensor:
        return self.mask(positions)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        first = super().forward(x, start)
        q = self.q2(x + first).unflatten(-1, (HEADS, WIDTH))
        return first + self.o2(self.merge(self.attend(q, self.second_mask(self.positions(x, start)))))


def test_layers_that_share_a_cache() -> None:
    after = check_rule(fuse_attention(), export_residual(Sharing, D), count=2)
    calls = [c for n in after.graph.nodes if (c := CachedAttention[Node].find(n)) is not None]
    assert len({(c.k_cache, c.v_cache) for c in calls}) == 1
    assert all(len(after.states[f"attention.{part}_cache"].readers) == 1 for part in "kv")


def test_layers_that_share_a_cache_are_fused_together_or_not_at_all() -> None:
    class Backwards(Sharing):
        def second_mask(self, positions: Tensor) -> Tensor:
            return torch.arange(CONTEXT) >= positions.unsqueeze(1)

    refused = check_refused(fuse_attention(), export_residual(Backwards, D), "mask is neither causal")
    assert len(refused.refusals) == 2


# ---- spelled out in products, with attention sinks or without


class Spelled(Attention):
    """The same attention in products around a softmax; a sink is a score of each head that weighs no value."""

    def __init__(self, **steps: Callable[..., Any]) -> None:
        super().__init__()
        self.sinks = parameter(HEADS)
        replace_steps(self, steps)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(2, 3)) * 0.3

    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores + torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    def beside(self, scores: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], -1)
        return torch.cat((scores, sinks), -1)

    def shifted(self, scores: Tensor) -> Tensor:
        return scores - scores.max(-1, keepdim=True).values

    def kept(self, weights: Tensor) -> Tensor:
        return weights[..., :-1]

    def weigh(self, weights: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(weights, v)

    def merge(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).reshape(1, -1, HEADS * WIDTH)

    def attend(self, q: Tensor, mask: Tensor) -> Tensor:
        k, v = (
            c.transpose(1, 2)[:, :, None].expand(-1, -1, HEADS // KV, -1, -1).reshape(1, HEADS, CONTEXT, WIDTH)
            for c in (self.k_cache, self.v_cache)
        )
        scores = self.masked(self.scores(q.transpose(1, 2), k), mask)
        return self.weigh(self.kept(torch.softmax(self.shifted(self.beside(scores)), -1)), v)


def spelled(**steps: Callable[..., Any]) -> Program:
    return export_residual(lambda: Spelled(**steps), D)


def _same(self: Any, value: Tensor) -> Tensor:
    return value


def _window_of_five(self: Spelled, positions: Tensor) -> Tensor:
    keys = torch.arange(CONTEXT)
    return (keys <= positions.unsqueeze(1)) & (keys > positions.unsqueeze(1) - 5)


def _chosen(self: Spelled, scores: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, scores, -torch.inf)


def _filled(self: Spelled, scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -torch.inf)


def _scaled_query(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return (q * 0.3) @ k.transpose(-1, -2)


def _divided(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhtd,bhsd->bhts", q, k) / 3.5


def _summed(self: Spelled, weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bhse->bhte", weights, v)


def _capped(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return 5.0 * torch.tanh(q @ k.transpose(2, 3) * 0.3 / 5.0)


def _capped_signs_turned(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(q @ k.transpose(2, 3) * -0.06) * -5.0


def _capped_at_one(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(q @ k.transpose(2, 3) * 0.3)


NO_SINK = {"beside": _same, "kept": _same}
SPELLINGS: dict[str, dict[str, Callable[..., Any]]] = {
    "sinks": {},
    "sinks in a window": {"mask": _window_of_five},
    "sinks, nothing subtracted": {"shifted": _same},
    "sinks, chosen": {"masked": _chosen, "scores": _scaled_query},
    "none": NO_SINK,
    "none, nothing subtracted": {**NO_SINK, "shifted": _same},
    "sinks, capped": {"scores": _capped},
    "none, capped": {**NO_SINK, "scores": _capped, "shifted": _same},
    "none, capped, signs turned": {**NO_SINK, "scores": _capped_signs_turned},
    "none, capped, filled": {**NO_SINK, "scores": _capped_at_one, "masked": _filled},
    "none, filled, divided": {**NO_SINK, "masked": _filled, "scores": _divided, "weigh": _summed},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelled_out(name: str) -> None:
    call = _call(check_rule(fuse_attention(), spelled(**SPELLINGS[name]), count=1))
    assert (call.sinks is not None) == name.startswith("sinks")
    assert call.window == (5 if "window" in name else 0)
    assert call.softcap == (0.0 if "capped" not in name else 1.0 if "filled" in name else 5.0)
    assert "capped" not in name or call.scale == pytest.approx(0.3)


def _own_of_each_token(self: Spelled, scores: Tensor) -> Tensor:
    sinks = self.sinks.reshape(1, -1, 1, 1) * torch.arange(scores.shape[2])[:, None]
    return torch.cat((scores, sinks), -1)


def _two_sinks(self: Spelled, scores: Tensor) -> Tensor:
    sinks = self.sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 2)
    return torch.cat((scores, sinks), -1)


def _without_two(self: Spelled, weights: Tensor) -> Tensor:
    return weights[..., :-2]


def _in_front(self: Spelled, scores: Tensor) -> Tensor:
    sinks = self.sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], -1)
    return torch.cat((sinks, scores), -1)


def _without_the_first_key(self: Spelled, weights: Tensor) -> Tensor:
    return weights[..., 1:]


def _capped_at_nothing(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return 0.0 * torch.tanh(q @ k.transpose(2, 3))


def _capped_twice(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(torch.tanh(q @ k.transpose(2, 3)))


def _capped_per_head(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(q @ k.transpose(2, 3)) * self.sinks.view(1, -1, 1, 1)


def _squashed(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.transpose(2, 3)) * 5.0


def _capped_with_its_mask(self: Spelled, scores: Tensor, mask: Tensor) -> Tensor:
    hidden = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return 5.0 * torch.tanh((scores + hidden) / 5.0)


def _read_before_the_cap(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    return 5.0 * torch.tanh(scores / 5.0) + 0.1 * scores


def _mean_subtracted(self: Spelled, scores: Tensor) -> Tensor:
    return scores - scores.mean(-1, keepdim=True)


def _largest_of_all(self: Spelled, scores: Tensor) -> Tensor:
    return scores - scores.max(1, keepdim=True).values


def _weak(self: Spelled, scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -20.0)


def _read_beside(self: Spelled, weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v + weights.sum(-1, keepdim=True)


def _heads_turned(self: Spelled, weights: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(weights.flip(1), v)


def _scaled_per_head(self: Spelled, q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3)) * self.sinks.view(1, -1, 1, 1)


NEARLY: list[tuple[dict[str, Callable[..., Any]], str]] = [
    ({"beside": _own_of_each_token}, "sink is not one score of each head"),
    ({"beside": _two_sinks, "kept": _without_two}, "something other than one sink"),
    ({"beside": _in_front}, "something other than one sink"),
    ({"kept": _without_the_first_key}, "is not the weight of the sink"),
    ({"scores": _capped_at_nothing}, "no cap"),
    ({"scores": _capped_twice}, "not scale"),
    ({"scores": _capped_per_head}, "not scale"),
    ({"scores": _squashed}, "not scale"),
    ({"masked": _capped_with_its_mask}, "not scale"),
    ({"scores": _read_before_the_cap}, "not scale"),
    ({"scores": _scaled_per_head}, "not scale"),
    ({"shifted": _mean_subtracted}, "something other than the largest score"),
    ({"shifted": _largest_of_all}, "not taken for each query"),
    ({"masked": _weak}, "not scale"),
    ({**NO_SINK, "weigh": _read_beside}, ""),
    ({**NO_SINK, "weigh": _heads_turned}, ""),
    ({"mask": _chunked}, "mask is neither causal"),
]


@pytest.mark.parametrize(
    ("steps", "reason"), NEARLY, ids=["+".join(f.__name__.strip("_") for f in s.values()) for s, _ in NEARLY]
)
def test_nearly_spelled_out(steps: dict[str, Callable[..., Any]], reason: str) -> None:
    program = spelled(**steps)
    if reason:
        check_refused(fuse_attention(), program, reason)
        return
    assert run(fuse_attention(), program).changed == 0  # another reader of the weights: not an attention at all
