"""A dense decoder that writes text: many rows at once, one token of each at a time, in float32.

What a model writes itself covers what it knows better than any corpus at hand, so a mixture made of it heals on its own
words (data-free distillation: LLM-QAT, arXiv 2305.17888; prompts of its own: Magpie, arXiv 2406.08464).

B rows, L layers, D d_model, H query heads, G KV heads, d head_dim, Q rotary pairs, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.sources.decoder.decoder import apply_rope
from moec.sources.decoder.rope import rope_tables
from moec.sources.dense_decoder import DenseDecoder


@dataclass(frozen=True)
class _Layer:
    """Matrices as products read them: rows of `qkv` are queries, keys, values, those of `gate_up` gate and up.

    window: how many of the last positions a token sees, 0 for all.
    """

    window: int
    norm_D: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm_D: Tensor
    gate_up: Tensor
    down: Tensor


class Writer:
    """Continues rows by sampling. top_k: how many of the likeliest tokens a choice is made among."""

    def __init__(self, dense: DenseDecoder, *, top_k: int = 64) -> None:
        self.config, self._top_k = dense.config, top_k
        weights = dict(dense.weights())
        self._table_VD = weights["model.embed_tokens.weight"]
        self._head_VD = self._table_VD if dense.config.tied_embeddings else weights["lm_head.weight"]
        self._norm_D = weights["model.norm.weight"]
        self._layers = [self._layer(weights, n) for n in range(dense.config.layers)]

    def _layer(self, weights: dict[str, Tensor], layer: int) -> _Layer:
        name = f"model.layers.{layer}."

        def joined(*parts: str) -> Tensor:
            return torch.cat([weights[f"{name}{part}_proj.weight"] for part in parts])

        return _Layer(
            self.config.window(layer),
            weights[name + "input_layernorm.weight"],
            joined("self_attn.q", "self_attn.k", "self_attn.v"),
            joined("self_attn.o"),
            weights[name + "post_attention_layernorm.weight"],
            joined("feed_forward.gate", "feed_forward.up"),
            joined("feed_forward.down"),
        )

    @torch.no_grad()
    def rows(
        self,
        starts: Sequence[Sequence[int]],
        length: int,
        generator: torch.Generator,
        *,
        after: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """The token of each row at every position in turn, int64 [B], `length` of them: those of `starts` (equally many
        for every row), then sampled ones, at temperature 1.

        after: tokens of which the first, once a row has sampled it, is followed by the others, the first time.
        """
        config, batch = self.config, len(starts)
        shape = (config.layers, batch, config.kv_heads, length, config.head_dim)
        keys_LBGTd, values_LBGTd = torch.zeros(shape), torch.zeros(shape)
        cos_TQ, sin_TQ = rope_tables(config.rope, length, config.head_dim)
        start_TB = torch.tensor(starts).T
        tokens_B = start_TB[0]
        given_B = torch.zeros(batch, dtype=torch.int64)  # how many of `after` a row has
        after_A = torch.tensor([*after, 0])
        for position in range(length):
            yield tokens_B
            if position + 1 == length:
                return
            h_BD = self._step(tokens_B, position, keys_LBGTd, values_LBGTd, cos_TQ, sin_TQ)
            if position + 1 < len(start_TB):
                tokens_B = start_TB[position + 1]
                continue
            tokens_B = self._chosen(h_BD, generator)
            if after:
                within_B = (given_B > 0) & (given_B < len(after))
                tokens_B = torch.where(within_B, after_A[given_B], tokens_B)
                given_B += within_B | ((given_B == 0) & (tokens_B == after[0]))

    def _step(
        self, tokens_B: Tensor, position: int, keys: Tensor, values: Tensor, cos_TQ: Tensor, sin_TQ: Tensor
    ) -> Tensor:
        config, batch = self.config, len(tokens_B)
        widths = [config.heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
        angles = (cos_TQ[position : position + 1], sin_TQ[position : position + 1])
        x_BD = self._table_VD[tokens_B]
        for layer, keys_BGTd, values_BGTd in zip(self._layers, keys, values, strict=True):
            h_BD = F.rms_norm(x_BD, (x_BD.shape[-1],), layer.norm_D, config.norm_eps)
            q, k, v = F.linear(h_BD, layer.qkv).split(widths, dim=-1)
            q_BH1d = apply_rope(q.view(batch, -1, 1, config.head_dim), *angles, interleaved=config.rope.interleaved)
            k_BG1d = apply_rope(k.view(batch, -1, 1, config.head_dim), *angles, interleaved=config.rope.interleaved)
            if config.qk_norm:
                q_BH1d = F.rms_norm(q_BH1d, (config.head_dim,), eps=config.norm_eps)
                k_BG1d = F.rms_norm(k_BG1d, (config.head_dim,), eps=config.norm_eps)
            keys_BGTd[:, :, position] = k_BG1d.squeeze(2)
            values_BGTd[:, :, position] = v.view(batch, -1, config.head_dim)
            # the query heads of a KV head stand as rows of one product, so that no key is read twice
            q_XRd = q_BH1d.reshape(batch * config.kv_heads, -1, config.head_dim) * config.head_dim**-0.5
            first = max(0, position + 1 - layer.window) if layer.window else 0
            seen = slice(first, position + 1)
            keys_XTd, values_XTd = (kept[:, :, seen].flatten(0, 1) for kept in (keys_BGTd, values_BGTd))
            y_BGRd = torch.bmm(torch.bmm(q_XRd, keys_XTd.transpose(1, 2)).softmax(-1), values_XTd)
            x_BD = x_BD + F.linear(y_BGRd.reshape(batch, -1), layer.out)
            h_BD = F.rms_norm(x_BD, (x_BD.shape[-1],), layer.ffn_norm_D, config.norm_eps)
            gate_BF, up_BF = F.linear(h_BD, layer.gate_up).chunk(2, dim=-1)
            x_BD = x_BD + F.linear(F.silu(gate_BF).mul_(up_BF), layer.down)
        return F.rms_norm(x_BD, (x_BD.shape[-1],), self._norm_D, config.norm_eps)

    def _chosen(self, h_BD: Tensor, generator: torch.Generator) -> Tensor:
        best_BK, tokens_BK = F.linear(h_BD, self._head_VD).topk(self._top_k, dim=-1, sorted=False)
        choice_B1 = torch.multinomial(best_BK.softmax(-1), 1, generator=generator)
        return tokens_BK.gather(1, choice_B1).squeeze(1)
