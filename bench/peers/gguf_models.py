"""Random models for llama.cpp, written tensor by tensor: ours by their spec, those of transformers by their config.

Matrices are Q4_0, llama.cpp's own default of 4 bits (embedding and head included), the experts of gpt-oss MXFP4, as it
is released; norms, routers, biases and convolutions float32. Speed does not depend on the values, but routing does:
router and activations are scaled so that tokens spread over the experts. Names, shapes and metadata are those that
llama.cpp's `src/models/*.cpp` reads.

A MobileMoE is written as `glm4moe` (the same layer structure: sigmoid router with selection bias, normalised top-k with
a scale, one shared expert, pre-norm attention), a dense one as `llama`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import MissingExtra, UserError
from moec.sources.decoder.config import DecoderConfig

FILE = "llama-2.gguf"  # the number changes with the weights that are drawn: older files are not used
Q4_0, MXFP4 = "Q4_0", "MXFP4"
_BLOCK = 32
_BYTES = {Q4_0: 18, MXFP4: 17}  # of a block: a float16 scale, or the byte of a power of two, and 32 nibbles
_MXFP4_SCALE = 120  # 2^(120 - 127): codes drawn uniformly stand for numbers of standard deviation 0.023


@dataclass
class Model:
    """metadata: methods of the writer, without `add_`, and what they are given. plain: float32. Shapes as numpy's."""

    arch: str
    metadata: list[tuple[str, Any]]
    coded: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)
    plain: list[tuple[str, np.ndarray]] = field(default_factory=list)

    def matrix(self, name: str, *shape: int, kind: str = Q4_0) -> None:
        self.coded.append((f"{name}.weight", shape, kind))

    def ones(self, name: str, size: int) -> None:
        self.plain.append((f"{name}.weight", np.ones(size, np.float32)))

    def zeros(self, name: str, *shape: int) -> None:
        self.plain.append((f"{name}.bias", np.zeros(shape, np.float32)))

    def value(self, name: str, value: np.ndarray) -> None:
        self.plain.append((name, value.astype(np.float32)))


