"""config.json of a checkpoint and the `model:` section of a spec, in both directions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moec.compiler.errors import CheckpointError
from moec.compiler.files import read_bytes
from moec.sources.decoder.config import DecoderConfig, RopeScaling

PACKED_FORMAT = "mobilemoe-int4-g32"
GROUP_SIZE = 32
_MAX_BYTES = 16 << 20
_MOST_NUMBER = 1 << 1000  # of an integer where a float is expected

# What a packed checkpoint says of itself. Every key must be as here: nothing else was ever released.
PACKED: Mapping[str, Any] = {
    "format": PACKED_FORMAT,
    "group_size": GROUP_SIZE,
    "embedding_group_size": GROUP_SIZE,
    "qmin": -8,
    "qmax": 7,
    "symmetric": True,
    "packed": True,
    "scale_dtype": "float16",
    "linear_group_axis": "in (last dim of [out, in])",
    "expert_group_axis": "out (last dim of [E, in, out])",
}

# The spec's keys, as paths below `model:`, and the keys of config.json that decide them.
_KEYS: Mapping[str, str] = {
    "architecture": "model_type",
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "qk_norm": "use_qk_norm",
    "tied_embeddings": "tie_word_embeddings",
    "rope.theta": "rope_theta",
    "rope.interleaved": "rope_interleaved",
    "rope.scaling": "rope_scaling",
    "rope.scaling.factor": "rope_scaling.factor",
    "rope.scaling.original_context": "rope_scaling.original_max_position_embeddings",
    "rope.scaling.low_freq_factor": "rope_scaling.low_freq_factor",
    "rope.scaling.high_freq_factor": "rope_scaling.high_freq_factor",
    "moe.experts": "num_local_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.expert_width": "intermediate_size",
    "moe.shared_width": "intermediate_size_mlp",
    "moe.selection_bias": "use_expert_bias",
    "moe.normalize": "norm_topk_prob",
    "moe.scale": "routed_scaling_factor",
    "ffn_width": "intermediate_size",
    "attention_window": "layer_types",
    "attention_window.size": "sliding_window",
    "attention_window.every_nth_global": "layer_types",
}
#: Keys of other models' configs that change what is computed, and the only value that our decoders have. They may be
#: absent or null.
_ONLY: Mapping[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "attention_chunk_size": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "scoring_func": "sigmoid",
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "mlp_only_layers": [],
}
_ARCHITECTURES = {"mobilemoe": "MobileMoEForCausalLM", "mobilellm": "MobileLLMForCausalLM"}


def scaling_to_json(scaling: RopeScaling) -> dict[str, Any]:
    """The rotary scaling of a config.json, ours or one of transformers."""
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
    }


def config_to_json(config: DecoderConfig, *, packed: bool) -> dict[str, Any]:
    """The config.json of a checkpoint of `config`; `packed` for INT4 codes and scales."""
    scaling, moe, window = config.rope.scaling, config.moe, config.attention_window
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_interleaved": config.rope.interleaved,
        "rope_scaling": None if scaling is None else scaling_to_json(scaling),
        "no_rope_layers": [1] * config.layers,
        "use_qk_norm": config.qk_norm,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    }
    if moe is not None:
        raw |= {
            "intermediate_size": moe.expert_width,
            "intermediate_size_mlp": moe.shared_width,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "interleave_moe_layer_step": 1,
            "routed_scaling_factor": moe.scale,
            "norm_topk_prob": moe.normalize,
            "use_expert_bias": moe.selection_bias,
        }
    else:
        raw["intermediate_size"] = config.ffn_width
    if window is not None:
        raw["sliding_window"] = window.size
        raw["layer_types"] = _layer_types(config.layers, window.every_nth_global)
    if config.bos_id is not None:
        raw["bos_token_id"] = config.bos_id
    if config.eos_ids:
        raw["eos_token_id"] = list(config.eos_ids)
    if packed:
        raw["quantization"] = dict(PACKED)
    return raw


def _layer_types(layers: int, every: int) -> list[str]:
    return ["full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(layers)]


class ConfigFaults(CheckpointError):
    """What is wrong with a config.json: `lines` without the file's name."""

    def __init__(self, file: Path, lines: list[str]) -> None:
        self.lines = lines
        super().__init__("\n".join(f"{file}: {line}" for line in lines))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON mapping from a file that may be anything.

    CheckpointError if it is none, or if a key stands twice with two values: of those, readers choose differently.
    """
    remedy = "copy it again from where the checkpoint comes from"
    if not file.exists():
        raise CheckpointError("missing", place=str(file), remedy=remedy)
    text = read_bytes(file, limit=_MAX_BYTES, fault=CheckpointError, remedy=remedy)
    try:
        raw = json.loads(text, object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"no valid JSON ({str(error).splitlines()[0]})", place=str(file), remedy=remedy) from None
    if not isinstance(raw, dict):
        raise CheckpointError("not a JSON mapping", place=str(file), remedy=remedy)
    return raw


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        # compared as text: NaN is not equal to itself
        if key in found and repr(found[key]) != repr(value):
            raise ValueError(f"the key {key!r:.60} stands twice, with two values")
        found[key] = value
    return found


def is_own(raw: Mapping[str, Any]) -> bool:
    """Whether config.json describes one of moec's decoders; a `model_type` that is missing or no name counts as one."""
    kind = raw.get("model_type")
    return not isinstance(kind, str) or kind in _ARCHITECTURES


