"""Checkpoints as they lie on disks: a tiny healthy model, and the folders that tools and accidents make of it.

Each maker takes (tensors of the healthy model, folder with its config.json) and writes what people have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
DENSE: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 160,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: Mapping[str, Any] = {
    **DENSE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 64,
    "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "num_hidden_layers": 1,
}  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def healthy(folder: Path, config: Mapping[str, Any]) -> Tensors:
    """Write the model of `config` to `folder` as transformers saves it; its tensors as stored."""
    import transformers
    from safetensors.torch import load_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def save(folder: Path, tensors: Mapping[str, Tensor], name: str = WEIGHTS) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata={"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def is_linear(name: str, tensor: Tensor) -> bool:
    others = ("embed", "lm_head", "norm", ".gate.weight")
    return tensor.dim() == 2 and name.endswith(".weight") and not any(o in name for o in others)


def each_linear(change: Callable[[str, Tensor], Tensors], **config: Any) -> Callable[[Tensors, Path], None]:
    """A maker: every linear as `change(name without .weight, tensor)` says, the rest in float16."""

    def make(tensors: Tensors, folder: Path) -> None:
        out: Tensors = {}
        for name, tensor in tensors.items():
            out |= change(name.removesuffix(".weight"), tensor) if is_linear(name, tensor) else {name: tensor.half()}
        save(folder, out)
        set_config(folder, **config)

    return make


# --- codes under other people's names -------------------------------------------------------------------------------


def _bnb8(stem: str, w: Tensor) -> Tensors:
    top = w.abs().amax(1, keepdim=True)
    return {
        f"{stem}.weight": (w / top * 127).round().to(torch.int8),
        f"{stem}.SCB": top[:, 0],
        f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _w8a8(stem: str, w: Tensor) -> Tensors:
    scale = w.abs().amax(1, keepdim=True) / 127
    return {f"{stem}.weight": (w / scale).round().to(torch.int8), f"{stem}.weight_scale": scale.bfloat16()}


def _int8_as_half(stem: str, w: Tensor) -> Tensors:
    """Codes kept in a float type: only the scale beside them says what they are."""
    found = _w8a8(stem, w)
    return {**found, f"{stem}.weight": found[f"{stem}.weight"].half()}


def _fp8(stem: str, w: Tensor) -> Tensors:
    blocks = w.reshape(w.shape[0] // 32, 32, w.shape[1] // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(w.shape).to(torch.float8_e4m3fn)
    return {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scale}


def _mlx(stem: str, w: Tensor) -> Tensors:
    groups = torch.ones(w.shape[0], w.shape[1] // 32).bfloat16()
    codes = torch.zeros(w.shape[0], w.shape[1] // 8, dtype=torch.uint32)
    return {f"{stem}.weight": codes, f"{stem}.scales": groups, f"{stem}.biases": groups.clone()}


def _nvfp4(stem: str, w: Tensor) -> Tensors:
    return {
        f"{stem}.weight": torch.zeros(w.shape[0], w.shape[1] // 2, dtype=torch.uint8),
        f"{stem}.weight_scale": torch.ones(w.shape[0], w.shape[1] // 16).to(torch.float8_e4m3fn),
        f"{stem}.weight_scale_2": torch.ones(()),
    }


def _gptq(stem: str, w: Tensor) -> Tensors:
    rows, width = w.shape
    return {
        f"{stem}.qweight": torch.zeros(width // 8, rows, dtype=torch.int32),
        f"{stem}.qzeros": torch.zeros(width // 32, rows // 8, dtype=torch.int32),
        f"{stem}.scales": torch.ones(width // 32, rows).half(),
        f"{stem}.g_idx": torch.arange(width, dtype=torch.int32) // 32,
    }


def _awq(stem: str, w: Tensor) -> Tensors:
    rows, width = w.shape
    return {
        f"{stem}.qweight": torch.zeros(width, rows // 8, dtype=torch.int32),
        f"{stem}.qzeros": torch.zeros(width // 32, rows // 8, dtype=torch.int32),
        f"{stem}.scales": torch.ones(width // 32, rows).half(),
    }


def _w4a16(stem: str, w: Tensor) -> Tensors:
    rows, width = w.shape
    return {
        f"{stem}.weight_packed": torch.zeros(rows, width // 8, dtype=torch.int32),
        f"{stem}.weight_scale": torch.ones(rows, width // 32).bfloat16(),
        f"{stem}.weight_shape": torch.tensor([rows, width]),
    }


def _bnb4(stem: str, w: Tensor) -> Tensors:
    return {
        f"{stem}.weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8),
        f"{stem}.weight.absmax": torch.ones(w.numel() // 64),
        f"{stem}.weight.quant_map": torch.ones(16),
    }


def _mxfp4(tensors: Tensors, folder: Path) -> None:
    """Experts as gpt-oss stores them: blocks of 32 codes with a shared exponent."""
    save(folder, {k: v for k, v in tensors.items() if "experts" not in k} | {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(4, 128, 2, 16, dtype=torch.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_scales": torch.zeros(4, 128, 2, dtype=torch.uint8),
        "model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(4, 64, 2, 16, dtype=torch.uint8),
        "model.layers.0.mlp.experts.down_proj_scales": torch.zeros(4, 64, 2, dtype=torch.uint8),
    })  # fmt: skip
    set_config(folder, quantization_config={"quant_method": "mxfp4"})


GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq"}
# name -> (config of the model, maker, what a refusal must say)
CODES: dict[str, tuple[Mapping[str, Any], Callable[[Tensors, Path], None], str]] = {
    "bitsandbytes-8": (
        DENSE,
        each_linear(_bnb8, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "bitsandbytes",
    ),
    "bitsandbytes-8 without a word in the config": (DENSE, each_linear(_bnb8), "bitsandbytes"),
    "bitsandbytes-4 without a word": (DENSE, each_linear(_bnb4), "bitsandbytes"),
    "w8a8 without a word": (DENSE, each_linear(_w8a8), "weight_scale"),
    "codes in a float type": (DENSE, each_linear(_int8_as_half), "weight_scale"),
    "fp8 without a word": (MOE, each_linear(_fp8), "FP8"),
    "mlx": (DENSE, each_linear(_mlx, quantization={"group_size": 32, "bits": 4}), "MLX"),
    "mlx without a word": (DENSE, each_linear(_mlx), "MLX"),
    "nvfp4": (DENSE, each_linear(_nvfp4), "NVFP4"),
    "gptq without a word": (DENSE, each_linear(_gptq), "GPTQ"),
    "awq without a word": (DENSE, each_linear(_awq), "AWQ"),
    "w4a16 without a word": (DENSE, each_linear(_w4a16), "compressed-tensors"),
    "mxfp4": (MOE, _mxfp4, "MXFP4"),
    "a config that speaks of codes, weights in float": (
        DENSE,
        each_linear(lambda stem, w: {f"{stem}.weight": w}, quantization_config=GPTQ),
        "quantization_config",
    ),
    "an integer tensor and nothing else": (
        DENSE,
        each_linear(lambda stem, w: {f"{stem}.weight": (w * 100).to(torch.int16)}),
        "I16",
    ),
}


# --- tensors that are not there --------------------------------------------------------------------------------------

# name -> (what a name becomes, None: the tensor is left out; what a refusal must say)
Rename = Callable[[str], str | None]
MISSING: dict[str, tuple[Mapping[str, Any], Rename, tuple[str, ...]]] = {
    "no head": (DENSE, lambda n: None if n == "lm_head.weight" else n, ("lm_head.weight",)),
    "no embedding": (DENSE, lambda n: None if "embed_tokens" in n else n, ("model.embed_tokens.weight",)),
    "no last norm": (DENSE, lambda n: None if n == "model.norm.weight" else n, ("model.norm.weight",)),
    "no q_norm": (DENSE, lambda n: None if "q_norm" in n else n, ("q_norm.weight",)),
    "no last layer": (DENSE, lambda n: None if ".layers.1." in n else n, ("model.layers.1.", "11 tensors")),
    "no router": (MOE, lambda n: None if "mlp.gate.weight" in n else n, ("mlp.gate.weight",)),
    "no last expert": (MOE, lambda n: None if ".experts.3." in n else n, ("experts.3",)),
    "no expert between": (MOE, lambda n: None if ".experts.1." in n else n, ("experts.1",)),
    "one matrix of an expert": (MOE, lambda n: None if "experts.2.up_proj" in n else n, ("experts.2.up_proj",)),
    "torch.compile": (DENSE, lambda n: "_orig_mod." + n, ("_orig_mod.", "model.embed_tokens.weight")),
    "data parallel": (DENSE, lambda n: "module." + n, ("module.", "model.embed_tokens.weight")),
    "a part of a larger model": (DENSE, lambda n: "language_model." + n, ("language_model.",)),
    "PEFT": (DENSE, lambda n: "base_model.model." + n, ("merge_and_unload",)),
    "PEFT inside": (DENSE, lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"), ("merge_and_unload",)),
}
