"""Operators against plain formulas in float64, the fakes against eager, and operands that no kernel may be given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.compiler.ops import (
    CachedAttention,
    Experts,
    Routing,
    cached_attention,
    embedding_q,
    fused_moe,
    fused_moe_q,
    linear_q,
    rms_norm,
    rope,
)
from moec.compiler.quant import quantize_rows, quantize_weight

N, D, E, F, S, K = 9, 64, 6, 32, 32, 3
CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # fp32 against float64 over at most 64 terms of order one


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape)))


def same_as_fake(op: Any, *args: Any) -> None:
    """The fake gives the shape and type of the eager result."""
    real = op(*[a.clone() if isinstance(a, Tensor) else a for a in args])
    with FakeTensorMode() as mode:
        fake = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
    assert fake.shape == real.shape
    assert fake.dtype == real.dtype


def moe_operands(how: Routing, what: Experts, *, shared: bool = True) -> list[Any]:
    wide = 2 * F if what.gated else F
    w13 = rand(E, D, wide, seed=1) if what.layout == "in_out" else rand(E, wide, D, seed=1)
    w2 = rand(E, F, D, seed=2) if what.layout == "in_out" else rand(E, D, F, seed=2)
    s13 = rand(2 * S if what.gated else S, D, seed=5) / 8
    more = [s13, rand(D, S, seed=6) / 8, rand(1, D, seed=7) / 8]
    return [
        rand(N, D), rand(N, D, seed=3), rand(E, D, seed=4) / 4, rand(E, seed=8),
        None if how.score == "sparsemixer" else rand(E, seed=9) / 4, w13 / 8,
        rand(E, wide, seed=10) / 4, w2 / 8, rand(E, D, seed=11) / 4, *(more if shared else [None] * 3),
        K, str(how), str(what),
    ]  # fmt: skip


def plain_moe(args: list[Any], how: Routing, what: Experts) -> Tensor:
    """Token by token, expert by expert, in float64; nothing of the operators' own helpers is used."""
    x, ri, rw, rb, sb, w13, b13, w2, b2, s13, s2, gate = [a.double() if isinstance(a, Tensor) else a for a in args[:12]]
    out = torch.zeros_like(x)

    def score(v: Tensor) -> Tensor:
        if how.score == "softmax":
            return v.softmax(0)
        return v.sigmoid() if how.score == "sigmoid" else torch.log1p(v.exp()).sqrt()

    def act(v: Tensor) -> Tensor:
        if what.activation == "silu":
            return v / (1 + (-what.alpha * v).exp())
        if what.activation == "relu":
            return v.clamp(min=0)
        return 0.5 * v * (1 + torch.erf(v / math.sqrt(2)))

    def mlp(v: Tensor, first: Tensor, bias: Tensor | None, second: Tensor, interleaved: bool) -> Tensor:
        h = first @ v if bias is None else first @ v + bias
        if not what.gated:
            return second @ act(h.clamp(what.gate_min, what.gate_max))
        half = len(h) // 2
        g, u = (h[0::2], h[1::2]) if interleaved else (h[:half], h[half:])
        g = g.clamp(what.gate_min, what.gate_max)
        return second @ (act(g) * (u.clamp(what.up_min, what.up_max) + what.up_offset))

    for n in range(len(x)):
        logits = rw @ ri[n] + rb
        near = how.score == "sparsemixer"
        scores = logits if how.after_topk or near else score(logits)
        choice = scores.clone() if near else score(logits + sb) if how.bias_on == "logits" else scores + sb
        if how.groups:
            size = E // how.groups
            parts = [choice[g * size : (g + 1) * size] for g in range(how.groups)]
            values = [p.max() if how.group_score == "max" else p.sort(descending=True).values[:2].sum() for p in parts]
            best = sorted(range(how.groups), key=lambda g, v=values: -float(v[g]))[: how.keep]  # type: ignore[misc]
            for g in range(how.groups):
                if g not in best:
                    choice[g * size : (g + 1) * size] = 0.0 if how.fill == "zero" else -math.inf
        picked = choice.argsort(descending=True)[:K]
        weights = scores[picked]
        if how.after_topk:
            weights = score(weights)
        if near:
            for k, best in enumerate(scores[picked].tolist()):
                left = [v for e, v in enumerate(scores.tolist()) if e not in picked[:k].tolist()]
                seen = [v for v in left if (best - v) / max(abs(v), best) <= how.threshold]
                weights[k] = 1 / sum(math.exp(v - best) for v in seen)
        if how.normalize == "sum":
            total = weights.sum() + how.eps
            weights = weights / max(float(total), how.clamp_min) if how.clamp_min else weights / total
        weights = weights * how.scale
        for e, w in zip(picked.tolist(), weights, strict=True):
            first, second = (w13[e].T, w2[e].T) if what.layout == "in_out" else (w13[e], w2[e])
            if how.apply == "input":
                out[n] += mlp(x[n] * w, first, b13[e], second, what.interleaved) + b2[e]
            else:
                out[n] += w * (mlp(x[n], first, b13[e], second, what.interleaved) + b2[e])
        if s13 is not None:
            out[n] += torch.sigmoid(gate[0] @ x[n]) * mlp(x[n], s13, None, s2, False)
    return out