def is_packed(raw: Mapping[str, Any], file: Path) -> bool:
    """Whether config.json says that weights are INT4 codes and scales. ConfigFaults for an unknown format."""
    found = raw.get("quantization")
    if found is None and raw.get("quantization_config") is not None:
        raise ConfigFaults(file, [f"unknown quantization_config; known is quantization.format {PACKED_FORMAT}"])
    if found is None:
        return False
    if not isinstance(found, dict):
        raise ConfigFaults(file, ["quantization: expected a mapping"])
    faults = [
        f"quantization.{key}: unknown value {found.get(key)!r:.60}, known is {value!r}"
        for key, value in PACKED.items()
        if not _says(key, found.get(key), value)
    ]
    if faults:
        # the format's name says more than what follows from it
        raise ConfigFaults(file, faults[:1] if found.get("format") != PACKED_FORMAT else faults)
    return True


def _says(key: str, found: Any, known: Any) -> bool:
    """Whether a key of the packed format has its known value; of an axis only the first word counts."""
    if not key.endswith("_axis"):
        return type(found) is type(known) and found == known
    return found is None or str(found).split()[:1] == str(known).split()[:1]


def config_from_json(raw: Mapping[str, Any], file: Path) -> DecoderConfig:
    """The model that a config.json describes. ConfigFaults, all at once, for what is missing or not supported."""
    reader = _Reader(raw)
    fields = _fields(reader)
    if reader.faults:
        raise ConfigFaults(file, reader.faults)
    try:
        return DecoderConfig.model_validate(fields)
    except ValidationError as error:
        lines = []
        for detail in error.errors(include_url=False):
            path = ".".join(str(part) for part in detail["loc"])
            lines.append(f"{_KEYS.get(path, path)}: {detail['msg']}")
        raise ConfigFaults(file, lines) from None


