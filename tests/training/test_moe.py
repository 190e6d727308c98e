"""Routing, dispatch, experts and balancing, against plain loops with ordinary autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.compiler.spec.training import Balancing
from moec.sources.decoder.config import MoeConfig
from moec.training.dispatch import capacity, from_rows, plan, to_rows
from moec.training.experts import COMPUTES, expert_products, few_shapes
from moec.training.moe import MoeBlock
from moec.training.optimizer import balance, bias_rate
from tests.training.small import config_of, model_of, random_weights


def block_of(seed: int, moe: dict[str, Any], width: int, compute: Any = "grouped") -> MoeBlock:
    block = MoeBlock(width, MoeConfig.model_validate(moe), None, compute)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
        if block.expert_bias is not None:
            block.expert_bias.copy_(0.2 * torch.randn(block.expert_bias.shape, generator=generator))
    return block


def by_hand(block: MoeBlock, x_ND: Tensor, factor: float | None) -> tuple[Tensor, list[int], int]:
    """(y, pairs that selected each expert, dropped pairs), one token and expert at a time."""
    moe = block.moe
    scores = (x_ND @ block.router.weight.T).sigmoid()
    bias = 0.0 if block.expert_bias is None else block.expert_bias
    chosen = (scores + bias).topk(moe.top_k).indices
    pairs = []  # (expert, weight, token)
    for n in range(len(x_ND)):
        picked = scores[n, chosen[n]]
        weights = picked / picked.sum() if moe.normalize else picked
        pairs += [(int(e), weights[k] * moe.scale, n) for k, e in enumerate(chosen[n])]
    load = [sum(e == expert for e, _, _ in pairs) for expert in range(moe.experts)]
    y, dropped = [torch.zeros(x_ND.shape[1]) for _ in range(len(x_ND))], 0
    for expert in range(moe.experts):
        mine = sorted((p for p in pairs if p[0] == expert), key=lambda p: -float(p[1].detach()))
        room = len(mine) if factor is None else math.ceil(factor * len(pairs) / moe.experts)
        dropped += max(0, len(mine) - room)
        for _, weight, n in mine[:room]:
            gate, up = (x_ND[n] @ block.experts.gate_up_proj[expert]).chunk(2)
            y[n] = y[n] + weight * ((F.silu(gate) * up) @ block.experts.down_proj[expert])
    out = torch.stack(y)
    if block.shared_expert is not None:
        out = out + block.shared_expert(x_ND)
    return out, load, dropped


@given(
    tokens=st.integers(1, 40), experts=st.integers(1, 9), top_k=st.integers(1, 4), width=st.sampled_from([4, 5, 8, 12]),
    hidden=st.sampled_from([2, 3, 8]), shared=st.sampled_from([0, 6]), bias=st.booleans(), normalize=st.booleans(),
    factor=st.sampled_from([None, 0.3, 1.0, 1.5]), compute=st.sampled_from(COMPUTES), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_block_by_hand(
    tokens: int, experts: int, top_k: int, width: int, hidden: int, shared: int, bias: bool, normalize: bool,
    factor: float | None, compute: Any, seed: int,
) -> None:  # fmt: skip
    """Outputs and the gradients of input and every weight, with and without dropped pairs, in all three ways."""
    moe = {
        "experts": experts, "top_k": min(top_k, experts), "expert_width": hidden, "shared_width": shared,
        "selection_bias": bias, "normalize": normalize, "scale": 1.7,
    }  # fmt: skip
    block = block_of(seed, moe, width, compute).train()
    block.capacity_factor = factor
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, requires_grad=True)
    upstream = torch.randn(tokens, width, generator=generator)
    wanted, load, dropped = by_hand(block, x, factor)
    parameters = [x, *block.parameters()]
    expected = torch.autograd.grad((wanted * upstream).sum(), parameters, allow_unused=True)
    y, _, load_E, dropped_, *_ = block(x)
    got = torch.autograd.grad((y * upstream).sum(), parameters, allow_unused=True)
    # fp32 sums of at most 40 terms of order one in another order
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    assert load_E.tolist() == load
    assert dropped_ == dropped
    for mine, theirs, p in zip(got, expected, parameters, strict=True):
        # a parameter that no pair reached has no gradient in one of the two
        torch.testing.assert_close(_dense(mine, p), _dense(theirs, p), atol=5e-5, rtol=1e-3)


def _dense(grad: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p) if grad is None else grad


def test_capacity_is_of_training_only() -> None:
    block = block_of(0, {"experts": 4, "top_k": 2, "expert_width": 8}, 8)
    block.capacity_factor = 0.25
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    assert block.train()(x)[3] > 0
    assert block.eval()(x)[3] == 0


def test_capacity() -> None:
    assert capacity(100, 2, 16, 1.5) == 19  # 18.75 rounded up
    assert capacity(1, 1, 64, 1.0) == 1


def test_dropped_pairs_are_the_lightest() -> None:
    indices = torch.tensor([[0], [0], [0], [1]])
    weights = torch.tensor([[0.2], [0.9], [0.5], [0.1]])
    planned = plan(indices, weights, 2, 1.0)  # two rows an expert
    assert planned.token_R.tolist() == [1, 2, 3]
    assert planned.counts_E.tolist() == [2, 1]
    assert planned.load_E.tolist() == [3, 1]
    assert planned.kept_NK is not None
    assert planned.kept_NK.flatten().tolist() == [False, True, True, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_keep_the_rows_by_expert(bad: float) -> None:
    # a run that diverges must reach the check of its loss, not fail in a split
    indices_NK = torch.rand(50, 6, generator=torch.manual_seed(1)).topk(2).indices
    weights_NK = torch.rand(50, 2)
    weights_NK[::3] = bad
    planned = plan(indices_NK, weights_NK, 6, 1.1)
    expert_R = indices_NK.flatten()[planned.pair_R]
    assert (expert_R.diff() >= 0).all()
    assert torch.equal(torch.bincount(expert_R, minlength=6), planned.counts_E)


def test_all_pairs_dropped_or_none_there() -> None:
    """An expert-parallel process may receive no row at all: its experts still have gradients, of zero."""
    up, down = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    for compute in COMPUTES:
        y = expert_products(compute, torch.zeros(0, 4), torch.zeros(3, dtype=torch.int64), up, down)
        grads = torch.autograd.grad(y.sum(), (up, down))
        assert y.shape == (0, 4)
        assert all(g.abs().sum() == 0 for g in grads)


def test_rounded_up_rows_change_nothing() -> None:
    """In bfloat16 a loop computes more rows than there are: outputs and gradients are those of grouped products."""
    counts, upstream = torch.tensor([0, 1, 16, 17, 700, 250]), torch.randn(984, 24, dtype=torch.bfloat16)
    tensors = [torch.randn(s).bfloat16().requires_grad_() for s in ((984, 24), (6, 24, 32), (6, 16, 24))]
    found = []
    for compute in ("loop", "grouped"):
        y = expert_products(compute, tensors[0], counts, tensors[1], tensors[2])
        found.append([y, *torch.autograd.grad(y, tensors, upstream)])
    for ours, theirs in ((a.detach(), b.detach()) for a, b in zip(*found, strict=True)):
        # sums of the same products of bfloat16 in float32, in another order: a result may round to its neighbour
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * float(theirs.abs().max()))


def test_few_shapes_are_few_and_near() -> None:
    sizes = [few_shapes(rows) for rows in range(1, 100_001)]
    assert all(0 <= size - rows <= max(15, rows / 8) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 100
    assert few_shapes(0) == 0


def test_the_way_there_and_back_is_the_identity() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 6, generator=generator)
    indices = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(50)])
    weights = torch.full((50, 3), 1 / 3)
    planned = plan(indices, weights, 7, None)
    assert indices.flatten()[planned.pair_R].tolist() == sorted(indices.flatten().tolist())
    # three thirds of one number
    torch.testing.assert_close(from_rows(to_rows(x, planned), weights, planned), x, atol=1e-6, rtol=1e-6)


def test_gradients_repeat_bit_for_bit() -> None:
    config = config_of()
    model = model_of(config, random_weights(config)).train()
    model.set_capacity(1.1)
    tokens = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(3):
        model.zero_grad()
        model(tokens, None, tokens, torch.ones(8, 64))[0].backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_z_loss() -> None:
    block = block_of(1, {"experts": 5, "top_k": 2, "expert_width": 8}, 8)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    wanted = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in (x @ block.router.weight.T).tolist())
    # fp32 against Python's doubles, a sum of 20
    assert block(x)[1].item() == pytest.approx(wanted, rel=1e-5)


def test_balancing_evens_the_load() -> None:
    """Tokens that all prefer two experts: the bias spreads them, and touches no combine weight."""
    config = config_of(layers=1)
    model = model_of(config, random_weights(config))
    block = model.blocks[0]
    with torch.no_grad():
        block.expert_bias.copy_(torch.tensor([0.8, 0.7] + [0.0] * 6))
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    before = block(x)[2].float()
    for _ in range(200):
        balance(model, block(x)[2].unsqueeze(0), 5e-3)
    after = block(x)[2].float()
    assert before.max() / before.mean() > 2
    assert after.max() / after.mean() < 1.1
    _, indices, weights = block.route(block.router(x))
    scores = block.router(x).sigmoid().gather(-1, indices)
    torch.testing.assert_close(weights, 2.5 * scores / scores.sum(-1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_balancing_slows_down() -> None:
    steady, slowing = Balancing(update_rate=0.01), Balancing(update_rate=0.01, final=0.1)
    assert [bias_rate(steady, tokens, 1000) for tokens in (0, 500, 1000)] == [0.01] * 3
    # (1 - 0.9 f) * 0.01 at f of the stage; rounding of a few float64 operations
    assert [bias_rate(slowing, tokens, 1000) for tokens in (0, 500, 1000, 1200)] == pytest.approx(
        [0.01, 0.0055, 0.001, 0.001], rel=1e-12
    )


def test_balancing_moves_by_the_sign() -> None:
    config = config_of(layers=1)
    model = model_of(config, random_weights(config))
    bias = model.blocks[0].expert_bias
    bias.zero_()
    balance(model, torch.tensor([[9, 1, 5, 5, 5, 5, 5, 5]]), 1e-3)
    torch.testing.assert_close(bias, torch.tensor([-1e-3, 1e-3, 0, 0, 0, 0, 0, 0]))