def write_gguf(config: Any, path: Path, *, seed: int = 0) -> None:
    """Random weights of a `DecoderConfig` or of a transformers config, streamed; UserError for one without a peer."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra(
            "writing a model for llama.cpp needs the package gguf", remedy="pip install 'moec[bench]'"
        ) from None

    rng = np.random.default_rng(seed)
    model = of_decoder(config, rng) if isinstance(config, DecoderConfig) else of_transformers(config, rng)
    writer = gguf.GGUFWriter(path, model.arch, use_temp_file=False)
    for name, value in model.metadata:
        getattr(writer, f"add_{name}")(value)
    for name, shape, kind in model.coded:
        stored = (*shape[:-1], shape[-1] // _BLOCK * _BYTES[kind])
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=raw)
    for name, value in model.plain:
        writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind in model.coded:
        writer.write_tensor_data(_random_q4_0(rng, shape) if kind == Q4_0 else _random_mxfp4(rng, shape))
    for _, value in model.plain:
        writer.write_tensor_data(value)
    writer.close()


def of_decoder(config: DecoderConfig, rng: np.random.Generator) -> Model:
    """One of our specs."""
    moe, d, heads, kv, hd = config.moe, config.d_model, config.heads, config.kv_heads, config.head_dim
    common = _common(config.context, d, config.layers, config.vocab_size, config.norm_eps, config.rope.theta)
    attention = [("head_count", heads), ("head_count_kv", kv), ("key_length", hd), ("value_length", hd)]
    model = Model("glm4moe" if moe else "llama", [*common, *attention, ("rope_dimension_count", hd)])
    if moe:
        model.metadata += [
            ("feed_forward_length", moe.expert_width * moe.top_k),
            *_experts(moe.experts, moe.top_k, moe.expert_width),
            ("expert_shared_count", moe.shared_width // moe.expert_width),
            ("expert_weights_scale", float(moe.scale)),
            ("expert_weights_norm", True),
            ("leading_dense_block_count", 0),
        ]
    else:
        model.metadata += [("feed_forward_length", config.ffn_width)]
    model.matrix("token_embd", config.vocab_size, d)
    model.ones("output_norm", d)
    for i in range(config.layers):
        b = f"blk.{i}"
        model.ones(f"{b}.attn_norm", d)
        _attention(model, b, d, heads * hd, kv * hd)
        if not moe:
            model.ones(f"{b}.ffn_norm", d)
            _ffn(model, b, "", d, config.ffn_width)
            continue
        model.ones(f"{b}.post_attention_norm", d)
        _routed(model, b, rng, d, moe.experts, moe.expert_width)
        model.value(f"{b}.exp_probs_b.bias", 0.01 * rng.standard_normal(moe.experts))
        _ffn(model, b, "_shexp", d, moe.shared_width)
    return model


def of_transformers(config: Any, rng: np.random.Generator) -> Model:
    """A model of transformers by its `model_type`."""
    make = _FAMILIES.get(config.model_type)
    if make is None:
        raise UserError(f"no peer is written for {config.model_type}", remedy="take one of " + ", ".join(_FAMILIES))
    return make(config, rng)


def _lfm2_moe(c: Any, rng: np.random.Generator) -> Model:
    d, hd = c.hidden_size, c.hidden_size // c.num_attention_heads
    attends = [kind == "full_attention" for kind in c.layer_types]
    model = Model(
        "lfm2moe",
        [
            *_of_config(c, c.norm_eps),
            ("head_count", c.num_attention_heads),
            ("head_count_kv", [c.num_key_value_heads if full else 0 for full in attends]),
            ("feed_forward_length", c.intermediate_size),
            *_experts(c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size),
            ("leading_dense_block_count", c.num_dense_layers),
            ("expert_gating_func", _gating("SIGMOID")),
            ("shortconv_l_cache", c.conv_L_cache),
        ],
    )
    model.matrix("token_embd", c.vocab_size, d)
    model.ones("token_embd_norm", d)
    for i, full in enumerate(attends):
        b = f"blk.{i}"
        model.ones(f"{b}.attn_norm", d)
        model.ones(f"{b}.ffn_norm", d)
        if full:
            _attention(model, b, d, d, c.num_key_value_heads * hd)
            _head_norms(model, b, hd)
        else:
            model.matrix(f"{b}.shortconv.in_proj", 3 * d, d)
            model.matrix(f"{b}.shortconv.out_proj", d, d)
            model.value(f"{b}.shortconv.conv.weight", 0.02 * rng.standard_normal((d, c.conv_L_cache)))
        if i < c.num_dense_layers:
            _ffn(model, b, "", d, c.intermediate_size)
        else:
            _routed(model, b, rng, d, c.num_experts, c.moe_intermediate_size)
            model.zeros(f"{b}.exp_probs_b", c.num_experts)
    return model


def _gpt_oss(c: Any, rng: np.random.Generator) -> Model:
    d, f, e = c.hidden_size, c.intermediate_size, c.num_local_experts
    heads, kv, hd = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    rope = c.rope_parameters
    model = Model(
        "gpt-oss",
        [
            *_of_config(c, c.rms_norm_eps),
            *[("head_count", heads), ("head_count_kv", kv), ("key_length", hd), ("value_length", hd)],
            ("feed_forward_length", f),
            *_experts(e, c.num_experts_per_tok, f),
            ("sliding_window", c.sliding_window),
            ("rope_scaling_type", _scaling("YARN")),
            ("rope_scaling_factor", float(rope["factor"])),
            ("rope_scaling_orig_ctx_len", int(rope["original_max_position_embeddings"])),
            ("rope_scaling_yarn_beta_fast", float(rope["beta_fast"])),
            ("rope_scaling_yarn_beta_slow", float(rope["beta_slow"])),
        ],
    )
    model.matrix("token_embd", c.vocab_size, d)
    model.matrix("output", c.vocab_size, d)
    model.ones("output_norm", d)
    for i in range(c.num_hidden_layers):
        b = f"blk.{i}"
        model.ones(f"{b}.attn_norm", d)
        model.ones(f"{b}.post_attention_norm", d)
        _attention(model, b, d, heads * hd, kv * hd)
        for name, size in (("q", heads * hd), ("k", kv * hd), ("v", kv * hd), ("output", d)):
            model.zeros(f"{b}.attn_{name}", size)
        model.value(f"{b}.attn_sinks.weight", 0.02 * rng.standard_normal(heads))
        _routed(model, b, rng, d, e, f, kind=MXFP4)
        for name, shape in (("inp", (e,)), ("exps", (e, f))):
            model.zeros(f"{b}.ffn_gate_{name}", *shape)
        model.zeros(f"{b}.ffn_up_exps", e, f)
        model.zeros(f"{b}.ffn_down_exps", e, d)
    return model


def _qwen3_5_moe(c: Any, rng: np.random.Generator) -> Model:
    d, hd, kv = c.hidden_size, c.head_dim, c.num_key_value_heads
    keys = c.linear_num_key_heads * c.linear_key_head_dim
    steps, values = c.linear_num_value_heads, c.linear_num_value_heads * c.linear_value_head_dim
    rope = c.rope_parameters
    model = Model(
        "qwen35moe",
        [
            *_of_config(c, c.rms_norm_eps),
            *[("head_count", c.num_attention_heads), ("head_count_kv", kv), ("key_length", hd), ("value_length", hd)],
            ("rope_dimension_count", int(hd * rope["partial_rotary_factor"])),
            ("rope_dimension_sections", [*rope["mrope_section"], 0]),
            ("feed_forward_length", c.moe_intermediate_size),
            *_experts(c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size),
            ("expert_shared_feed_forward_length", c.shared_expert_intermediate_size),
            ("ssm_conv_kernel", c.linear_conv_kernel_dim),
            ("ssm_state_size", c.linear_key_head_dim),
            ("ssm_group_count", c.linear_num_key_heads),
            ("ssm_time_step_rank", steps),
            ("ssm_inner_size", values),
            ("full_attention_interval", c.layer_types.index("full_attention") + 1),
        ],
    )
    model.matrix("token_embd", c.vocab_size, d)
    model.matrix("output", c.vocab_size, d)
    model.ones("output_norm", d)
    for i, kind in enumerate(c.layer_types):
        b = f"blk.{i}"
        model.ones(f"{b}.attn_norm", d)
        model.ones(f"{b}.post_attention_norm", d)
        if kind == "full_attention":
            wide = c.num_attention_heads * hd
            _attention(model, b, d, wide, kv * hd, gate=True)
            _head_norms(model, b, hd)
        else:
            model.matrix(f"{b}.attn_qkv", 2 * keys + values, d)
            model.matrix(f"{b}.attn_gate", values, d)
            model.matrix(f"{b}.ssm_beta", steps, d)
            model.matrix(f"{b}.ssm_alpha", steps, d)
            model.matrix(f"{b}.ssm_out", d, values)
            model.ones(f"{b}.ssm_norm", c.linear_value_head_dim)
            filters = rng.standard_normal((2 * keys + values, c.linear_conv_kernel_dim))
            model.value(f"{b}.ssm_conv1d.weight", 0.02 * filters)
            model.value(f"{b}.ssm_dt.bias", np.ones(steps))
            model.value(f"{b}.ssm_a", -rng.uniform(0.01, 16, steps))
        _routed(model, b, rng, d, c.num_experts, c.moe_intermediate_size)
        model.value(f"{b}.ffn_gate_inp_shexp.weight", rng.standard_normal(d) / np.sqrt(d))
        _ffn(model, b, "_shexp", d, c.shared_expert_intermediate_size)
    return model


_FAMILIES: dict[str, Callable[[Any, np.random.Generator], Model]] = {
    "lfm2_moe": _lfm2_moe,
    "gpt_oss": _gpt_oss,
    "qwen3_5_moe_text": _qwen3_5_moe,
}


def _common(context: int, d: int, layers: int, vocab: int, eps: float, theta: float) -> list[tuple[str, Any]]:
    return [
        ("context_length", context),
        ("embedding_length", d),
        ("block_count", layers),
        ("vocab_size", vocab),
        ("layer_norm_rms_eps", float(eps)),
        ("rope_freq_base", float(theta)),
        ("tokenizer_model", "no_vocab"),
    ]


def _of_config(c: Any, eps: float) -> list[tuple[str, Any]]:
    theta = c.rope_parameters["rope_theta"]
    return _common(c.max_position_embeddings, c.hidden_size, c.num_hidden_layers, c.vocab_size, eps, theta)


def _experts(count: int, top_k: int, width: int) -> list[tuple[str, Any]]:
    return [("expert_count", count), ("expert_used_count", top_k), ("expert_feed_forward_length", width)]


def _gating(name: str) -> Any:
    import gguf

    return gguf.ExpertGatingFuncType[name]


def _scaling(name: str) -> Any:
    import gguf

    return gguf.RopeScalingType[name]


def _attention(model: Model, b: str, d: int, wide: int, kv: int, *, gate: bool = False) -> None:
    """Queries of `wide` numbers, with as many of a gate beside them, keys and values of `kv`."""
    model.matrix(f"{b}.attn_q", (2 if gate else 1) * wide, d)
    model.matrix(f"{b}.attn_k", kv, d)
    model.matrix(f"{b}.attn_v", kv, d)
    model.matrix(f"{b}.attn_output", d, wide)


def _head_norms(model: Model, b: str, size: int) -> None:
    model.ones(f"{b}.attn_q_norm", size)
    model.ones(f"{b}.attn_k_norm", size)


def _ffn(model: Model, b: str, suffix: str, d: int, width: int) -> None:
    model.matrix(f"{b}.ffn_gate{suffix}", width, d)
    model.matrix(f"{b}.ffn_up{suffix}", width, d)
    model.matrix(f"{b}.ffn_down{suffix}", d, width)


def _routed(
    model: Model, b: str, rng: np.random.Generator, d: int, experts: int, width: int, *, kind: str = Q4_0
) -> None:
    """A router whose logits have variance one, and its experts."""
    model.value(f"{b}.ffn_gate_inp.weight", rng.standard_normal((experts, d)) / np.sqrt(d))
    model.matrix(f"{b}.ffn_gate_exps", experts, width, d, kind=kind)
    model.matrix(f"{b}.ffn_up_exps", experts, width, d, kind=kind)
    model.matrix(f"{b}.ffn_down_exps", experts, d, width, kind=kind)


def _random_q4_0(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [..., 18 * K / 32]: nibbles uniform in [-7, 7], scales such that a row has variance 1 / K.

    With -8 among them their mean would not be 0: each product would stretch the direction of equal numbers by a
    multiple, all tokens would soon be that direction, and select the same few experts.
    """
    blocks = math.prod(shape) // _BLOCK
    nibbles = rng.integers(1, 16, size=(2, blocks, _BYTES[Q4_0]), dtype=np.uint8)  # stored with 8 added
    data = nibbles[0] | nibbles[1] << 4
    # a uniform number of -7, ..., 7 has standard deviation 4.32
    scale = np.float16(1.0 / (4.32 * np.sqrt(shape[-1])))
    data[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return data.reshape(*shape[:-1], -1)


def _random_mxfp4(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [..., 17 * K / 32]: codes of E2M1, whose signs are symmetric, so that their mean is 0."""
    data = rng.integers(0, 256, size=(math.prod(shape) // _BLOCK, _BYTES[MXFP4]), dtype=np.uint8)
    data[:, 0] = _MXFP4_SCALE
    return data.reshape(*shape[:-1], -1)