class _Reader:
    """Typed reading of a mapping that collects what is wrong."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.faults: list[str] = []

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        value: Any = self.raw
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            if default is ...:
                self.faults.append(f"{key}: missing")
            return None if default is ... else default
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < _MOST_NUMBER else value
        if type(value) is not kind:
            self.faults.append(f"{key}: expected {kind.__name__}, got {value!r:.60}")
        return value

    def expect(self, key: str, supported: Any) -> None:
        value = self.raw.get(key)
        if value is not None and value != supported:
            self.faults.append(f"{key}: {value!r:.60} is not supported, only {supported!r:.60}")


def _fields(reader: _Reader) -> dict[str, Any]:
    get, raw = reader.get, reader.raw
    architecture = get("model_type", str)
    if isinstance(architecture, str) and architecture not in _ARCHITECTURES:
        reader.faults.append(f"model_type: {architecture!r:.60} is not supported, only {', '.join(_ARCHITECTURES)}")
    layers = get("num_hidden_layers", int)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "layers": layers,
        "d_model": get("hidden_size", int),
        "heads": get("num_attention_heads", int),
        "kv_heads": get("num_key_value_heads", int),
        "head_dim": get("head_dim", int),
        "vocab_size": get("vocab_size", int),
        "context": get("max_position_embeddings", int),
        "norm_eps": get("rms_norm_eps", float),
        "qk_norm": get("use_qk_norm", bool, False),
        "tied_embeddings": get("tie_word_embeddings", bool),
        "rope": {
            "theta": get("rope_theta", float),
            "interleaved": get("rope_interleaved", bool, True),
            "scaling": _rope_scaling(reader),
        },
        "attention_window": _attention_window(reader, layers),
        "bos_id": get("bos_token_id", int, None),
        "eos_ids": _eos_ids(raw.get("eos_token_id")),
    }
    for key, only in _ONLY.items():
        reader.expect(key, only)
    if isinstance(layers, int) and 0 < layers <= 1024:
        reader.expect("no_rope_layers", [1] * layers)
    if architecture == "mobilemoe":
        reader.expect("interleave_moe_layer_step", 1)
        fields["moe"] = {
            "experts": get("num_local_experts", int),
            "top_k": get("num_experts_per_tok", int),
            "expert_width": get("intermediate_size", int),
            "shared_width": get("intermediate_size_mlp", int, 0),
            "selection_bias": get("use_expert_bias", bool, True),
            "normalize": get("norm_topk_prob", bool),
            "scale": get("routed_scaling_factor", float),
        }
    elif architecture == "mobilellm":
        fields["ffn_width"] = get("intermediate_size", int)
    return fields


def _eos_ids(value: Any) -> Any:
    return () if value is None else [value] if type(value) is int else value


def _rope_scaling(reader: _Reader) -> dict[str, Any] | None:
    scaling = reader.raw.get("rope_scaling")
    if scaling is None:
        return None
    kind = scaling.get("rope_type") if isinstance(scaling, Mapping) else scaling
    if kind == "default":
        return None
    if kind != "llama3":
        reader.faults.append(f"rope_scaling: rope_type {kind!r:.60} is not supported, only 'llama3'")
        return None
    return {
        "factor": reader.get("rope_scaling.factor", float),
        "original_context": reader.get("rope_scaling.original_max_position_embeddings", int),
        "low_freq_factor": reader.get("rope_scaling.low_freq_factor", float),
        "high_freq_factor": reader.get("rope_scaling.high_freq_factor", float),
    }


def _attention_window(reader: _Reader, layers: Any) -> dict[str, Any] | None:
    types = reader.raw.get("layer_types")
    if types is None:
        size = reader.raw.get("sliding_window")
        if size is not None and reader.raw.get("use_sliding_window") is not False:
            reader.faults.append(f"sliding_window: {size!r:.60}, but layer_types does not say which layers have it")
        return None
    if not isinstance(layers, int):
        return None
    if isinstance(types, list) and len(types) == layers:
        if all(kind == "full_attention" for kind in types):
            return None
        first = types.index("full_attention") + 1 if "full_attention" in types else layers + 1
        if types == _layer_types(layers, first):
            return {"size": reader.get("sliding_window", int), "every_nth_global": first}
    reader.faults.append("layer_types: only sliding attention with every n-th layer full is supported")
    return None


def contradictions(theirs: DecoderConfig, ours: DecoderConfig) -> list[str]:
    """Where a checkpoint's config and the spec's model differ; a spec may ask for a shorter context, other stop ids."""
    lines = []
    a, b = _leaves(theirs), _leaves(ours)
    same_windows = [theirs.window(n) for n in range(theirs.layers)] == [ours.window(n) for n in range(ours.layers)]
    for path in [*a, *(p for p in b if p not in a)]:
        if path in ("bos_id", "eos_ids") or a.get(path) == b.get(path):
            continue
        if path.startswith("attention_window") and same_windows:
            continue
        if path == "context":
            if ours.context > theirs.context:
                lines.append(
                    f"max_position_embeddings is {theirs.context}, the spec wants model.context {ours.context}"
                )
            continue
        if any(path.startswith(other + ".") and a.get(other, 0) != b.get(other, 0) for other in {*a, *b}):
            continue  # the fault of the whole section is reported instead
        lines.append(
            f"{_KEYS.get(path, path)} says model.{path} is {_shown(a.get(path))}, the spec says {_shown(b.get(path))}"
        )
    return lines


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)


def _leaves(config: DecoderConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            found[path] = "present"
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        else:
            found[path] = value

    walk(config.model_dump(), "")
    return found