ROUTINGS = [
    Routing(),
    Routing(score="sigmoid", normalize="sum", scale=2.5),
    Routing(score="sqrtsoftplus", normalize="sum", eps=0.5),
    Routing(score="sigmoid", normalize="sum", clamp_min=1.9),
    Routing(score="softmax", after_topk=True),
    Routing(score="sigmoid", bias_on="logits"),
    Routing(score="sigmoid", groups=3, keep=2, group_score="top2sum", fill="zero"),
    Routing(score="sigmoid", groups=2, keep=1, group_score="max", fill="ninf"),
    Routing(score="sigmoid", apply="input"),
    Routing(score="sparsemixer", threshold=0.7),
    Routing(score="sparsemixer", threshold=0.02, normalize="sum", scale=1.5),
]
EXPERTS = [
    Experts(),
    Experts(layout="in_out"),
    Experts(activation="gelu", interleaved=True),
    Experts(activation="relu", gated=False),
    Experts(alpha=1.7, gate_max=0.8, up_min=-0.5, up_max=0.5, up_offset=1.0),
]


@pytest.mark.parametrize("how", ROUTINGS, ids=str)
def test_fused_moe_routing(how: Routing) -> None:
    args = moe_operands(how, Experts())
    torch.testing.assert_close(fused_moe(*args).double(), plain_moe(args, how, Experts()), **CLOSE)


