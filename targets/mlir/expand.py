"""The reference expansion: the operators of a legal program in pure ATen, without loops over data and without writes.

Unlike the eager references, which loop over the selected experts, it computes all routed experts as one
batch: control flow that depends on routing has no form in linalg-on-tensors. Codes stay integers and are unpacked with
integer operations; the arithmetic and its order within a row are otherwise those of `compiler/ops`.

T tokens (dynamic), D model width, E experts, K experts per token, F expert width, S cache positions, G groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moec.compiler.ops import (
    CachedAttention,
    Call,
    EmbeddingQ,
    Experts,
    FusedMoe,
    FusedMoeQ,
    LinearQ,
    RmsNorm,
    Rope,
    RoutedMoe,
    Routing,
)
from moec.compiler.ops.moe_math import activate, choices, combine_weights, router_logits
from moec.compiler.quant import fake_quantize_rows, quantize_rows

Batched = Callable[[Tensor], Tensor]  # [E, T, in] -> [E, T, out]


@dataclass(frozen=True)
class Tap:
    """What one routed block did: expert input [T, D], experts [T, K] int64, combine weights [T, K], output [T, D]."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    y: Tensor


def integers(codes: Tensor, bits: int) -> Tensor:
    """int32 codes of the logical shape. Four bits: the low nibble first, two's complement."""
    wide = codes.to(torch.int32)
    if bits == 8:
        return wide
    # masked after the shift too, so that it does not matter how a compiler widens an unsigned byte
    halves = [(nibble & 7) - (nibble & 8) for nibble in (wide & 15, (wide >> 4) & 15)]
    return torch.stack(halves, -1).flatten(-2)


