"""The decoder as it is trained: the mathematics of `sources/decoder/decoder.py` on batches of packed documents.

Module paths are the tensor names of checkpoints. Differences from the compiler's module, which exports and runs one
sequence with a cache: several rows at once, attention and positions that stay within a document, experts computed on
sorted rows, optional rounding (`training/rounding.py`), and the sums that losses and balancing need.

B rows, T tokens of a row, N = B * T, D d_model, H query heads, G KV heads, d head_dim, Q rotary pairs, E experts,
K experts per token, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Role
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import router_names
from moec.sources.decoder.rope import rope_tables
from moec.training.experts import Compute
from moec.training.locality import window_ends
from moec.training.loss import Lesson, taught_losses, token_losses
from moec.training.moe import MoeBlock
from moec.training.parts import GatedMlp, Linear, RmsNorm, Weight, as_operand, rotate
from moec.training.rounding import Rounding


@dataclass(frozen=True)
class Forward:
    """Sums over one batch. nll, weight: of -log p(target) and of the loss mask, float32 []. z: of logsumexp(router
    logits)^2 over tokens and layers, float32 []. load_LE: pairs that selected each expert, int64. dropped_L: pairs not
    computed, int64. spread: the loss of `training/locality.py`, over windows and layers, float32 [], 0 unless a stage
    trains with it. distinct_L: different experts of each window, over windows, int64. windows: their number, int64 [].
    hits: mask summed where the target was the likeliest token, float32 [], 0 while gradients are recorded. Of a stage
    that learns from a teacher, else 0: kld, the masked divergence from it; blocks, the relative squared error of each
    token's blocks, in the mean over layers; taught, the weighted sum of nll and kld, which alone of the three has a
    gradient then.
    """

    nll: Tensor
    weight: Tensor
    hits: Tensor
    z: Tensor
    load_LE: Tensor
    dropped_L: Tensor
    spread: Tensor
    distinct_L: Tensor
    windows: Tensor
    kld: Tensor = field(default_factory=lambda: torch.zeros(()))
    blocks: Tensor = field(default_factory=lambda: torch.zeros(()))
    taught: Tensor = field(default_factory=lambda: torch.zeros(()))


class Attention(nn.Module):
    """Grouped-query attention within documents."""

    def __init__(self, config: DecoderConfig, rounding: Rounding | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.interleaved, self.qk_norm, self.eps = config.rope.interleaved, config.qk_norm, config.norm_eps
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(config.d_model, width, Role.ATTENTION, rounding)
        self.k_proj = Linear(config.d_model, kv_width, Role.ATTENTION, rounding)
        self.v_proj = Linear(config.d_model, kv_width, Role.ATTENTION, rounding)
        self.o_proj = Linear(width, config.d_model, Role.ATTENTION, rounding)
        self._round_input = rounding.activations(Role.ATTENTION) if rounding else None
        self._round_cache = rounding.cache if rounding else None

    def forward(self, x_BTD: Tensor, cos_BTQ: Tensor, sin_BTQ: Tensor, mask_B1TT: Tensor) -> Tensor:
        x_BTD = as_operand(_rounded(self._round_input, x_BTD))
        q_BHTd = self._heads_first(self.q_proj(x_BTD), self.heads)
        k_BGTd = self._heads_first(self.k_proj(x_BTD), self.kv_heads)
        v_BGTd = self._heads_first(self.v_proj(x_BTD), self.kv_heads)
        # torch's attention on the CPU is faster in float32; elsewhere it takes the type of the products
        dtype = torch.float32 if x_BTD.device.type == "cpu" else v_BGTd.dtype
        # heads first, so that the angles [B, T, Q] broadcast over them
        q_BHTd = rotate(q_BHTd, cos_BTQ, sin_BTQ, self.interleaved)
        k_BGTd = rotate(k_BGTd, cos_BTQ, sin_BTQ, self.interleaved)
        if self.qk_norm:
            q_BHTd = F.rms_norm(q_BHTd, (self.head_dim,), eps=self.eps)
            k_BGTd = F.rms_norm(k_BGTd, (self.head_dim,), eps=self.eps)
        k_BGTd, v_BGTd = _rounded(self._round_cache, k_BGTd), _rounded(self._round_cache, v_BGTd)
        y_BHTd = F.scaled_dot_product_attention(
            q_BHTd.to(dtype),
            k_BGTd.to(dtype),
            v_BGTd.to(dtype),
            attn_mask=mask_B1TT.to(dtype),
            scale=self.head_dim**-0.5,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.o_proj(_rounded(self._round_input, y_BHTd.transpose(1, 2).flatten(-2)))

    def _heads_first(self, x_BTHd: Tensor, heads: int) -> Tensor:
        return x_BTHd.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)


def _rounded(rounding: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    return x if rounding is None else rounding(x)


class DecoderLayer(nn.Module):
    """Returns the stream and the block's sums (`MoeBlock`), of no experts where the block is dense."""

    def __init__(self, config: DecoderConfig, layer: int, rounding: Rounding | None, compute: Compute) -> None:
        super().__init__()
        self.windowed = config.window(layer) > 0
        self.input_layernorm = RmsNorm(config.d_model, config.norm_eps, rounding)
        self.self_attn = Attention(config, rounding)
        self.post_attention_layernorm = RmsNorm(config.d_model, config.norm_eps, rounding)
        self.feed_forward: MoeBlock | GatedMlp
        if config.moe is not None:
            self.feed_forward = MoeBlock(config.d_model, config.moe, rounding, compute)
        else:
            assert config.ffn_width is not None
            self.feed_forward = GatedMlp(config.d_model, config.ffn_width, Role.FFN, rounding)

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTQ: Tensor | None = None,
        sin_BTQ: Tensor | None = None,
        mask_B1TT: Tensor | None = None,
        ends_BT: Tensor | None = None,
        *,
        block_alone: bool = False,
    ) -> tuple[Tensor, ...]:
        """block_alone: `x_BTD` is what the feed-forward block reads, and the first value is what it gives."""
        if block_alone:
            return self._block(x_BTD, ends_BT)
        assert cos_BTQ is not None
        assert sin_BTQ is not None
        assert mask_B1TT is not None
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_BTQ, sin_BTQ, mask_B1TT)
        y_BTD, *sums = self._block(self.post_attention_layernorm(x_BTD), ends_BT)
        return x_BTD + y_BTD, *sums

    def _block(self, h_BTD: Tensor, ends_BT: Tensor | None) -> tuple[Tensor, ...]:
        if isinstance(self.feed_forward, MoeBlock):
            y_ND, *sums = self.feed_forward(h_BTD.flatten(0, 1), ends_BT)
            return y_ND.view_as(h_BTD), *sums
        none = torch.zeros((), dtype=torch.int64, device=h_BTD.device)
        no_loss = h_BTD.new_zeros((), dtype=torch.float32)
        return self.feed_forward(h_BTD), no_loss, none.new_zeros(0), none, no_loss, none


