"""GGUF files of small random models, written as llama.cpp's converter writes them, with the format's own library.

The library names the tensors, quantizes and dequantizes; nothing of moec is used. Rows of queries and keys are put in
the order of interleaved rotation for the architectures whose graph in llama.cpp rotates so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY, WIDTH, HEADS, KV_HEADS, CONTEXT = 96, 64, 4, 2, 48
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
MIXTURE: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL: Mapping[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """architecture: GGUF's name; config: of transformers beside COMMON; keys: metadata below the architecture."""

    architecture: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False

    def small(self) -> Any:
        """The config of transformers."""
        import transformers

        return transformers.AutoConfig.for_model(self.model_type, **{**COMMON, **self.config})


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "llama", {"num_hidden_layers": 2}, permuted=True),
    "llama-tied": Family("llama", "llama", {"tie_word_embeddings": True, "attention_bias": True}, permuted=True),
    "qwen2": Family("qwen2", "qwen2"),
    "qwen3": Family("qwen3", "qwen3", {"head_dim": 32}),
    "granite": Family(
        "granite", "granite",
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        {"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0},
        permuted=True,
    ),
    "granite-unscaled": Family("granite", "granite", {"attention_multiplier": 0.25}, permuted=True),  # 1 / sqrt(16)
    "smollm3": Family("smollm3", "smollm3", {"num_hidden_layers": 4, "use_sliding_window": False}, permuted=True),
    "mixtral": Family("llama", "mixtral", LOCAL, permuted=True),
    "qwen2moe": Family("qwen2moe", "qwen2_moe", {**MIXTURE, "shared_expert_intermediate_size": 64}),
    "qwen3moe": Family(
        "qwen3moe", "qwen3_moe", {**MIXTURE, "head_dim": 16, "norm_topk_prob": True, "num_hidden_layers": 2}
    ),
    "olmoe": Family("olmoe", "olmoe", {**MIXTURE, "intermediate_size": 32}),
    "gpt-oss": Family(
        "gpt-oss", "gpt_oss",
        {
            **LOCAL, "head_dim": 16, "num_hidden_layers": 2, "sliding_window": 8, "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 16,
                "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            },
        },
    ),
    "granitemoe": Family(
        "granitemoe", "granitemoe",
        {**LOCAL, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
        {"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 1.0, "logit_scale": 2.0},
        permuted=True,
    ),
    "granitemoeshared": Family(
        "granitemoe", "granitemoeshared", {**LOCAL, "shared_intermediate_size": 64},
        {"attention.scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0},
        permuted=True,
    ),
}  # fmt: skip


@dataclass
class Written:
    """A file, and the model of transformers with exactly the values of the file's tensors.

    stored: name in the file -> (type, what was written: blocks of bytes or floats, in the file's order).
    """

    file: Path
    model: torch.nn.Module
    stored: dict[str, tuple[str, np.ndarray]]


def with_experts(family: Family, count: int, chosen: int) -> Family:
    """The same with another number of experts."""
    key = "num_local_experts" if "num_local_experts" in family.config else "num_experts"
    return dataclasses.replace(family, config={**family.config, key: count, "num_experts_per_tok": chosen})


def write(
    file: Path, family: Family, kinds: Mapping[str, str] | str = "Q8_0", *, experts_apart: bool = False
) -> Written:
    """Write a random model. `kinds`: the type of every matrix, or types by a part of the file's tensor names.

    experts_apart: a tensor for each expert, as files of early 2024 have.
    """
    import gguf
    import transformers

    torch.manual_seed(0)
    config = family.small()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    names = gguf.get_tensor_name_map(_architecture(family.architecture), config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, family.architecture)
    _metadata(writer, config, family)
    _tokenizer(writer)
    stored: dict[str, tuple[str, np.ndarray]] = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        columns = config.model_type == "gpt_oss" and parameter.dim() == 3  # its experts are [E, K, N]
        parts = _split(name, torch.randn_like(parameter) / parameter.shape[-1] ** 0.5, columns)
        if parameter.dim() == 1:
            parts = {key: 1 + 0.2 * torch.randn_like(parameter) for key in parts}
        if name.endswith((".gate.weight", "router.weight")):
            parts = {key: 3 * value for key, value in parts.items()}  # experts are told apart
        kept = []
        for part, value in parts.items():
            own = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert own is not None, part
            kind = _kind(own, value, kinds)
            rows = _interleaved(part, value, config, family)
            blocks, back = _stored(rows.detach().numpy(), kind)
            named = {own: blocks}
            if experts_apart and "_exps" in own:
                named = {own.replace("_exps", f".{number}"): block for number, block in enumerate(blocks)}
            for key, raw in named.items():
                writer.add_tensor(key, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
                stored[key] = (kind, raw)
            kept.append(_halves(part, torch.from_numpy(back), config, family))
        with torch.no_grad():
            parameter.copy_(_whole(name, kept, columns))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(file, model, stored)


def _architecture(name: str) -> Any:
    import gguf

    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _kind(name: str, value: torch.Tensor, kinds: Mapping[str, str] | str) -> str:
    if value.dim() == 1 or "ffn_gate_inp" in name or name.endswith(".bias"):
        return "F32"
    if isinstance(kinds, str):
        return kinds
    return next((kind for part, kind in kinds.items() if part in name), "Q8_0")


def _stored(rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What is written, and the values that it stands for."""
    import gguf

    if kind == "F32":
        return rows, rows
    number = gguf.GGMLQuantizationType[kind]
    blocks = _random_k_quants(rows, number) if kind in ("Q6_K", "Q4_K", "IQ4_NL") else gguf.quantize(rows, number)
    return blocks, np.array(gguf.dequantize(blocks, number), np.float32).reshape(rows.shape)


def _random_k_quants(rows: np.ndarray, number: Any) -> np.ndarray:
    """Random blocks of a type that the library reads and does not write; scales of about the size of `rows`."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[number]
    generator = np.random.default_rng(rows.size)
    raw = generator.integers(0, 256, (*rows.shape[:-1], rows.shape[-1] // block, size), np.uint8)
    place, scale = {"Q6_K": ((208, 210), 1 / 4000), "Q4_K": ((0, 4), 1 / 600), "IQ4_NL": ((0, 2), 1 / 80)}[number.name]
    width = (place[1] - place[0]) // 2
    scales = (scale * rows.std() * generator.normal(size=(*raw.shape[:-1], width))).astype(np.float16)
    raw[..., slice(*place)] = scales.view(np.uint8)
    return raw.reshape(*rows.shape[:-1], -1)


def _split(name: str, value: torch.Tensor, columns: bool) -> dict[str, torch.Tensor]:
    """A parameter as the converter's tensors, under names that the library knows."""
    if name.endswith("self_attn.sinks"):
        return {f"{name}.weight": value}
    if name.endswith("_proj_bias"):  # of gpt-oss's experts
        stem = name.removesuffix("_bias")
        if not stem.endswith("gate_up_proj"):
            return {f"{stem}.bias": value}
        stem = stem.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj.bias": value[..., ::2], f"{stem}up_proj.bias": value[..., 1::2]}
    if columns:
        rows = value.transpose(-1, -2)
        if name.endswith("down_proj"):
            return {f"{name}.weight": rows}
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj.weight": rows[:, ::2], f"{stem}up_proj.weight": rows[:, 1::2]}
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj").replace("block_sparse_moe", "mlp")
        gate, up = value.chunk(2, -2)
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("shared_mlp.input_linear.weight"):
        stem = name.replace("shared_mlp.input_linear.weight", "mlp.shared_expert.")
        gate, up = value.chunk(2, -2)
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("router.weight"):
        return {name.replace("block_sparse_moe.router", "mlp.gate"): value}
    if name.endswith("shared_expert_gate.weight"):
        return {name: value[0]}  # a single row is stored as a vector
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight".replace("block_sparse_moe", "mlp"): value}
    return {name: value}


def _whole(name: str, parts: list[torch.Tensor], columns: bool) -> torch.Tensor:
    """The inverse of `_split`."""
    if name.endswith("gate_up_proj_bias"):
        return torch.stack(parts, -1).flatten(-2)
    if columns:
        return torch.stack(parts, -2).flatten(-3, -2).transpose(-1, -2)
    return torch.cat(parts, -2) if len(parts) > 1 else parts[0]


def _heads(name: str, config: Any, family: Family) -> int:
    if not family.permuted or not any(part in name for part in ("q_proj.", "k_proj.")):
        return 0
    return int(config.num_attention_heads if "q_proj." in name else config.num_key_value_heads)


def _interleaved(name: str, value: torch.Tensor, config: Any, family: Family) -> torch.Tensor:
    """Rows in the order of interleaved rotation, as llama.cpp's converter permutes them."""
    heads = _heads(name, config, family)
    if not heads:
        return value.contiguous()
    shape = (heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return value.reshape(shape).swapaxes(1, 2).reshape(value.shape)


def _halves(name: str, value: torch.Tensor, config: Any, family: Family) -> torch.Tensor:
    """The inverse of `_interleaved`."""
    heads = _heads(name, config, family)
    if not heads:
        return value.reshape(1, -1) if name.endswith("shared_expert_gate.weight") else value
    shape = (heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return value.reshape(shape).swapaxes(1, 2).reshape(value.shape)


def _metadata(writer: Any, config: Any, family: Family) -> None:
    from gguf import RopeScalingType

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    if family.architecture == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if family.architecture.startswith("qwen"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in family.keys.items():
        writer.add_float32(f"{family.architecture}.{key}", value)


def _tokenizer(writer: Any) -> None:
    """Letters of ASCII: those of all bytes would be 256, more than the model has."""
    specials = ["<unk>", "<s>", "</s>"]
    letters = [chr(code) for code in range(33, 33 + VOCABULARY - len(specials) - 3)]
    tokens = [*specials, *letters, "\u0120", "ab", "\u0120ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in specials else 1 for token in tokens])
    writer.add_token_merges(["a b", "\u0120 ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
