"""A middle shape of each family of specs/families, for comparing a plan with what was measured.

The small configs of the families are too small for that: fixed costs of the runtime outweigh their weights. A middle
shape has the ratios of a released model: widths of heads and of states as released, the model's width, the experts'
width and the number of heads divided by about the same factor, fewer layers (every kind of them), and fewer experts
where a layer would be too large; 170 to 400 MB of INT4 weights, a context of 2048.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moec.compiler import build
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.targets import options_class
from moec.sources.transformers_source import TransformersModel

SPECS = Path(__file__).parent.parent / "specs" / "families"
CONTEXT, VOCABULARY = 2048, 16384

_HALF = {"hidden_size": 1024}
_GATED_DELTA = {
    **_HALF,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 128,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}

#: family -> (the release whose ratios it has, changes of the family's config)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": (
        "OLMoE-1B-7B, halved, 4 of 16 layers",
        {
            **_HALF,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "intermediate_size": 512,
        },
    ),
    "qwen2-moe": (
        "Qwen1.5-MoE-A2.7B, halved, 4 of 24 layers and a dense one",
        {
            **_HALF,
            "num_hidden_layers": 5,
            "layer_types": ["full_attention"] * 5,
            "mlp_only_layers": [2],
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "intermediate_size": 2816,
            "moe_intermediate_size": 704,
            "shared_expert_intermediate_size": 2816,
        },
    ),
    "qwen3-moe": (
        "Qwen3-30B-A3B, halved, 4 of 48 layers",
        {
            **_HALF,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 384,
        },
    ),
    "mixtral": (
        "Mixtral-8x7B, a quarter, 4 of 32 layers",
        {
            **_HALF,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 3584,
        },
    ),
    "deepseek-v3": (
        "DeepSeek-V3, a seventh, heads and latents as released, 128 of 256 experts, 5 of 61 layers",
        {
            **_HALF,
            "num_hidden_layers": 5,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": 256,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "qk_head_dim": 192,
            "head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 128,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "intermediate_size": 2624,
            "moe_intermediate_size": 288,
        },
    ),
    "gpt-oss": (
        "gpt-oss-20b, a third, 4 of 24 layers",
        {
            "hidden_size": 960,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 128,
            "num_attention_heads": 24,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "intermediate_size": 960,
        },
    ),
    "granitemoe": (
        "granite-3.1-3b-a800m, 6 of 32 layers",
        {
            "hidden_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 40,
            "num_experts_per_tok": 8,
            "intermediate_size": 512,
            "tie_word_embeddings": True,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
        },
    ),
    "lfm2-moe": (
        "LFM2-8B-A1B, halved, 6 of 24 layers",
        {
            **_HALF,
            "num_hidden_layers": 6,
            "layer_types": ["conv", "conv", "full_attention", "conv", "conv", "full_attention"],
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "intermediate_size": 3584,
            "moe_intermediate_size": 896,
        },
    ),
    "phi-moe": (
        "Phi-3.5-MoE, a quarter, 4 of 32 layers",
        {
            **_HALF,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "intermediate_size": 1600,
            "sliding_window": 131072,
        },
    ),
    "qwen3-next": (
        "Qwen3-Next-80B-A3B, halved, 128 of 512 experts, 4 of 48 layers",
        {**_GATED_DELTA, "num_experts_per_tok": 10},
    ),
    "qwen3-5-moe": (
        "Qwen3.5-35B-A3B, halved, 128 of 256 experts, 4 of 40 layers",
        {**_GATED_DELTA, "num_experts_per_tok": 8},
    ),
    "granite-4-h": (
        "Granite-4.0-H-Tiny, 4 of 40 layers",
        {
            "hidden_size": 1536,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "intermediate_size": 512,
            "shared_intermediate_size": 1024,
            "mamba_n_heads": 48,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
        },
    ),
    "nemotron-h": (
        "Nemotron-3-Nano-30B-A3B, three eighths, 7 of 52 layers",
        {
            **_HALF,
            "num_hidden_layers": 7,
            "layer_types": [
                "linear_attention",
                "moe",
                "linear_attention",
                "full_attention",
                "moe",
                "linear_attention",
                "moe",
            ],
            "num_attention_heads": 12,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "mamba_num_heads": 24,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 3,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "intermediate_size": 704,
            "moe_intermediate_size": 704,
            "moe_shared_expert_intermediate_size": 1408,
        },
    ),
}


def changes(family: str) -> dict[str, Any]:
    """Keys of the family's config that make its middle shape."""
    return {"max_position_embeddings": CONTEXT, "vocab_size": VOCABULARY, **SHAPES[family][1]}


def spec_of(family: str, folder: Path) -> Spec:
    """The family's spec for the config in `folder`, with the target's own options."""
    spec = load_spec(SPECS / f"{family}.yaml")
    named = {"name": family, "model": TransformersModel(transformers=folder)}
    return spec.model_copy(update={**named, "targets": {"xnnpack": options_class("xnnpack")()}})


def artifact_of(family: str, folder: Path, progress: Progress) -> tuple[Spec, Path]:
    """The middle shape of `family` with random weights, compiled into `folder`; its spec, for the config kept there."""
    from moec.sources.random_checkpoint import save_random

    released = load_spec(SPECS / f"{family}.yaml").model
    assert isinstance(released, TransformersModel)
    checkpoint, out = folder / f"{family}-checkpoint", folder / family
    spec = spec_of(family, checkpoint)
    if (out / "manifest.json").exists():
        return spec, out
    # one over the root of a layer's inputs: it amplifies neither its input nor its rounding
    spread = SHAPES[family][1]["hidden_size"] ** -0.5
    balanced = {"table_spread": 1.0, "selection_spread": 0.01}  # so that all experts are reached, as the plan has it
    save_random(released.transformers, checkpoint, seed=1, changes=changes(family), spread=spread, **balanced)
    build.compile(spec, "xnnpack", None, out, progress)
    for file in checkpoint.glob("*.safetensors*"):
        file.unlink()
    return spec, out
