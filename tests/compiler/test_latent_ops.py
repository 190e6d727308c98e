"""latent_attention and head_linear: together they compute what attention over expanded keys and values does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.compiler.ops import CachedAttention, HeadLinear, LatentAttention
from moec.compiler.quant import quantize_rows, quantize_weight
from moec.runtime.moe_config import Kind, WeightFormat
from moec.targets.xnnpack.cpu_ops import HeadLinearPacked
from moec.targets.xnnpack.packed import HeadRows
from moec.targets.xnnpack.packing import pack
from tests.compiler.test_ops import same_as_fake

T, S, H, RANK, ROPE, PART, VALUE = 5, 20, 3, 32, 16, 6, 10
SCALE = 0.17


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def caches(coded: bool) -> list[Tensor | None]:
    """Latents, rotated parts and their scales, some positions filled."""
    values = [rand(1, S, 1, RANK, seed=1), 6 * rand(1, S, 1, ROPE, seed=2)]
    if not coded:
        return [*values, None, None]
    rounded = [quantize_rows(v) for v in values]
    return [*(q.to(torch.int8) for q, _ in rounded), *(s.squeeze(-1) for _, s in rounded)]


def call_of(start: int, tokens: int = T, *, coded: bool = False, window: int = 0) -> LatentAttention[Tensor]:
    latents, rope, latent_scale, rope_scale = caches(coded)
    assert latents is not None
    assert rope is not None
    return LatentAttention(
        q=rand(1, tokens, H, RANK, seed=3),
        q_rope=rand(1, tokens, H, ROPE, seed=4),
        latents=rand(1, tokens, RANK, seed=5),
        rope=6 * rand(1, tokens, ROPE, seed=6),
        latent_cache=latents,
        rope_cache=rope,
        start_pos=torch.tensor([start]),
        scale=SCALE,
        window=window,
        latent_scale=latent_scale,
        rope_scale=rope_scale,
    )


def weight() -> Tensor:
    return rand(H * (PART + VALUE), RANK, seed=7)


def product(x: Tensor, w: Tensor, begin: int, end: int, *, transposed: bool, **how: Any) -> HeadLinear[Tensor]:
    return HeadLinear(x, w, how.pop("scales", None), H, begin, end, transposed, **how)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("start", [0, 9, S - T])
def test_absorbed_is_expanded(start: int, window: int) -> None:
    """Exact but for the order of sums: 1e-5 of values of order 3."""
    call, w = call_of(start, window=window), weight()
    q = rand(1, T, H, PART, seed=8)
    by_head = w.view(H, PART + VALUE, RANK)

    def expanded(latents_S: Tensor, rope_S: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.einsum("hur,bsr->bshu", by_head, latents_S)
        keys, values = made.split([PART, VALUE], -1)
        return torch.cat((keys, rope_S.unsqueeze(2).expand(-1, -1, H, -1)), -1), values

    k_cache, v_cache = (
        t.contiguous() for t in expanded(call.latent_cache[:, :, 0].clone(), call.rope_cache[:, :, 0].clone())
    )
    k, v = expanded(call.latents, call.rope)
    whole = torch.cat((q, call.q_rope), -1)
    wanted = CachedAttention(whole, k, v, k_cache, v_cache, call.start_pos, SCALE, window).eager()
    absorbed = replace(call, q=product(q, w, 0, PART, transposed=True).eager())
    got = product(absorbed.eager(), w, PART, PART + VALUE, transposed=False).eager()
    torch.testing.assert_close(got.flatten(2), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_over_codes(window: int) -> None:
    """Dequantized caches give what codes give; in integers queries and weights are rounded to 16 bits: 2^-16 of values
    of order 3 for each of the two."""
    call = call_of(9, coded=True, window=window)
    latent_scale, rope_scale = call.latent_scale, call.rope_scale
    assert latent_scale is not None
    assert rope_scale is not None
    coded = replace(call, latent_cache=call.latent_cache.clone(), rope_cache=call.rope_cache.clone())
    floats = replace(
        call,
        latent_cache=call.latent_cache * latent_scale[..., None],
        rope_cache=call.rope_cache * rope_scale[..., None],
        latents=_rounded(call.latents),
        rope=_rounded(call.rope),
        latent_scale=None,
        rope_scale=None,
    )
    wanted = floats.eager()
    torch.testing.assert_close(coded.eager(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(call.in_integers(), wanted, atol=2e-4, rtol=0)
    for mine, other in ((call.latent_cache, coded.latent_cache), (call.rope_cache, coded.rope_cache)):
        torch.testing.assert_close(mine, other, atol=0, rtol=0)


def _rounded(x: Tensor) -> Tensor:
    q, scale = quantize_rows(x)
    return q * scale


def test_a_sequence_may_be_cut_anywhere() -> None:
    whole = call_of(0, 12, coded=True)
    cut = call_of(0, 12, coded=True)
    parts = []
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        rows = {n: getattr(cut, n)[:, begin:end] for n in ("q", "q_rope", "latents", "rope")}
        parts.append(replace(cut, **rows, start_pos=torch.tensor([begin])).eager())
    torch.testing.assert_close(torch.cat(parts, 1), whole.eager(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("bits", "levels"), [(4, ""), (4, "iq4_nl"), (8, "")])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rounded", [None, 0, 32])
def test_head_linear_over_codes(rounded: int | None, transposed: bool, bits: int, levels: str) -> None:
    """Codes of all heads, of which each product reads its rows: as dequantized, INT8 activations within 2%; and the
    packed operator of the same rows gives the same."""
    w = weight()
    held = quantize_weight(w, bits=bits, group_size=32, levels=levels)
    begin, end = (0, PART) if transposed else (PART, PART + VALUE)
    x = rand(1, T, H, PART if transposed else RANK, seed=9)
    how = {"scales": held.scales, "bits": bits, "group_size": 32, "levels": levels}
    exact = product(x, held.dequantize(), begin, end, transposed=transposed).eager()
    rounding = {} if rounded is None else {"int8_activations": True, "activation_block": rounded}
    got = product(x, held.codes, begin, end, transposed=transposed, **how, **rounding).eager()
    limit = 1e-5 if rounded is None else 0.02 * float(exact.abs().max())
    torch.testing.assert_close(got, exact, atol=limit, rtol=0)
    format = _format(bits, levels, transposed, rounded)
    n, k = int(got.shape[3]), int(x.shape[3])
    rows = HeadRows(H, begin, end)
    blob = pack(rows.of(held.codes), rows.of(held.scales), format, H, n, k)
    packed = HeadLinearPacked(x, blob, H, n, k, format.encode()).eager()
    # a number near a half may round to the other code: one step of 127 of an activation's largest
    torch.testing.assert_close(packed, got, atol=1e-5 if rounded is None else limit / 8, rtol=0)


def _format(bits: int, levels: str, transposed: bool, rounded: int | None) -> WeightFormat:
    kind = Kind[levels.upper()] if levels else Kind[f"INT{bits}"]
    return WeightFormat(
        kind, 32, axis_out=transposed, int8_activations=rounded is not None, block_activations=rounded == 32
    )


def test_shapes_are_those_of_fake_tensors() -> None:
    call = call_of(9, coded=True)
    same_as_fake(LatentAttention.op, *call.arguments())
    for transposed in (True, False):
        begin, end = (0, PART) if transposed else (PART, PART + VALUE)
        x = rand(1, T, H, PART if transposed else RANK, seed=9)
        same_as_fake(HeadLinear.op, *product(x, weight(), begin, end, transposed=transposed).arguments())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "other heads": ({"q_rope": rand(1, T, H + 1, ROPE)}, "differ in heads"),
    "wider latents": ({"latents": rand(1, T, RANK + 16)}, "differ in width"),
    "wider rotated part": ({"rope": rand(1, T, ROPE + 16)}, "differ in width"),
    "a cache of heads": ({"latent_cache": torch.zeros(1, S, 2, RANK, dtype=torch.int8)}, "caches must be"),
    "a shorter cache": ({"rope_cache": torch.zeros(1, S - 1, 1, ROPE, dtype=torch.int8)}, "differ in length"),
    "one scale": ({"rope_scale": None}, "stored alike"),
    "scales of heads": ({"latent_scale": rand(1, S, 2)}, "scales must be"),
    "floats with scales": ({"latent_cache": rand(1, S, 1, RANK)}, "must be int8"),
    "a negative window": ({"window": -1}, "window"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_operands_are_rejected(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        replace(call_of(9, coded=True), **changes).fake()


def test_bad_operands_of_head_linear_are_rejected() -> None:
    x, w = rand(1, T, H, PART), weight()
    good = product(x, w, 0, PART, transposed=True)
    for changes, message in (
        ({"heads": 5}, "not those of 5 heads"),
        ({"end": PART + VALUE + 1}, "of a head that has"),
        ({"begin": PART}, "of a head that has"),
        ({"x": rand(1, T, H, PART + 1)}, "x must end in"),
        ({"x": rand(1, T, H + 1, PART)}, "x must end in"),
        ({"transposed": False}, "x must end in"),
        ({"scales": rand(H * (PART + VALUE), 1), "bits": 3, "group_size": 32}, "bits must be"),
        ({"scales": rand(H * (PART + VALUE), 1), "bits": 8, "group_size": 32}, "codes have dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(good, **changes).fake()
