"""The decoder in plain PyTorch: MobileMoE, and its dense relative MobileLLM-Pro.

No fused operator is used: router, top-k, dispatch and combine are ordinary operators, so that the compiler has to find
them. Module paths are the tensor names of the released checkpoints, so that loading is by name.

    h = x + o_proj(attention(norm(x)))          q, k: rotary, then RMS norm without a scale
    y = h + routed(norm(h)) + shared(norm(h))   routed: sum over the top-k experts of  w_k * expert_k

Shape suffixes: B batch (always 1), T tokens of this call, S positions of the cache, D d_model, H query heads, G KV
heads, d head_dim, P rotary pairs, E experts, K selected experts, F expert width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.sources.decoder.config import DecoderConfig, MoeConfig
from moec.sources.decoder.rope import rope_tables

Dispatch = Literal["gathered", "loop"]


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)


class Linear(nn.Module):
    """`x @ weight.T`; uninitialised, because every weight comes from a checkpoint."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = _parameter(width_out, width_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = _parameter(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = _parameter(vocab_size, d_model)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


def apply_rope(x_BTHd: Tensor, cos_TP: Tensor, sin_TP: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs (2i, 2i+1) if `interleaved`, else (i, i + d/2)."""
    cos, sin = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)  # one angle for all heads
    if interleaved:
        even, odd = x_BTHd.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    first, second = x_BTHd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention over a static KV cache that `forward` writes in place."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.interleaved, self.qk_norm, self.eps = config.rope.interleaved, config.qk_norm, config.norm_eps
        self.q_proj = Linear(config.d_model, self.heads * self.head_dim)
        self.k_proj = Linear(config.d_model, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.d_model, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.d_model)
        shape = (1, config.context, self.kv_heads, self.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("v_cache", torch.zeros(shape, dtype=torch.float32))

    def forward(self, x_BTD: Tensor, positions_T: Tensor, cos_TP: Tensor, sin_TP: Tensor, mask_TS: Tensor) -> Tensor:
        q_BTHd = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        k_BTGd = self.k_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))
        v_BTGd = self.v_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))
        q_BTHd = apply_rope(q_BTHd, cos_TP, sin_TP, interleaved=self.interleaved)
        k_BTGd = apply_rope(k_BTGd, cos_TP, sin_TP, interleaved=self.interleaved)
        if self.qk_norm:
            q_BTHd = F.rms_norm(q_BTHd, (self.head_dim,), eps=self.eps)
            k_BTGd = F.rms_norm(k_BTGd, (self.head_dim,), eps=self.eps)
        self.k_cache.index_copy_(1, positions_T, k_BTGd)
        self.v_cache.index_copy_(1, positions_T, v_BTGd)
        y_BHTd = F.scaled_dot_product_attention(
            q_BTHd.transpose(1, 2),
            self.k_cache.transpose(1, 2),
            self.v_cache.transpose(1, 2),
            attn_mask=mask_TS,
            scale=self.head_dim**-0.5,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.o_proj(y_BHTd.transpose(1, 2).flatten(-2))


class GatedMlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, width)
        self.up_proj = Linear(d_model, width)
        self.down_proj = Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Expert scores in FP32, whatever the type of the input."""

    def __init__(self, d_model: int, moe: MoeConfig) -> None:
        super().__init__()
        self.weight = _parameter(moe.experts, d_model)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = F.linear(x_TD.to(torch.float32), self.weight)
        return logits_TE.sigmoid()


class Experts(nn.Module):
    """All experts of a layer in two stacked weights, applied to the experts each token selected.

    `gathered` exports to a fixed graph but copies K experts per token: it is there to be recognised and replaced, or
    for tiny models. `loop` visits every expert that was hit once, and is how the model runs eagerly.
    """

    def __init__(self, d_model: int, moe: MoeConfig, dispatch: Dispatch) -> None:
        super().__init__()
        self.gate_up_proj = _parameter(moe.experts, d_model, 2 * moe.expert_width)
        self.down_proj = _parameter(moe.experts, moe.expert_width, d_model)
        self.dispatch = dispatch

    def forward(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if self.dispatch == "loop":
            return self._loop(x_TD, indices_TK, weights_TK)
        gate_TKF, up_TKF = torch.einsum("td,tkdf->tkf", x_TD, self.gate_up_proj[indices_TK]).chunk(2, dim=-1)
        y_TKD = torch.einsum("tkf,tkfd->tkd", F.silu(gate_TKF) * up_TKF, self.down_proj[indices_TK])
        return (y_TKD * weights_TK.unsqueeze(-1)).sum(dim=1)

    def _loop(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TKD = x_TD.new_empty(*indices_TK.shape, x_TD.shape[-1])
        for expert in indices_TK.unique().tolist():
            rows, slots = (indices_TK == expert).nonzero(as_tuple=True)
            gate, up = (x_TD[rows] @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            y_TKD[rows, slots] = (F.silu(gate) * up) @ self.down_proj[expert]
        return (y_TKD * weights_TK.unsqueeze(-1)).sum(dim=1)


class MoeBlock(nn.Module):
    """Routed experts plus the shared expert. The selection bias shifts which experts are chosen, never their weight."""

    expert_bias: Tensor | None

    def __init__(self, d_model: int, moe: MoeConfig, dispatch: Dispatch) -> None:
        super().__init__()
        self.top_k, self.normalize, self.scale = moe.top_k, moe.normalize, moe.scale
        self.router = Router(d_model, moe)
        self.expert_bias = _parameter(moe.experts) if moe.selection_bias else None
        self.experts = Experts(d_model, moe, dispatch)
        self.shared_expert = GatedMlp(d_model, moe.shared_width) if moe.shared_width else None

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(indices int64 [T, K], combine weights float32 [T, K])."""
        scores_TE = self.router(x_TD)
        selection_TE = scores_TE if self.expert_bias is None else scores_TE + self.expert_bias
        indices_TK = selection_TE.topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(-1, indices_TK)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return indices_TK, weights_TK * self.scale

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        indices_TK, weights_TK = self.route(x_TD)
        y_TD = self.experts(x_TD, indices_TK, weights_TK)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view_as(x_BTD)


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int, dispatch: Dispatch) -> None:
        super().__init__()
        self.windowed = config.window(layer) > 0
        self.input_layernorm = RmsNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.d_model, config.norm_eps)
        self.feed_forward: nn.Module
        if config.moe is not None:
            self.feed_forward = MoeBlock(config.d_model, config.moe, dispatch)
        else:
            assert config.ffn_width is not None
            self.feed_forward = GatedMlp(config.d_model, config.ffn_width)

    def forward(self, x_BTD: Tensor, positions_T: Tensor, cos_TP: Tensor, sin_TP: Tensor, mask_TS: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), positions_T, cos_TP, sin_TP, mask_TS)
        return x_BTD + self.feed_forward(self.post_attention_layernorm(x_BTD))


class _Body(nn.Module):
    """What the checkpoints call `model`: everything but the head."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: DecoderConfig, dispatch: Dispatch) -> None:
        super().__init__()
        self.context = config.context
        self.window = 0 if config.attention_window is None else config.attention_window.size
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, dispatch) for layer in range(config.layers))
        self.norm = RmsNorm(config.d_model, config.norm_eps)
        cos_SP, sin_SP = rope_tables(config.rope, config.context, config.head_dim)
        self.register_buffer("rope_cos", cos_SP)
        self.register_buffer("rope_sin", sin_SP)

    def forward(self, tokens_BT: Tensor, start_pos_1: Tensor) -> Tensor:
        positions_T = start_pos_1 + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        cos_TP = self.rope_cos.index_select(0, positions_T)
        sin_TP = self.rope_sin.index_select(0, positions_T)
        keys_S = torch.arange(self.context, device=tokens_BT.device)
        causal_TS = keys_S <= positions_T.unsqueeze(1)
        # the window holds the last `window` positions, the token's own among them
        local_TS = causal_TS & (keys_S > positions_T.unsqueeze(1) - self.window) if self.window else causal_TS
        x_BTD = self.embed_tokens(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, positions_T, cos_TP, sin_TP, local_TS if layer.windowed else causal_TS)
        return self.norm(x_BTD)


class Decoder(nn.Module):
    """The whole model. Weights are uninitialised until loaded by name; under FakeTensorMode nothing is allocated.

    `forward(tokens int64 [1, T], start_pos int64 [1]) -> logits float32 [1, T, V]` writes positions start_pos.. of the
    KV cache and attends to everything at and before each token. The caller keeps start_pos + T within the context and
    token ids within the vocabulary.
    """

    def __init__(self, config: DecoderConfig, dispatch: Dispatch = "gathered") -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config, dispatch)
        self.lm_head = None if config.tied_embeddings else Linear(config.d_model, config.vocab_size)

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x_BTD = self.model(tokens, start_pos)
        if self.lm_head is not None:
            return self.lm_head(x_BTD)
        return F.linear(x_BTD, self.model.embed_tokens.weight)

    def reset(self) -> None:
        """Forget the KV cache."""
        for name, buffer in self.named_buffers():
            if name.endswith(("k_cache", "v_cache")):
                buffer.zero_()