@pytest.mark.parametrize("what", EXPERTS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_fused_moe_experts(what: Experts, shared: bool) -> None:
    args = moe_operands(ROUTINGS[1], what, shared=shared)
    torch.testing.assert_close(fused_moe(*args).double(), plain_moe(args, ROUTINGS[1], what), **CLOSE)
    same_as_fake(fused_moe, *args)


def quantized_operands(what: Experts, bits: int, int8: bool) -> tuple[list[Any], list[Any]]:
    """(operands of the quantized operator, those of the float one with the dequantized weights)."""
    args = moe_operands(ROUTINGS[1], what)
    exact, packed = list(args), list(args[:5])
    for index in (5, 7, 9, 10):
        q = quantize_weight(args[index], bits=bits, group_size=32)
        exact[index] = q.dequantize()
        packed += [q.codes, q.scales]
        if index in (5, 7):
            packed.append(args[index + 1])
    return [*packed, args[11], *args[12:], bits, 32, int8], exact


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("bits", [4, 8])
def test_fused_moe_q(layout: str, bits: int) -> None:
    """Exact on dequantized weights without rounded activations; with them within the rounding of 1/254 a row."""
    what = Experts(layout=layout)
    packed, exact = quantized_operands(what, bits, False)
    wanted = fused_moe(*exact)
    torch.testing.assert_close(fused_moe_q(*packed), wanted, **CLOSE)
    packed, _ = quantized_operands(what, bits, True)
    got = fused_moe_q(*packed)
    assert torch.nn.functional.cosine_similarity(got, wanted, -1).min() > 0.999
    assert not torch.equal(got, wanted)
    same_as_fake(fused_moe_q, *packed)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_linear_q(bits: int, group: int) -> None:
    x, w, bias = rand(2, 5, 128), rand(24, 128), rand(24)
    q = quantize_weight(w, bits=bits, group_size=group)
    plain = x.double() @ q.dequantize().double().T + bias.double()
    args = (q.codes, q.scales, bias, bits, group)
    torch.testing.assert_close(linear_q(x, *args, False).double(), plain, **CLOSE)
    codes, scale = quantize_rows(x)  # the integers, group by group, as the kernels sum them
    grouped = (codes.unflatten(-1, (-1, group))[..., None, :, :] * q.unpacked().unflatten(-1, (-1, group))).sum(-1)
    integer = (grouped.double() * q.scales.double()).sum(-1) * scale.double() + bias.double()
    torch.testing.assert_close(linear_q(x, *args, True).double(), integer, **CLOSE)
    same_as_fake(linear_q, x, *args, True)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_linear_q_by_block(bits: int, group: int) -> None:
    """A scale for each 32 inputs: the sums of blocks, each of integers, as the kernels add them."""
    x, w = rand(5, 128), rand(24, 128)
    x[:, 40] *= 100  # an outlier: its block loses precision, the others keep theirs
    q = quantize_weight(w, bits=bits, group_size=group)
    scales = q.scales.repeat_interleave(group // 32, -1).double()
    wanted = torch.zeros(5, 24, dtype=torch.float64)
    for b in range(4):
        codes, scale = quantize_rows(x[:, 32 * b : 32 * b + 32])
        integers = codes @ q.unpacked()[:, 32 * b : 32 * b + 32].float().T
        wanted += integers.double() * scale.double() * scales[:, b]
    args = (q.codes, q.scales, None, bits, group, True)
    torch.testing.assert_close(linear_q(x, *args, 32).double(), wanted, **CLOSE)
    assert not torch.allclose(linear_q(x, *args).double(), wanted, **CLOSE)
    same_as_fake(linear_q, x, *args, 32)


@pytest.mark.parametrize(("int8", "block"), [(True, 64), (True, -1), (True, 1), (False, 32)])
def test_no_other_blocks(int8: bool, block: int) -> None:
    q = quantize_weight(rand(8, 64), bits=4, group_size=32)
    with FakeTensorMode() as mode:
        x, codes, scales = (mode.from_tensor(t) for t in (rand(2, 64), q.codes, q.scales))
        with pytest.raises(ValueError, match="activation_block must be one of"):
            linear_q(x, codes, scales, None, 4, 32, int8, block)


def test_embedding_q() -> None:
    table = quantize_weight(rand(11, 64), bits=4, group_size=32)
    ids = torch.tensor([[0, 10, 3, 3]])
    assert torch.equal(embedding_q(ids, table.codes, table.scales, 4, 32), table.dequantize()[ids])
    same_as_fake(embedding_q, ids, table.codes, table.scales, 4, 32)


def test_rms_norm_and_rope() -> None:
    x, w = rand(2, 3, 10), rand(10)
    plain = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(rms_norm(x, w, 1e-3).double(), plain * w.double(), **CLOSE)
    torch.testing.assert_close(rms_norm(x, None, 1e-3).double(), plain, **CLOSE)
    same_as_fake(rms_norm, x, w, 1e-3)
    heads, angle = rand(1, 5, 3, 8), rand(5, 4)
    for interleaved in (True, False):
        pairs = heads.unflatten(-1, (4, 2)) if interleaved else heads.unflatten(-1, (2, 4)).mT
        turned = torch.view_as_complex(pairs.double().contiguous()) * torch.exp(1j * angle.double())[None, :, None]
        parts = torch.view_as_real(turned)
        plain = (parts if interleaved else parts.mT).flatten(-2)
        torch.testing.assert_close(rope(heads, angle.cos(), angle.sin(), interleaved).double(), plain, **CLOSE)
    same_as_fake(rope, heads, angle.cos(), angle.sin(), True)


def attention_operands(tokens: int) -> list[Tensor]:
    return [rand(1, tokens, 4, 6), rand(1, tokens, 2, 6, seed=1), rand(1, tokens, 2, 6, seed=2)]


@pytest.mark.parametrize(("sunk", "softcap"), [(False, 0.0), (True, 0.0), (False, 0.7), (True, 0.7)])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_cached_attention(window: int, sunk: bool, softcap: float) -> None:
    """Chunks of 4, 1 and 3 tokens over one cache equal attention over all 8, query by query."""
    q, k, v = attention_operands(8)
    sinks = rand(4, seed=3) * 3 if sunk else None
    caches = [torch.full((1, 12, 2, 6), math.nan) for _ in range(2)]  # what is not written yet is never read
    got = [
        cached_attention(
            q[:, a:b], k[:, a:b], v[:, a:b], *caches, torch.tensor([a]), 0.4, window, sinks=sinks, softcap=softcap
        )
        for a, b in ((0, 4), (4, 5), (5, 8))
    ]
    rows = []
    for p in range(8):
        first = max(0, p - window + 1) if window else 0
        heads = []
        for h in range(4):
            keys, values = k[0, first : p + 1, h // 2].double(), v[0, first : p + 1, h // 2].double()
            scores = keys @ q[0, p, h].double() * 0.4
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            beside = scores.exp().sum() + (0 if sinks is None else sinks[h].double().exp())
            heads.append(scores.exp() / beside @ values)
        rows.append(torch.cat(heads))
    torch.testing.assert_close(torch.cat(got, 1)[0].double(), torch.stack(rows), **CLOSE)
    same_as_fake(
        cached_attention, q, k, v, torch.zeros(1, 12, 2, 6), torch.zeros(1, 12, 2, 6), torch.tensor([0]), 0.4, 0
    )


def test_cached_attention_over_codes() -> None:
    """The same as attention over keys and values that `quantize_rows` has rounded."""
    q, k, v = attention_operands(5)
    caches = [torch.zeros(1, 9, 2, 6, dtype=torch.int8) for _ in range(2)]
    scales = [torch.zeros(1, 9, 2) for _ in range(2)]
    got = cached_attention(q, k, v, *caches, torch.tensor([0]), 0.4, 0, *scales)
    k, v = (torch.mul(*quantize_rows(t)) for t in (k, v))
    wanted = cached_attention(q, k, v, torch.zeros(1, 9, 2, 6), torch.zeros(1, 9, 2, 6), torch.tensor([0]), 0.4, 0)
    torch.testing.assert_close(got, wanted, **CLOSE)
    same_as_fake(cached_attention, q, k, v, *caches, torch.tensor([0]), 0.4, 0, *scales)


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("sunk", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_attention_in_integers(window: int, sunk: bool, softcap: float) -> None:
    """Over codes within the rounding of queries and weights to 2^-16 of the largest, chunks of 256 positions included;
    the same writes; the same numbers over float caches."""
    tokens, capacity = 300, 310
    q, k, v = attention_operands(tokens)
    sinks = rand(4) if sunk else None
    floats = [torch.zeros(1, capacity, 2, 6) for _ in range(2)]
    call = CachedAttention(q, k, v, *floats, torch.tensor([0]), 0.4, window, sinks=sinks, softcap=softcap)
    assert torch.equal(call.in_integers(), call.eager())
    written = []
    for form in (CachedAttention.eager, CachedAttention.in_integers):
        caches = [torch.zeros(1, capacity, 2, 6, dtype=torch.int8) for _ in range(2)]
        scales = [torch.zeros(1, capacity, 2) for _ in range(2)]
        operands = q, k, v, *caches, torch.tensor([0]), 0.4, window, *scales
        written.append((form(CachedAttention(*operands, sinks, softcap)), *caches, *scales))
    (y, *kept), (rounded, *as_well) = written
    for a, b in zip(kept, as_well, strict=True):
        assert torch.equal(a, b)
    # 2^-16 of the largest element of a query, 4, times six of a key, 4 at most, times 0.4: a score, and so the relative
    # error of a weight, is off by less than 6e-4, where all add up; values are below 4
    assert 0 < float((rounded - y).abs().max()) < 1e-3


@pytest.mark.parametrize("start", [-1, 8, 100])
def test_positions_outside_the_cache_are_rejected(start: int) -> None:
    q, k, v = attention_operands(5)
    caches = [torch.zeros(1, 12, 2, 6) for _ in range(2)]
    with pytest.raises(ValueError, match="do not fit a cache of 12"):
        cached_attention(q, k, v, *caches, torch.tensor([start]), 0.4, 0)


BAD: list[tuple[int, Any, str]] = [
    (2, torch.zeros(E, D, dtype=torch.bfloat16), "router must be float32"),
    (1, torch.zeros(N, D, dtype=torch.bfloat16), "input must be float32"),
    (2, torch.zeros(E, D + 1), "router_weight must be"),
    (2, torch.zeros(E + 1, D), "router_bias must be|differ in their number"),
    (4, torch.zeros(E + 1), "selection_bias must be"),
    (5, torch.zeros(E, 2 * F, D + 2), "w13 must be"),
    (5, torch.zeros(E, 2 * F + 1, D), "even number"),
    (5, torch.zeros(E, 2 * F), "three dimensions"),
    (6, torch.zeros(E, F), "b13 must be"),
    (7, torch.zeros(E, D, F + 1), "w2 must be"),
    (8, torch.zeros(E, F), "b2 must be"),
    (9, None, "needs both"),
    (9, torch.zeros(S, D), "shared_w13 must be"),
    (11, torch.zeros(2, D), "shared_gate must be"),
    (12, 0, "top_k"),
    (12, E + 1, "top_k"),
    (13, "score=relu", "score must be one of"),
    (13, "groups=4,keep=1", "do not form 4 groups"),
    (14, "layout=up", "layout must be one of"),
    (14, "colour=red", "not one of"),
]


@pytest.mark.parametrize(("index", "value", "message"), BAD, ids=[f"{i}:{m[:20]}" for i, _, m in BAD])
def test_bad_operands_of_fused_moe_are_rejected(index: int, value: Any, message: str) -> None:
    args = moe_operands(Routing(), Experts())
    args[index] = value
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        fused_moe(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])


@pytest.mark.parametrize(
    ("codes", "scales", "bits", "group", "message"),
    [
        ((24, 32), (24, 2), 3, 32, "bits must be 4 or 8"),
        ((24, 32), (24, 2), 4, 48, "not a multiple of group size 48"),
        ((24, 31), (24, 2), 4, 32, "codes must be"),
        ((24, 32), (24, 1), 4, 32, "scales must be"),
        ((24, 64), (24, 2), 8, 32, "codes have dtype"),
    ],
)
def test_bad_codes_are_rejected(codes: Any, scales: Any, bits: int, group: int, message: str) -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        linear_q(
            torch.zeros(3, 64), torch.zeros(codes, dtype=torch.uint8), torch.zeros(scales), None, bits, group, True
        )


@pytest.mark.parametrize("value", [*ROUTINGS, *EXPERTS], ids=str)
def test_attributes_survive_their_text(value: Routing | Experts) -> None:
    assert type(value).parse(str(value)) == value
