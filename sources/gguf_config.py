"""The transformers config of a GGUF file, made from its metadata and the shapes of its tensors.

Widths come from the tensors, so that a config cannot ask for more than the file holds; metadata gives what shapes do
not tell (heads, rotary frequencies, experts chosen) and must agree with them. An
architecture, or a key that may change what the model computes, is refused by name if it is unknown here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moec.checkpoints.folder import listed
from moec.checkpoints.gguf_file import GgufFile
from moec.checkpoints.safetensors_file import shown
from moec.compiler.errors import CheckpointError

_MOST_LAYERS = 1024
_MOST_HEADS = 1 << 12
_MOST_CONTEXT = 1 << 24
_ANOTHER = "use a file that llama.cpp's own converter wrote"
_DEFAULT_THETA = 10000.0
_INTERLEAVED = "Meta AI original pth"  # the only layout that was ever named: rows as where files name none
_LAYER = re.compile(r"blk\.(\d{1,5})\.")
# llama.cpp's files of Llama 3.1 and later state the scaled frequencies as a tensor; these are all that were released
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Family:
    """How an architecture of GGUF is a model of transformers.

    dense, mixture: its `model_type` without and with experts, None if it has none. permuted: whether rows of queries
    and keys lie in the order of interleaved rotation. head_dim: whether the config takes one. expert_width, experts:
    the config's keys. fixed: keys that follow from the architecture. scales: keys of the metadata below the
    architecture -> the config's. windowed: some layers attend to a window, in an order that follows from the
    architecture. gating: numbers of the router's function. yarn: what of YaRN follows from the architecture.
    """

    dense: str | None
    mixture: str | None = None
    permuted: bool = False
    head_dim: bool = True
    expert_width: str = "moe_intermediate_size"
    experts: str = "num_experts"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    windowed: bool = False
    gating: tuple[int, ...] = (0, 1)
    yarn: Mapping[str, Any] = field(default_factory=dict)


_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "llama", "mixtral", permuted=True, expert_width="intermediate_size", experts="num_local_experts",
        fixed={"sliding_window": None},
    ),
    "qwen2": Family("qwen2", head_dim=False, fixed={"use_sliding_window": False}),
    "qwen2moe": Family(None, "qwen2_moe", head_dim=False, fixed={"norm_topk_prob": False, "use_sliding_window": False}),
    "qwen3": Family("qwen3", fixed={"use_sliding_window": False}),
    "qwen3moe": Family(None, "qwen3_moe", fixed={"norm_topk_prob": True, "use_sliding_window": False}),
    "olmoe": Family(
        None, "olmoe", head_dim=False, expert_width="intermediate_size", fixed={"norm_topk_prob": False}
    ),
    "granite": Family("granite", permuted=True, head_dim=False, scales=_GRANITE),
    "granitemoe": Family(
        None, "granitemoe", permuted=True, head_dim=False, expert_width="intermediate_size",
        experts="num_local_experts", scales=_GRANITE,
    ),
    "gpt-oss": Family(
        None, "gpt_oss", expert_width="intermediate_size", experts="num_local_experts", windowed=True,
        gating=(0, 1, 3), yarn={"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},  # 3: softmax of the chosen
    ),
    "smollm3": Family("smollm3", permuted=True, head_dim=False, fixed={"no_rope_layer_interval": 4}),
}  # fmt: skip

_BETAS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
# Keys below the architecture that are read here, or that change nothing: sizes that the tensors tell as well.
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length",
    "attention.value_length", "attention.clamp_kqv", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "expert_count",
    "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_weights_norm",
    "expert_weights_scale", "expert_gating_func", "attention.sliding_window", "attention.causal",
    "leading_dense_block_count", "expert_shared_count", "tensor_data_layout", "expert_group_count",
    "expert_group_used_count", "interleave_moe_layer_step", *_BETAS,
}  # fmt: skip


def config_of(file: GgufFile) -> tuple[dict[str, Any], Family]:
    """The keys of a transformers config, `model_type` among them. CheckpointError, one line, for what is not known."""
    return _Maker(file).config()


class _Maker:
    def __init__(self, file: GgufFile) -> None:
        self._file, self._place = file, str(file.file)
        architecture = file.architecture
        if architecture is None:
            raise self._fault("its metadata names no architecture")
        if architecture not in FAMILIES:
            raise CheckpointError(
                f"its architecture is {shown(architecture)}, which is not read from GGUF",
                place=self._place,
                remedy=f"known here: {', '.join(FAMILIES)}; or give the safetensors checkpoint it was made from",
            )
        self._architecture, self._family = architecture, FAMILIES[architecture]
        self._metadata = {
            key.removeprefix(f"{architecture}."): value
            for key, value in file.metadata.items()
            if key.startswith(f"{architecture}.")
        }

    def config(self) -> tuple[dict[str, Any], Family]:
        family = self._family
        unknown = sorted(set(self._metadata) - _READ - set(family.scales))
        if unknown:
            raise self._fault(
                f"its metadata has {listed([f'{self._architecture}.{key}' for key in unknown])}, not known"
            )
        layers = self._layers()
        vocabulary, width = self._shape("token_embd.weight", 2)
        experts = self._count("expert_count", _MOST_HEADS, default=0)
        kind = family.mixture if experts else family.dense
        if kind is None:
            raise self._fault(f"it has {experts} experts, which no model of {self._architecture} has")
        heads = self._count("attention.head_count", _MOST_HEADS)
        kv_heads = self._count("attention.head_count_kv", _MOST_HEADS, default=heads)
        head_dim = self._head_dim(heads, kv_heads)
        config: dict[str, Any] = {
            "model_type": kind,
            "hidden_size": width,
            "vocab_size": vocabulary,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": self._count("context_length", _MOST_CONTEXT),
            "rms_norm_eps": self._positive("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(head_dim),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "hidden_act": "silu",
            **family.fixed,
            **self._special_tokens(vocabulary),
        }
        if family.head_dim:
            config["head_dim"] = head_dim
        elif head_dim * heads != width:
            raise self._fault(f"its heads are {head_dim} wide, {heads} of them make no {width}")
        self._expect("embedding_length", width)
        self._expect("vocab_size", vocabulary)
        config |= self._mixture(experts) if experts else self._dense()
        for key, name in family.scales.items():
            if key in self._metadata:
                config[name] = self._positive(key)
            elif key == "attention.scale":  # llama.cpp's default, where transformers' is 1
                config[name] = head_dim**-0.5
        clamp = self._scalar("attention.clamp_kqv")
        if clamp is not None:
            if kind != "olmoe":
                raise self._fault(f"{self._architecture}.attention.clamp_kqv is not known of it")
            config["clip_qkv"] = self._positive("attention.clamp_kqv")
        if "blk.0.attn_q.bias" in self._file.tensors and not kind.startswith("qwen2"):
            config["attention_bias"] = True
        if "blk.0.ffn_gate.bias" in self._file.tensors:
            config["mlp_bias"] = True
        window = self._scalar("attention.sliding_window")
        if family.windowed:
            config["sliding_window"] = self._count("attention.sliding_window", _MOST_CONTEXT)
        elif window:
            raise self._fault(f"it attends to the last {shown(window)} positions only, which is not read from GGUF")
        layout = self._scalar("tensor_data_layout", _INTERLEAVED)
        if layout != _INTERLEAVED:
            raise self._fault(f"its tensor_data_layout is {shown(layout)}, known is {_INTERLEAVED}")
        if self._scalar("attention.causal") is False:
            raise self._fault("its attention is not causal: it writes no text")
        return config, family

    def _layers(self) -> int:
        layers = self._count("block_count", _MOST_LAYERS)
        held = {int(found[1]) for name in self._file.tensors if (found := _LAYER.match(name))}
        if held != set(range(layers)):
            raise self._fault(f"its metadata speaks of {layers} layers, its tensors are of {len(held)}")
        return layers

    def _head_dim(self, heads: int, kv_heads: int) -> int:
        rows, _ = self._shape("blk.0.attn_q.weight", 2)
        if rows % heads or heads % kv_heads:
            raise self._fault(f"its queries have {rows} rows for {heads} heads of {kv_heads} keys")
        head_dim = rows // heads
        if head_dim % 2:
            raise self._fault(f"its heads are {head_dim} wide, which rotates no pairs")
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            self._expect(key, head_dim)
        return head_dim

    def _dense(self) -> dict[str, Any]:
        rows, _ = self._shape("blk.0.ffn_gate.weight", 2)
        self._expect("feed_forward_length", rows)
        return {"intermediate_size": rows}

    def _mixture(self, experts: int) -> dict[str, Any]:
        family = self._family
        if "blk.0.ffn_down_exps.weight" in self._file.tensors:
            held, _, width = self._shape("blk.0.ffn_down_exps.weight", 3)
        else:  # files of early 2024 hold a tensor for each expert
            held, (_, width) = experts, self._shape("blk.0.ffn_down.0.weight", 2)
        if held != experts:
            raise self._fault(f"its metadata speaks of {experts} experts, its tensors are of {held}")
        self._expect("expert_feed_forward_length", width)
        gating = self._scalar("expert_gating_func", 1)
        if gating not in family.gating:
            raise self._fault(f"its router's function is number {shown(gating)}, known is softmax")
        if self._scalar("expert_weights_scale", 0) not in (0, 1):
            raise self._fault("it scales what its experts give, which no known model of the kind does")
        normalised = family.fixed.get("norm_topk_prob", True)
        if self._scalar("expert_weights_norm", normalised) != normalised:
            raise self._fault(f"its expert_weights_norm is {not normalised}, which no {self._architecture} has")
        for key in ("leading_dense_block_count", "expert_group_count", "expert_group_used_count"):
            if self._scalar(key, 0) not in (0, 1):
                raise self._fault(f"{self._architecture}.{key} is not known of it")
        found: dict[str, Any] = {
            family.experts: experts,
            family.expert_width: width,
            "num_experts_per_tok": self._count("expert_used_count", experts),
        }
        if family.expert_width != "intermediate_size":
            found["intermediate_size"] = self._count("feed_forward_length", 1 << 20, default=width)
        shared = "blk.0.ffn_down_shexp.weight"
        if self._architecture == "qwen2moe":
            found["shared_expert_intermediate_size"] = self._shape(shared, 2)[1]
        elif shared in self._file.tensors and self._architecture == "granitemoe":
            found |= {"model_type": "granitemoeshared", "shared_intermediate_size": self._shape(shared, 2)[1]}
        return found

    def _rope(self, head_dim: int) -> dict[str, Any]:
        theta = self._positive("rope.freq_base", _DEFAULT_THETA)
        # a factor alone is linear: llama.cpp's default
        kind = self._scalar("rope.scaling.type", "linear" if "rope.scaling.factor" in self._metadata else "none")
        factors = self._file.tensors.get("rope_freqs.weight")
        if factors is not None and kind not in ("none", "llama3"):
            raise self._fault(f"it has rope_freqs and a scaling of {shown(kind)}")
        if factors is not None:
            return {"rope_type": "llama3", "rope_theta": theta, **self._llama3(theta, head_dim)}
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind not in ("linear", "yarn"):
            raise self._fault(f"its rotary frequencies are scaled by {shown(kind)}, known are linear and yarn")
        scaling: dict[str, Any] = {
            "rope_type": kind,
            "rope_theta": theta,
            "factor": self._positive("rope.scaling.factor"),
        }
        if kind == "yarn":
            original = self._count("rope.scaling.original_context_length", _MOST_CONTEXT)
            scaling |= {"original_max_position_embeddings": original, **self._family.yarn}
            scaling |= {name: self._positive(key) for key, name in _BETAS.items() if key in self._metadata}
        return scaling

    def _llama3(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The scaling that gives the file's factors, which must be one that models were released with."""
        tensor = self._file.tensors["rope_freqs.weight"]
        if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
            raise self._fault(f"rope_freqs.weight is {tensor.type} {list(tensor.shape)} for heads of {head_dim}")
        held = self._file.blocks(tensor).view(np.float32).reshape(-1).astype(np.float64)
        if not np.isfinite(held).all() or held.min() < 1:
            raise self._fault("rope_freqs.weight holds factors below 1 or none")
        factor = float(held.max())
        low, high, original = (float(_LLAMA3[key]) for key in _LLAMA3)
        wave = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = (original / wave - low) / (high - low)
        expected = np.where(wave < original / high, 1, np.where(wave > original / low, factor,
                            1 / ((1 - smooth) / factor + smooth)))  # fmt: skip
        if not np.allclose(held, expected, rtol=1e-4, atol=0):  # the file's are float32, made by another order of steps
            raise self._fault("its rope_freqs are not those of Llama 3's scaling")
        return {"factor": factor, **_LLAMA3}

    def _special_tokens(self, vocabulary: int) -> dict[str, Any]:
        found: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        for name in ("bos", "eos"):
            value = self._file.metadata.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary:
                found[f"{name}_token_id"] = value
        return found

    # --- reading, all checked ------------------------------------------------------------------------------------

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise self._fault(f"it has no tensor {name}")
        if len(tensor.shape) != rank or not all(tensor.shape):
            raise self._fault(f"tensor {name} has shape {list(tensor.shape)}, {rank} dimensions are expected")
        return tensor.shape

    def _count(self, key: str, most: int, default: int | None = None) -> int:
        value = self._same_everywhere(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not (0 if default == 0 else 1) <= value <= most:
            what = "missing" if value is None else f"{shown(value)}, expected 1 to {most}"
            raise self._fault(f"{self._architecture}.{key} is {what}")
        return value

    def _positive(self, key: str, default: float | None = None) -> float:
        value = self._scalar(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            what = "missing" if value is None else f"{shown(value)}, a positive number is expected"
            raise self._fault(f"{self._architecture}.{key} is {what}")
        return float(value)

    def _scalar(self, key: str, default: Any = None) -> Any:
        value = self._same_everywhere(key)
        return default if value is None else value

    def _same_everywhere(self, key: str) -> Any:
        """A value that may be given for each layer, and must then be the same in all."""
        value = self._metadata.get(key)
        if not isinstance(value, np.ndarray):
            return value
        if not len(value) or (value != value[0]).any():
            raise self._fault(f"{self._architecture}.{key} differs from layer to layer, which is not read from GGUF")
        return value[0].item()

    def _expect(self, key: str, wanted: int) -> None:
        value = self._same_everywhere(key)
        if value is not None and value != wanted:
            raise self._fault(f"{self._architecture}.{key} is {shown(value)}, its tensors say {wanted}")

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(what, place=self._place, remedy=_ANOTHER)
