"""The decoder evaluated layer by layer with the weights and the rounding that a compiled artifact has.

Artifacts are verified against it: it has the same codes and scales and, on request, the same rounding of activations
and of the KV cache, in plain PyTorch.

Verification runs this and not the exported graph for two reasons. It reads and rounds the checkpoint by itself, so a
pass that is wrong cannot be wrong on both sides. And its layers can be started from an artifact's own values
(`following.py`): dynamic INT8 rounding makes whole runs drift apart, however right both are, and only layers that start
from the same values can be held to tight limits. Weights are streamed: no more than one layer is in memory, and of a
quantized layer only the current expert is dequantized.

Shape suffixes as in `decoder.py`: T tokens, D d_model, H query heads, G KV heads, d head_dim, E experts, K selected
experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.errors import RunError
from moec.compiler.ops.attention_codes import attend_codes
from moec.compiler.ops.fused_moe_q import linear_out_groups
from moec.compiler.ops.linear_q import linear_in_groups
from moec.compiler.program import LazyWeight, Role
from moec.compiler.quant import QuantizedTensor, fake_quantize_rows, fake_quantize_rows_asymmetric, quantize_rows
from moec.compiler.quantizer import codes_of
from moec.compiler.reference import OnLayer, Prompts, Routed, Selections
from moec.compiler.spec.model import Quantization
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.decoder import apply_rope
from moec.sources.decoder.layout import moe_layers, weight_layout
from moec.sources.decoder.rope import rope_tables

_ELEMENTS = 1 << 25  # bounds temporaries: rows of logits, rows scaled for every group of outputs


class Weights(Protocol):
    """Model weight name -> LazyWeight: a `WeightStore`, or a mapping."""

    def __getitem__(self, name: str, /) -> LazyWeight: ...


@dataclass(frozen=True)
class LayerRecord:
    """One MoE layer in one forward: its input, its routing and its output. `used_TK` is what the experts ran with."""

    layer: int
    x_TD: np.ndarray
    routed: Routed
    used_TK: np.ndarray
    y_TD: np.ndarray


@dataclass(frozen=True)
class ReferenceResult:
    """Logits float32 [T, V], and a record per MoE layer (empty for a dense model)."""

    logits: np.ndarray
    layers: tuple[LayerRecord, ...]


class Matrix:
    """A weight and the way its products are computed. `shape` is logical: [N, K], or experts [E, K, N]."""

    def __init__(
        self,
        weight: Tensor | QuantizedTensor,
        *,
        in_out: bool,
        int8_activations: bool,
        activation_block: int = 0,
        asymmetric: bool = False,
    ) -> None:
        self._weight, self._in_out = weight, in_out
        self._int8, self._block, self._asymmetric = int8_activations, activation_block, asymmetric

    def __call__(self, x: Tensor, index: int | None = None) -> Tensor:
        """x [..., K] times the weight, or expert `index` of it."""
        weight = self._weight
        if isinstance(weight, Tensor):
            w = weight if index is None else weight[index]
            return x @ w if self._in_out else F.linear(x, w)
        if index is not None:
            weight = weight.part(index)
        if self._in_out:
            return self._along_out(x, weight)
        if self._asymmetric:
            return F.linear(fake_quantize_rows_asymmetric(x), weight.dequantize())
        return linear_in_groups(x, weight, self._int8, self._block)

    def _along_out(self, x_TK: Tensor, weight: QuantizedTensor) -> Tensor:
        """Some rows at a time: each is scaled once for every group of outputs."""
        step = max(1, _ELEMENTS // max(1, weight.scales.numel()))
        return torch.cat([linear_out_groups(piece, weight, self._int8, self._block) for piece in x_TK.split(step)])

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table, dequantized: an embedding."""
        weight = self._weight
        if isinstance(weight, Tensor):
            return weight[ids]
        return replace(weight, codes=weight.codes[ids], scales=weight.scales[ids]).dequantize()

    def by_rows(self, x_TK: Tensor) -> Tensor:
        """x times the weight [N, K], dequantizing some of its rows at a time: an output head."""
        weight = self._weight
        count, width = weight.shape[0], weight.shape[-1]
        step = max(1, _ELEMENTS // width)
        y_TN = torch.empty(x_TK.shape[0], count)
        for first in range(0, count, step):
            part = slice(first, first + step)
            piece = weight[part] if isinstance(weight, Tensor) else weight.part(part)
            matrix = Matrix(
                piece,
                in_out=False,
                int8_activations=self._int8,
                activation_block=self._block,
                asymmetric=self._asymmetric,
            )
            y_TN[:, part] = matrix(x_TK)
        return y_TN


class Reference:
    """The eager model as a compiled artifact should compute it.

    quantization: which weights are codes, as the compiler's own pass makes or carries them; None for float weights.
    activations: False computes in float on the same codes and with a float KV cache: what the weights alone cost.
    asymmetric_roles: roles whose INT4 linears another engine serves (`Facts.asymmetric_roles`). It rounds activations
    asymmetrically and holds scales as bfloat16.
    integer_attention: attention over an INT8 cache multiplies its codes (`Target.integer_attention`).
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        quantization: Quantization | None,
        *,
        activations: bool = True,
        asymmetric_roles: Collection[Role] = (),
        integer_attention: bool = False,
    ) -> None:
        self._config, self._weights, self._quantization = config, weights, quantization
        self._int8 = activations and quantization is not None and quantization.int8_activations
        self._int8_cache = activations and quantization is not None and quantization.cache_codes is not None
        self._integer_attention = integer_attention
        self._asymmetric_roles = frozenset(asymmetric_roles)
        self._layout = weight_layout(config)
        self._names = moe_layers(config)
        self._cos_SP, self._sin_SP = rope_tables(config.rope, config.context, config.head_dim)

    # --- weights ----------------------------------------------------------------------------------------------------

    def _matrix(self, name: str, *, delegated: bool = True) -> Matrix:
        info = self._layout[name]
        delegated = delegated and info.role in self._asymmetric_roles
        scheme = self._quantization.scheme(info.role, name) if self._quantization is not None else None
        stacked = len(info.shape) == 3
        weight: Tensor | QuantizedTensor
        if scheme is None:
            weight = self._weights[name].load()
            return Matrix(weight, in_out=stacked, int8_activations=False)
        weight = codes_of(self._weights[name], scheme, orientation="in_out" if stacked else "out_in", name=name)
        if delegated:
            weight = _bfloat16_scales(weight)
        in_out = stacked and scheme.axis == "out"
        assert self._quantization is not None
        block = self._quantization.activation_block(info.role, name) if self._int8 else 0
        return Matrix(
            weight,
            in_out=in_out,
            int8_activations=self._int8,
            activation_block=block,
            asymmetric=self._int8 and delegated,
        )

    def _vector(self, name: str) -> Tensor:
        return self._weights[name].load()

    # --- the model --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, ids: Sequence[int], forced_routing: Sequence[np.ndarray] | None = None) -> ReferenceResult:
        """One sequence from position 0. `forced_routing`: expert indices [T, K] for each MoE layer, in order.

        RunError for ids outside the vocabulary or more of them than the context.
        """
        records: list[LayerRecord] = []
        forced = None if forced_routing is None else {"": [np.asarray(layer) for layer in forced_routing]}
        logits = self._run({"": ids}, None, forced, records)
        return ReferenceResult(logits[""], tuple(records))

    @torch.no_grad()
    def run(
        self,
        prompts: Prompts,
        on_layer: OnLayer | None = None,
        *,
        routing: Selections | None = None,
    ) -> dict[str, np.ndarray]:
        """Logits float32 [T, V] by prompt; each layer's weights are read once for all prompts.

        `on_layer(n, block, routed)` is called for the n-th MoE layer while its weights are in memory, with the free
        routing of each prompt. `routing`: expert indices [T, K] for each MoE layer, in order, instead of the free ones.
        """
        return self._run(prompts, on_layer, routing, None)

    def _run(
        self,
        prompts: Prompts,
        on_layer: OnLayer | None,
        forced: Selections | None,
        records: list[LayerRecord] | None,
    ) -> dict[str, np.ndarray]:
        ids = {name: self._checked(tokens) for name, tokens in prompts.items()}
        table = self._matrix("model.embed_tokens.weight", delegated=False)  # rows are looked up by our kernel
        streams: Mapping[str, Tensor] = {name: table.rows(tokens) for name, tokens in ids.items()}
        del table
        for layer in range(self._config.layers):
            attention = AttentionReference(self, layer)
            streams = {name: x_TD + attention(x_TD) for name, x_TD in streams.items()}
            del attention
            streams, inputs = self._block_inputs(layer, streams)
            if not self._names:
                dense = GatedReference(self, f"model.layers.{layer}.feed_forward")
                streams = {name: x_TD + dense(inputs[name]) for name, x_TD in streams.items()}
                continue
            block = self.moe(layer)
            routed = {name: block.route(x_TD) for name, x_TD in inputs.items()}
            summed = dict(streams)
            for name, x_TD in inputs.items():
                used = routed[name].indices_TK if forced is None else forced[name][layer]
                y_TD = block.output(x_TD, used)
                summed[name] = summed[name] + torch.from_numpy(self._passed_on(layer, name, y_TD))
                if records is not None:
                    records.append(LayerRecord(layer, x_TD.numpy(), routed[name], used, y_TD))
            streams = summed
            if on_layer is not None:
                on_layer(layer, block, routed)
        return self._logits(streams)

    def _block_inputs(
        self, layer: int, streams: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The residual streams as the feed-forward block of `layer` finds them, and its normed inputs, by prompt."""
        norm = self._vector(f"model.layers.{layer}.post_attention_layernorm.weight")
        return streams, {name: self._normed(x_TD, norm) for name, x_TD in streams.items()}

    def _passed_on(self, layer: int, prompt: str, y_TD: np.ndarray) -> np.ndarray:
        """What the residual stream receives when the MoE block of `layer` computed `y_TD`."""
        return y_TD

    def _logits(self, streams: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        norm = self._vector("model.norm.weight")
        tied = self._config.tied_embeddings
        head = self._matrix("model.embed_tokens.weight" if tied else "lm_head.weight")
        return {name: head.by_rows(self._normed(x_TD, norm)).numpy() for name, x_TD in streams.items()}

    def moe(self, layer: int) -> MoeReference:
        """The block of the `layer`-th MoE layer with its weights loaded."""
        return MoeReference(self, self._names[layer])

    def _normed(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x_TD, (x_TD.shape[-1],), weight, self._config.norm_eps)

    def _checked(self, ids: Sequence[int]) -> Tensor:
        tokens = torch.tensor(list(ids), dtype=torch.int64)
        if len(tokens) == 0 or len(tokens) > self._config.context:
            raise RunError(f"{len(tokens)} tokens, the context holds 1 to {self._config.context}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._config.vocab_size:
            raise RunError(f"token ids must be in [0, {self._config.vocab_size})")
        return tokens


class AttentionReference:
    """Norm, attention from position 0 and output projection of one layer."""

    def __init__(self, reference: Reference, layer: int) -> None:
        self._reference, self._config = reference, reference._config
        prefix = f"model.layers.{layer}"
        self._window = self._config.window(layer)
        self._norm = reference._vector(f"{prefix}.input_layernorm.weight")
        self._q, self._k, self._v, self._o = (
            reference._matrix(f"{prefix}.self_attn.{part}_proj.weight") for part in "qkvo"
        )

    def __call__(self, x_TD: Tensor) -> Tensor:
        config, reference = self._config, self._reference
        tokens = x_TD.shape[0]
        x_TD = reference._normed(x_TD, self._norm)
        q_THd = self._rotated(self._q(x_TD).unflatten(-1, (config.heads, config.head_dim)))
        k_TGd = self._rotated(self._k(x_TD).unflatten(-1, (config.kv_heads, config.head_dim)))
        v_TGd = self._v(x_TD).unflatten(-1, (config.kv_heads, config.head_dim))
        positions_T = torch.arange(tokens)
        if reference._int8_cache and reference._integer_attention:
            keys, values = _cache_of(k_TGd), _cache_of(v_TGd)
            y_1TD = attend_codes(q_THd[None], (keys,), values, positions_T, config.head_dim**-0.5, self._window)
            return self._o(y_1TD[0])
        if reference._int8_cache:
            k_TGd, v_TGd = fake_quantize_rows(k_TGd), fake_quantize_rows(v_TGd)
        mask_TT = positions_T <= positions_T.unsqueeze(1)
        if self._window:
            mask_TT &= positions_T > positions_T.unsqueeze(1) - self._window
        q_HTd, k_GTd, v_GTd = (t.transpose(0, 1).unsqueeze(0) for t in (q_THd, k_TGd, v_TGd))
        y_HTd = F.scaled_dot_product_attention(
            q_HTd, k_GTd, v_GTd, attn_mask=mask_TT, scale=config.head_dim**-0.5, enable_gqa=True
        )
        return self._o(y_HTd[0].transpose(0, 1).flatten(1))

    def _rotated(self, x_THd: Tensor) -> Tensor:
        config, reference = self._config, self._reference
        cos_TP, sin_TP = (table[: x_THd.shape[0]] for table in (reference._cos_SP, reference._sin_SP))
        x_THd = apply_rope(x_THd, cos_TP, sin_TP, interleaved=config.rope.interleaved)
        return F.rms_norm(x_THd, (config.head_dim,), eps=config.norm_eps) if config.qk_norm else x_THd


def _cache_of(rows_TGd: Tensor) -> tuple[Tensor, Tensor]:
    """A cache of these rows: codes int8 [1, T, G, d] and scales [1, T, G]."""
    codes, scale = quantize_rows(rows_TGd[None])
    return codes.to(torch.int8), scale.squeeze(-1)


class GatedReference:
    """down(silu(gate(x)) * up(x)): a dense feed-forward block, or a shared expert."""

    def __init__(self, reference: Reference, prefix: str) -> None:
        self._gate, self._up, self._down = (
            reference._matrix(f"{prefix}.{part}_proj.weight") for part in ("gate", "up", "down")
        )

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._down(F.silu(self._gate(x_TD)) * self._up(x_TD))


class MoeReference:
    """One MoE layer. Inputs are what the artifact's experts see: the normed stream, float32 [T, D]."""

    def __init__(self, reference: Reference, prefix: str) -> None:
        assert reference._config.moe is not None
        self._moe = reference._config.moe
        self._router_ED = reference._vector(f"{prefix}.router.weight")
        self._bias_E = reference._vector(f"{prefix}.expert_bias") if self._moe.selection_bias else None
        self._up = reference._matrix(f"{prefix}.experts.gate_up_proj")
        self._down = reference._matrix(f"{prefix}.experts.down_proj")
        self._shared = GatedReference(reference, f"{prefix}.shared_expert") if self._moe.shared_width else None

    @torch.no_grad()
    def route(self, x_TD: Tensor | np.ndarray, forced_TK: np.ndarray | None = None) -> Routed:
        """Select freely; the combine weights are those of `forced_TK` if it is given."""
        scores_TE = F.linear(_tensor(x_TD), self._router_ED).sigmoid()
        choice_TE = scores_TE if self._bias_E is None else scores_TE + self._bias_E
        indices_TK = choice_TE.topk(self._moe.top_k, dim=-1).indices
        weights_TK = self._combine(
            scores_TE, indices_TK if forced_TK is None else _indices(forced_TK, self._moe.experts)
        )
        return Routed(choice_TE.numpy(), indices_TK.numpy(), weights_TK.numpy())

    def _combine(self, scores_TE: Tensor, indices_TK: Tensor) -> Tensor:
        weights_TK = scores_TE.gather(-1, indices_TK)
        if self._moe.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK * self._moe.scale

    @torch.no_grad()
    def output(self, x_TD: Tensor | np.ndarray, indices_TK: np.ndarray) -> np.ndarray:
        """The block's output, float32 [T, D], with the experts of `indices_TK`, weighted by their own scores."""
        x_TD = _tensor(x_TD)
        chosen_TK = _indices(indices_TK, self._moe.experts)
        weights_TK = self._combine(F.linear(x_TD, self._router_ED).sigmoid(), chosen_TK)
        y_TKD = x_TD.new_empty((*chosen_TK.shape, x_TD.shape[-1]))
        for expert in chosen_TK.unique().tolist():
            rows, slots = (chosen_TK == expert).nonzero(as_tuple=True)
            gate, up = self._up(x_TD[rows], expert).chunk(2, dim=-1)
            y_TKD[rows, slots] = self._down(F.silu(gate) * up, expert)
        y_TD = (y_TKD * weights_TK.unsqueeze(-1)).sum(1)
        if self._shared is not None:
            y_TD = y_TD + self._shared(x_TD)
        return y_TD.numpy()


def _tensor(x: Tensor | np.ndarray) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def _indices(indices: np.ndarray, experts: int) -> Tensor:
    """Forced indices come from an artifact's trace: an index that is no expert is refused."""
    chosen = torch.from_numpy(np.array(indices, dtype=np.int64))
    if chosen.numel() and not (int(chosen.min()) >= 0 and int(chosen.max()) < experts):
        raise RunError(f"a routing to expert {int(chosen.max())} of {experts}")
    return chosen


def _bfloat16_scales(weight: QuantizedTensor) -> QuantizedTensor:
    return replace(weight, scales=weight.scales.to(torch.bfloat16).to(torch.float32))