def dequantized(codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """scale * code in float32, groups along the last dimension."""
    grouped = integers(codes, bits).to(torch.float32).unflatten(-1, (-1, group_size))
    return (grouped * scales.to(torch.float32).unsqueeze(-1)).flatten(-2)


def expand_linear_q(call: LinearQ[Tensor]) -> Tensor:
    """`linear_q`: x [..., K] times codes [N, K] with scales [N, K / group_size] -> float32 [..., N]."""
    form = (call.bits, call.group_size, call.int8_activations, call.activation_block)
    y = _linear_q(call.x, call.codes, call.scales, *form)
    return y if call.bias is None else y + call.bias.to(torch.float32)


def _linear_q(
    x: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int, rounded: bool, block: int
) -> Tensor:
    w = dequantized(codes, scales, bits, group_size)
    if not rounded:
        return functional.linear(x.to(torch.float32), w)
    if block:
        return functional.linear(fake_quantize_rows(x, block), w)
    q, scale = quantize_rows(x)
    return functional.linear(q, w) * scale


def expand_embedding_q(call: EmbeddingQ[Tensor]) -> Tensor:
    """`embedding_q`: ids [...] -> float32 [..., D], only the picked rows dequantized."""
    rows = call.ids.flatten()
    codes, scales = call.codes.index_select(0, rows), call.scales.index_select(0, rows)
    picked = dequantized(codes, scales, call.bits, call.group_size)
    return picked.reshape(*call.ids.shape, picked.shape[-1])


def expand_rms_norm(call: RmsNorm[Tensor]) -> Tensor:
    """`rms_norm` over the last dimension, in float32; the result has the type of x."""
    return call.eager()


def expand_rope(call: Rope[Tensor]) -> Tensor:
    """`rope`: x [1, T, H, d], cos and sin [T, d / 2]."""
    x, c, s = call.x, call.cos[None, :, None, :], call.sin[None, :, None, :]
    if call.interleaved:
        pairs = x.unflatten(-1, (-1, 2))
        a, b = pairs.select(-1, 0), pairs.select(-1, 1)
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    half = x.shape[-1] // 2
    a, b = x.narrow(-1, 0, half), x.narrow(-1, half, half)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


# --- attention ------------------------------------------------------------------------------------------------------


def appended(cache: Tensor, rows: Tensor, start_pos: Tensor) -> Tensor:
    """`cache` [1, S, ...] with `rows` [1, T, ...] at positions start_pos.. ; a new tensor."""
    count = rows.shape[1]
    place_S = torch.arange(cache.shape[1], device=cache.device) - start_pos
    inside_S = (place_S >= 0) & (place_S < count)
    moved = rows.index_select(1, place_S.clamp(min=0).minimum(torch.full_like(place_S, 1) * (count - 1)))
    return torch.where(inside_S.view(1, -1, *[1] * (cache.dim() - 2)), moved, cache)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start_pos: Tensor,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """q [1,T,H,d] over whole caches k [1,S,KV,d], v [1,S,KV,e] in fp32. Every position is scored, then masked."""
    tokens, heads, kv = q.shape[1], q.shape[2], k.shape[2]
    positions_T1 = (start_pos + torch.arange(tokens, device=q.device)).unsqueeze(-1)
    seen_S = torch.arange(k.shape[1], device=q.device)
    mask_TS = seen_S <= positions_T1
    if window > 0:
        mask_TS = mask_TS & (positions_T1 - seen_S < window)
    # the query heads that share a key head lie beside each other: [KV, rep * T, d]
    rep = heads // kv
    q_HTd = q.squeeze(0).permute(1, 0, 2).contiguous()
    q_KNd = q_HTd.view(kv, rep * tokens, q.shape[3])
    k_KdS, v_KSe = k.squeeze(0).permute(1, 2, 0), v.squeeze(0).permute(1, 0, 2)
    scores = torch.bmm(q_KNd * scale, k_KdS).view(kv, rep, tokens, k.shape[1])
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask_TS, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        sink = sinks.view(kv, rep, 1, 1)
        top = scores.amax(-1, keepdim=True).maximum(sink)
        shares = (scores - top).exp()
        weights = shares / (shares.sum(-1, keepdim=True) + (sink - top).exp())
    y = torch.bmm(weights.view(kv, rep * tokens, k.shape[1]), v_KSe).view(kv, rep, tokens, v.shape[3])
    return y.permute(2, 0, 1, 3).contiguous().view(1, tokens, heads * v.shape[3])


def expand_cached_attention(call: CachedAttention[Tensor]) -> tuple[Tensor, ...]:
    """(y, new k cache, new v cache, and the new scales of both where they hold codes)."""
    start, caches, scales, seen = call.start_pos, [], [], []
    for rows, cache, scale in call.parts():
        if scale is None:
            caches.append(appended(cache, rows, start))
            seen.append(caches[-1])
            continue
        codes, s = quantize_rows(rows)
        caches.append(appended(cache, codes.to(torch.int8), start))
        scales.append(appended(scale, s.squeeze(-1), start))
    if scales:  # after both caches: the text of an artifact keeps its order
        seen = [codes.to(torch.float32) * s.unsqueeze(-1) for codes, s in zip(caches, scales, strict=True)]
    keys, values = seen
    return attend(call.q, keys, values, start, call.scale, call.window, call.sinks, call.softcap), *caches, *scales


# --- routed blocks --------------------------------------------------------------------------------------------------


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last dimension, best first, and where they are. Of equals the first is taken.

    A maximum at a time: `topk` becomes a sort, which is no linalg operator and which few consumers of the text lower.
    """
    place = torch.arange(values.shape[-1], device=values.device)
    best, where = [], []
    for _ in range(count):
        value, index = values.max(-1, keepdim=True)
        best.append(value)
        where.append(index)
        values = torch.where(place == index, -torch.inf, values)
    return torch.cat(best, -1), torch.cat(where, -1)


def limited(choice: Tensor, how: Routing) -> Tensor:
    """Step 3 of `Routing`: what the experts of groups that are not kept compete with becomes `fill`."""
    grouped = choice.unflatten(-1, (how.groups, -1))
    group_score = grouped.amax(-1) if how.group_score == "max" else top(grouped, 2)[0].sum(-1)
    kept = (top(group_score, how.keep)[1].unsqueeze(-1) == torch.arange(how.groups, device=choice.device)).any(-2)
    fill = 0.0 if how.fill == "zero" else -torch.inf
    return grouped.masked_fill(~kept.unsqueeze(-1), fill).flatten(-2)


def _routed(moe: RoutedMoe[Tensor], up: Batched, down: Batched) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, weights, sum over the selected experts in rank order)."""
    how, x = moe.selection, moe.x
    logits_TE = router_logits(moe.router_input, moe.router_weight, moe.router_bias)
    choice_TE, scores_TE = choices(logits_TE, moe.selection_bias, dataclasses.replace(how, groups=0, keep=0))
    indices_TK = top(limited(choice_TE, how) if how.groups else choice_TE, moe.top_k)[1]
    weights_TK = combine_weights(scores_TE, indices_TK, how)
    count = moe.router_weight.shape[0]
    x_ETD = x.to(torch.float32).unsqueeze(0).expand(count, -1, -1)
    if how.apply == "input":
        chosen_TKE = indices_TK.unsqueeze(-1) == torch.arange(count, device=x.device)
        weight_TE = (chosen_TKE.to(torch.float32) * weights_TK.unsqueeze(-1)).sum(1)
        x_ETD = x_ETD * weight_TE.t().unsqueeze(-1)
    y_ETD = down(activate(up(x_ETD), moe.mlp))
    y_TED = y_ETD.permute(1, 0, 2)
    y_TKD = y_TED.gather(1, indices_TK.unsqueeze(-1).expand(-1, -1, y_TED.shape[-1]))
    if how.apply == "output":
        y_TKD = y_TKD * weights_TK.unsqueeze(-1)
    return indices_TK, weights_TK, y_TKD.sum(1)


def _shared(
    x: Tensor, up: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor], gate: Tensor | None, what: Experts
) -> Tensor:
    halves = Experts(**{**what.__dict__, "layout": "out_in", "interleaved": False})
    y = down(activate(up(x), halves))
    return y if gate is None else torch.sigmoid(functional.linear(x, gate.to(torch.float32))) * y


