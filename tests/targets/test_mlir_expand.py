"""The reference expansion against the eager operators, in torch: no compiler of MLIR takes part.

fp32 sums in another order differ by some 1e-6 relative; rounded activations are the same integers in both, except where
a sum before them falls within 1e-6 of the middle between two, which these seeds do not hit (a flip is 1e-2).
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import moec.compiler.ops as ops
from moec.compiler.ops import Experts, Routing
from moec.compiler.ops.moe_math import choices
from moec.compiler.quant import pack_int4, quantize_weight
from moec.targets.mlir import expand
from moec.targets.mlir.written_states import functional
from tests.variants import crossed

ATOL, RTOL = 1e-5, 1e-4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=g)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=RTOL)


def test_every_code_unpacks_to_itself() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3).view(2, 24)[:, torch.randperm(24, generator=generator(0))]
    assert expand.integers(pack_int4(codes), 4).tolist() == codes.tolist()
    # as the text holds them: a signless byte that a compiler may take for signed
    assert expand.integers(pack_int4(codes).view(torch.int8), 4).tolist() == codes.tolist()
    every = torch.arange(-128, 128).to(torch.int8)
    assert expand.integers(every, 8).tolist() == every.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_linear_and_embedding(seed: int) -> None:
    g, pick = generator(seed), random.Random(seed)
    bits, group = pick.choice([4, 8]), pick.choice([2, 8, 14])
    n, k, t = pick.randint(1, 33), group * pick.randint(1, 7), pick.randint(1, 9)
    w = quantize_weight(normal(g, n, k), bits=bits, group_size=group)
    x, bias = normal(g, 1, t, k), pick.choice([None, normal(g, n)])
    for rounding in ((False,), (True,), (True, 32)):
        args = (x, w.codes, w.scales, bias, bits, group, *rounding)
        close(expand.expand_linear_q(ops.LinearQ(*args)), ops.linear_q(*args))
    ids = torch.randint(0, n, (1, t), generator=g)
    given = (ids, w.codes, w.scales, bits, group)
    assert torch.equal(expand.expand_embedding_q(ops.EmbeddingQ(*given)), ops.embedding_q(*given))


@pytest.mark.parametrize("interleaved", [True, False])
def test_norm_and_rope(interleaved: bool) -> None:
    g = generator(1)
    x, angle = normal(g, 1, 5, 3, 14), normal(g, 5, 7)
    given = (x, angle.cos(), angle.sin(), interleaved)
    close(expand.expand_rope(ops.Rope(*given)), ops.rope(*given))
    for weight in (None, normal(g, 14)):
        close(expand.expand_rms_norm(ops.RmsNorm(x, weight, 1e-6)), ops.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize(("heads", "kv"), [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("rounded", [False, True])
def test_attention_over_a_sequence(window: int, heads: int, kv: int, rounded: bool) -> None:
    """A prefill, single steps, a chunk up to the last position, and a second sequence over what the first left."""
    g = generator(heads + window)
    context, d, e = 13, 6, 4
    theirs = [torch.zeros(1, context, kv, d), torch.zeros(1, context, kv, e)]
    if rounded:
        theirs = [c.to(torch.int8) for c in theirs] + [torch.zeros(1, context, kv) for _ in range(2)]
    ours = [c.clone() for c in theirs]
    sinks, softcap = None if kv == 3 else normal(g, heads), 0.5 if kv == 2 else 0.0
    for count, start in ((5, 0), (1, 5), (1, 6), (6, 7), (2, 0), (1, 2)):
        q, k, v = normal(g, 1, count, heads, d), normal(g, 1, count, kv, d), normal(g, 1, count, kv, e)
        rest = (torch.tensor([start]), 0.37, window)
        call: ops.CachedAttention[Tensor] = ops.CachedAttention(
            q, k, v, *ours[:2], *rest, *ours[2:], sinks=sinks, softcap=softcap
        )
        kept = functional(call)(*call.arguments())
        y, *ours = expand.expand_cached_attention(call)
        close(y, ops.cached_attention(q, k, v, *theirs[:2], *rest, *theirs[2:], sinks=sinks, softcap=softcap))
        close(kept[0], y)
        for a, b, c in zip(ours, theirs, kept[1:], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_of_experts(seed: int) -> None:
    """`top` and `limited` against topk and `choices`, with group limits of every kind."""
    g, pick = generator(seed), random.Random(seed)
    groups, per = pick.randint(1, 5), pick.randint(2, 6)
    logits = normal(g, 17, groups * per)
    k = pick.randint(1, per)
    value, index = expand.top(logits, k)
    expected = logits.topk(k, -1)
    assert torch.equal(value, expected.values)
    assert torch.equal(index, expected.indices)
    for score in ("max", "top2sum"):
        for fill in ("zero", "ninf"):
            how = Routing(
                score="sigmoid", groups=groups, keep=pick.randint(1, groups), group_score=score, fill=fill,
                bias_on=pick.choice(["scores", "logits"]),
            )  # fmt: skip
            bias = pick.choice([None, normal(g, groups * per)])
            wanted, scores = choices(logits, bias, how)
            plain, same = choices(logits, bias, Routing(score="sigmoid", bias_on=how.bias_on))
            assert torch.equal(expand.limited(plain, how), wanted)
            assert torch.equal(scores, same)


def test_equal_scores_take_the_first() -> None:
    assert expand.top(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0]]), 4)[1].tolist() == [[1, 2, 4, 0]]


def random_block(seed: int) -> tuple[random.Random, torch.Generator, Routing, Experts, dict[str, int]]:
    pick, g = random.Random(seed), generator(seed)
    groups = pick.choice([0, 0, 2])
    near = groups == 0 and seed % 4 == 3
    routing = Routing(
        score="sparsemixer" if near else pick.choice(["softmax", "sigmoid", "sqrtsoftplus"]),
        threshold=0.6 if near else 0.0,
        after_topk=groups == 0 and pick.random() < 0.3 and not near,
        bias_on="scores" if near else pick.choice(["scores", "logits"]),
        groups=groups,
        keep=1 if groups else 0,
        group_score=pick.choice(["max", "top2sum"]),
        normalize=pick.choice(["none", "sum"]),
        eps=pick.choice([0.0, 1e-6]),
        scale=pick.choice([1.0, 2.5]),
        apply=pick.choice(["output", "input"]),
    )
    gated = pick.random() < 0.8
    activation = pick.choice(["silu", "gelu", "gelu_tanh", "relu", "relu2"])
    experts = Experts(
        layout=pick.choice(["out_in", "in_out"]),
        activation=activation,
        gated=gated,
        interleaved=gated and pick.random() < 0.4,
        alpha=1.702 if activation == "silu" and pick.random() < 0.3 else 1.0,
        gate_max=pick.choice([float("inf"), 0.9]),
        up_min=pick.choice([-float("inf"), -0.8]),
        up_offset=pick.choice([0.0, 1.0]),
    )
    sizes = {
        "t": pick.randint(1, 7),
        "d": 8 * pick.randint(1, 4),
        "e": 2 * pick.randint(2, 4),
        "f": 8 * pick.randint(1, 3),
        "s": pick.choice([0, 8, 24]),
    }
    return pick, g, routing, experts, sizes


@pytest.mark.parametrize(("seed", "bits"), crossed(range(24), (0, 4, 8)))
def test_routed_blocks_of_every_kind(seed: int, bits: int) -> None:
    pick, g, routing, experts, n = random_block(seed)
    wide = n["f"] * (2 if experts.gated else 1)
    up, down = ((wide, n["d"]), (n["d"], n["f"])) if experts.layout == "out_in" else ((n["d"], wide), (n["f"], n["d"]))
    shared_wide = n["s"] * (2 if experts.gated else 1)
    top_k = pick.randint(1, min(3, n["e"] // max(routing.groups, 1)))

    def maybe(*size: int) -> Tensor | None:
        return normal(g, *size) if pick.random() < 0.5 else None

    def weight(*size: int) -> list[Tensor]:
        w = normal(g, *size) * size[-1] ** -0.5
        if not bits:
            return [w]
        q = quantize_weight(w, bits=bits, group_size=8)
        return [q.codes, q.scales]

    x = normal(g, n["t"], n["d"])
    head = [x, pick.choice([x, normal(g, n["t"], n["d"])]), normal(g, n["e"], n["d"]), maybe(n["e"]), maybe(n["e"])]
    if routing.score == "sparsemixer":
        head[-1] = None
    body = [*weight(n["e"], *up), maybe(n["e"], wide), *weight(n["e"], *down), maybe(n["e"], n["d"])]
    shared: list[Tensor | None] = [None] * (5 if bits else 3)
    if n["s"]:
        shared = [*weight(shared_wide, n["d"]), *weight(n["d"], n["s"]), maybe(1, n["d"])]
    text = (top_k, str(routing), str(experts))
    if not bits:
        y, tap = expand.expand_fused_moe(ops.FusedMoe(*head, *body, *shared, *text))
        close(y, ops.fused_moe(*head, *body, *shared, *text))
    else:
        for rounding in ((False,), (True,), (True, 32)):
            args = (*head, *body, *shared, *text, bits, 8, *rounding)
            y, tap = expand.expand_fused_moe_q(ops.FusedMoeQ(*args))
            close(y, ops.fused_moe_q(*args))
    assert tap.indices.shape == tap.weights.shape == (n["t"], top_k)
    assert torch.equal(tap.y, y)