class _Body(nn.Module):
    """What the checkpoints call `model`: everything but the head."""

    def __init__(self, config: DecoderConfig, rounding: Rounding | None, compute: Compute) -> None:
        super().__init__()
        self.embed_tokens = Weight((config.vocab_size, config.d_model), Role.EMBEDDING, rounding)
        self.layers = nn.ModuleList(DecoderLayer(config, n, rounding, compute) for n in range(config.layers))
        self.norm = RmsNorm(config.d_model, config.norm_eps, rounding)


class TrainingDecoder(nn.Module):
    """The whole model, float32 parameters, uninitialised until loaded by name.

    capacity_factor: rows an expert computes in training, as a multiple of an even share; None computes every pair, as
    evaluation always does. local: whether training computes the loss of locality. Both are plain state: a stage sets
    them.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: DecoderConfig, rounding: Rounding | None = None, compute: Compute = "auto") -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config, rounding, compute)
        role = Role.EMBEDDING if config.tied_embeddings else Role.HEAD
        shape = (config.vocab_size, config.d_model)
        self.lm_head = None if config.tied_embeddings else Weight(shape, Role.HEAD, rounding)
        self._round_head = rounding.activations(role) if rounding else None
        cos_SQ, sin_SQ = rope_tables(config.rope, config.context, config.head_dim)
        self.register_buffer("rope_cos", cos_SQ, persistent=False)
        self.register_buffer("rope_sin", sin_SQ, persistent=False)

    @property
    def blocks(self) -> list[MoeBlock]:
        """The MoE blocks in order; empty for a dense model."""
        layers = (layer.feed_forward for layer in self.model.layers)
        return [block for block in layers if isinstance(block, MoeBlock)]

    def set_capacity(self, factor: float | None) -> None:
        for block in self.blocks:
            block.capacity_factor = factor

    def set_trained(self, trains: Literal["all", "routers"]) -> None:
        """Which weights get gradients from here on."""
        routers = set(router_names(self.config))
        for name, p in self.named_parameters():
            p.requires_grad_(trains == "all" or name in routers)

    def set_local(self, local: bool) -> None:
        for block in self.blocks:
            block.local = local

    def forward(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> tuple[Tensor, ...]:
        """(logits [B, T, V] float32,) without targets; with them the fields of `Forward`, as a tuple, and the last
        three only with a `lesson`, what a teacher computed for the same tokens.

        tokens, targets int64 [B, T]; documents int [B, T], equal for tokens that may see each other, contiguous;
        mask float32 [B, T], the weight of each position's loss. T is at most the model's context.
        """
        if documents_BT is None:
            documents_BT = torch.zeros_like(tokens_BT)
        blocks = torch.zeros((), device=tokens_BT.device)
        ends_BT = window_ends(documents_BT, mask_BT) if self.blocks and mask_BT is not None else None
        if lesson is not None and lesson.blocks:
            blocks, sums = self._blocks_alone(lesson, ends_BT)
            if lesson.taught is None:
                none = torch.zeros_like(blocks)
                return none, none, none, *sums, none, blocks, none
        x_BTD, sums = self.hidden(tokens_BT, documents_BT, ends_BT)
        h_ND = _rounded(self._round_head, x_BTD).flatten(0, 1)
        head_VD = self.head()
        if targets_BT is None or mask_BT is None:
            return (F.linear(h_ND, head_VD).float().view(*tokens_BT.shape, -1),)
        if lesson is not None and lesson.taught is not None:
            taught, nll, kld = taught_losses(h_ND, head_VD, targets_BT.flatten(), mask_BT.flatten(), lesson.taught)
            return nll, mask_BT.sum(), torch.zeros_like(nll), *sums, kld, blocks, taught
        nll, hits = _losses(h_ND, head_VD, targets_BT.flatten(), mask_BT.flatten())
        return nll, mask_BT.sum(), hits, *sums

    def hidden(self, tokens_BT: Tensor, documents_BT: Tensor, ends_BT: Tensor | None = None) -> tuple[Tensor, _Sums]:
        """What the head reads, [B, T, D], and the sums over layers: z to windows of `Forward`."""
        positions_BT = document_positions(documents_BT)
        cos_BTQ, sin_BTQ = self.rope_cos[positions_BT], self.rope_sin[positions_BT]
        masks = attention_masks(documents_BT, self.config)
        x_BTD = F.embedding(tokens_BT, self.model.embed_tokens())
        parts = []
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer)
            x_BTD, *part = layer(x_BTD, cos_BTQ, sin_BTQ, masks[layer.windowed], ends_BT)
            parts.append(part)
        return self.model.norm(x_BTD), _summed(parts, ends_BT)

    def head(self) -> Tensor:
        """The weights of the head, [V, D]."""
        return self.model.embed_tokens() if self.lm_head is None else self.lm_head()

    def _blocks_alone(self, lesson: Lesson, ends_BT: Tensor | None) -> tuple[Tensor, _Sums]:
        """(the mean over layers of the errors of blocks on a teacher's inputs, the sums as of `hidden`)."""
        errors, parts = [], []
        for layer, (x_BTD, wanted_BTD) in zip(self.model.layers, lesson.blocks, strict=True):
            y_BTD, *part = layer(x_BTD, ends_BT=ends_BT, block_alone=True)
            errors.append(relative_errors(y_BTD, wanted_BTD))
            parts.append(part)
        return torch.stack(errors).mean(), _summed(parts, ends_BT)


_Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _summed(parts: list[list[Tensor]], ends_BT: Tensor | None) -> _Sums:
    zs, loads, drops, spreads, distinct = (torch.stack(part) for part in zip(*parts, strict=True))
    windows = torch.zeros_like(drops[0]) if ends_BT is None else ends_BT.sum()
    return zs.sum(), loads, drops, spreads.sum(), distinct, windows


def _losses(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, mask_N: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses` of the rows that have one; the others are left out of the product."""
    rows = mask_N.nonzero().flatten()
    if rows.numel() < mask_N.numel():
        h_ND, targets_N, mask_N = h_ND.index_select(0, rows), targets_N[rows], mask_N[rows]
    return token_losses(h_ND, head_VD, targets_N, mask_N)


def relative_errors(y_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    """Squared errors as parts of the squares that were wanted, summed over tokens, float32 [].

    A token counts by its own square, but at least by the median's: neither the few tokens of enormous activations nor
    those whose block adds almost nothing decide alone.
    """
    wanted_BTD = wanted_BTD.float()
    square_BT = wanted_BTD.square().sum(-1)
    error_BT = (y_BTD.float() - wanted_BTD).square().sum(-1)
    return (error_BT / square_BT.clamp(min=float(square_BT.median()) + 1e-30)).sum()


def document_positions(documents_BT: Tensor) -> Tensor:
    """The position of each token within its document, int64 [B, T]."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    first = torch.ones_like(documents_BT, dtype=torch.bool)
    first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return index_T - torch.where(first, index_T, 0).cummax(dim=1).values


def attention_masks(documents_BT: Tensor, config: DecoderConfig) -> dict[bool, Tensor]:
    """Additive masks float32 [B, 1, T, T], 0 where a token sees another and -inf elsewhere, by `DecoderLayer.windowed`.

    A token sees the tokens of its own document at and before it, in windowed layers the last `size` of them.
    """
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    distance_TT = index_T.unsqueeze(1) - index_T
    seen_BTT = (documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)) & (distance_TT >= 0)
    masks = {False: _additive(seen_BTT)}
    if config.attention_window is not None:
        masks[True] = _additive(seen_BTT & (distance_TT < config.attention_window.size))
    return masks


def _additive(seen_BTT: Tensor) -> Tensor:
    return torch.zeros(seen_BTT.shape, device=seen_BTT.device).masked_fill_(~seen_BTT, -torch.inf).unsqueeze(1)