def expand_fused_moe(moe: FusedMoe[Tensor]) -> tuple[Tensor, Tap]:
    """`fused_moe`: (y float32 [T, D], what a trace records). Every expert runs on every token."""
    what = moe.mlp

    def multiply(weight: Tensor, bias: Tensor | None) -> Batched:
        w = weight.to(torch.float32)
        w = w.transpose(1, 2) if what.layout == "out_in" else w
        return lambda rows: torch.bmm(rows, w) + (0 if bias is None else bias.to(torch.float32).unsqueeze(1))

    indices, weights, y = _routed(moe, multiply(moe.w13, moe.b13), multiply(moe.w2, moe.b2))
    if moe.shared_w13 is not None and moe.shared_w2 is not None:
        w_up, w_down = moe.shared_w13.to(torch.float32), moe.shared_w2.to(torch.float32)
        rows = moe.x.to(torch.float32)
        y = y + _shared(
            rows, lambda r: functional.linear(r, w_up), lambda r: functional.linear(r, w_down), moe.shared_gate, what
        )
    return y, Tap(moe.x.to(torch.float32), indices, weights, y)


def _quantized_products(
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    rounded: bool,
    block: int,
) -> Batched:
    """[E, T, K] times every expert's weight: `linear_in_groups` (out_in) or `linear_out_groups` (in_out) per expert."""

    def add_bias(y_ETn: Tensor) -> Tensor:
        return y_ETn if bias is None else y_ETn + bias.to(torch.float32).unsqueeze(1)

    def in_groups(rows: Tensor) -> Tensor:
        w_EKN = dequantized(codes, scales, bits, group_size).transpose(1, 2)
        if not rounded:
            return add_bias(torch.bmm(rows, w_EKN))
        if block:
            return add_bias(torch.bmm(fake_quantize_rows(rows, block), w_EKN))
        q, scale = quantize_rows(rows)
        return add_bias(torch.bmm(q, w_EKN) * scale)

    def out_groups(rows: Tensor) -> Tensor:
        if not rounded:
            return add_bias(torch.bmm(rows, dequantized(codes, scales, bits, group_size)))
        count, tokens, wide = rows.shape
        q_EKGn = integers(codes, bits).to(torch.float32).unflatten(-1, (-1, group_size))
        groups = q_EKGn.shape[2]
        q_XKn = q_EKGn.permute(0, 2, 1, 3).contiguous().view(count * groups, wide, group_size)
        # z = x * s for each group of outputs, rounded by itself
        z_EGTK = rows.unsqueeze(1) * scales.to(torch.float32).permute(0, 2, 1).contiguous().unsqueeze(2)
        scale_EGT1: Tensor | float
        if block:
            zq_EGTK, scale_EGT1 = fake_quantize_rows(z_EGTK, block), 1.0
        else:
            zq_EGTK, scale_EGT1 = quantize_rows(z_EGTK)
        y_XTn = torch.bmm(zq_EGTK.contiguous().view(count * groups, tokens, wide), q_XKn)
        y_EGTn = y_XTn.view(count, groups, tokens, group_size) * scale_EGT1
        return add_bias(y_EGTn.permute(0, 2, 1, 3).contiguous().view(count, tokens, groups * group_size))

    return in_groups if layout == "out_in" else out_groups


def expand_fused_moe_q(moe: FusedMoeQ[Tensor]) -> tuple[Tensor, Tap]:
    """`fused_moe_q`: (y float32 [T, D], what a trace records). Every expert runs on every token."""
    form = (moe.bits, moe.group_size, moe.int8_activations, moe.activation_block)
    w13 = _quantized_products(moe.w13_codes, moe.w13_scales, moe.b13, moe.mlp.layout, *form)
    w2 = _quantized_products(moe.w2_codes, moe.w2_scales, moe.b2, moe.mlp.layout, *form)
    indices, weights, y = _routed(moe, w13, w2)
    shared_up, shared_down = moe.weight("shared_w13"), moe.weight("shared_w2")
    if shared_up is not None and shared_down is not None:

        def linear(codes: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda rows: _linear_q(rows, codes, scales, *form)

        rows = moe.x.to(torch.float32)
        y = y + _shared(rows, linear(*shared_up), linear(*shared_down), moe.shared_gate, moe.mlp)
    return y, Tap(moe.x.to(torch.float32), indices, weights, y)


# operators of one tensor result
PLAIN: dict[type[Call[Any]], Callable[[Any], Tensor]] = {
    LinearQ: expand_linear_q,
    EmbeddingQ: expand_embedding_q,
    RmsNorm: expand_rms_norm,
    Rope: expand_rope,
}
ROUTED: dict[type[Call[Any]], Callable[[Any], tuple[Tensor, Tap]]] = {
    FusedMoe: expand_fused_moe,
    FusedMoeQ: expand_fused_moe_q,
}
# operators that write caches: the results after the first are the caches that `Call.written` names
ATTENTION: dict[type[Call[Any]], Callable[[Any], tuple[Tensor, ...]]] = {
    CachedAttention: expand_cached_attention,
}
