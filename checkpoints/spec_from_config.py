"""The spec that a checkpoint's config.json implies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moec.checkpoints.config_json import GROUP_SIZE, config_from_json, is_own, is_packed, read_json
from moec.checkpoints.folder import CONFIG, foreign_folder
from moec.checkpoints.mxfp4 import FORMAT, is_mxfp4
from moec.checkpoints.safetensors_file import shown
from moec.compiler.errors import CheckpointError
from moec.sources.decoder.config import DecoderConfig

GENERATION = "generation_config.json"
CONTEXT = 4096  # positions of the KV cache in a spec that nobody wrote


def spec_from_config(folder: str | Path) -> str:
    """YAML text of a spec for the checkpoint in `folder`: its model, and INT4 weights on the axes that it stores.

    A model that is not one of moec's own decoders is named as transformers' own: `model: {transformers: FOLDER}`.

    Errors: CheckpointError, one line per fault, for a config.json that is missing, damaged or not supported.
    """
    folder = Path(folder)
    file = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint folder", place=str(folder), remedy="name a folder with config.json")
    foreign = foreign_folder(folder)
    if foreign is not None:
        raise foreign
    raw = read_json(file)
    if not is_own(raw):
        return _transformers_spec(folder, raw)
    raw |= {key: token for key, token in _special_tokens(folder).items() if raw.get(key) is None}
    config, packed = config_from_json(raw, file), is_packed(raw, file)
    spec: dict[str, Any] = {
        "name": _name(folder),
        "model": _model(config),
        "checkpoint": str(folder.resolve()),
        "quantization": _quantization(config),
        "targets": ["xnnpack"],
    }
    about = "packed INT4 codes are carried through unchanged" if packed else "float weights are quantized when compiled"
    return f"# From {CONFIG} of {shown(folder.resolve().name)}; {about}.\n" + yaml.dump(
        spec, sort_keys=False, width=110
    )


def _transformers_spec(folder: Path, raw: Mapping[str, Any]) -> str:
    """The spec of a transformers model; a context longer than CONTEXT is bounded, since its KV cache is allocated."""
    sections = [raw, *(value for key, value in raw.items() if key == "text_config" and isinstance(value, dict))]
    lengths = [n for s in sections if isinstance(n := s.get("max_position_embeddings"), int) and n > CONTEXT]
    model: dict[str, Any] = {"transformers": str(folder.resolve())}
    if lengths:
        model["context"] = CONTEXT
    quantization: dict[str, Any] = {"weights": "int4", "group_size": GROUP_SIZE, "expert_group_axis": "in"}
    coded = is_mxfp4(raw)
    if coded:
        quantization["experts"] = {"weights": "int8", "group_size": FORMAT.group_size}
    spec = {
        "name": _name(folder),
        "model": model,
        "quantization": quantization,
        "targets": ["xnnpack"],
    }
    about = "; experts in MXFP4 are carried as INT8 codes of the same values" if coded else ""
    about += f"; its context of {lengths[0]} is bounded" if lengths else ""
    return f"# From {CONFIG} of {shown(folder.resolve().name)}{about}.\n" + yaml.dump(spec, sort_keys=False, width=110)


def _special_tokens(folder: Path) -> dict[str, Any]:
    """First and last tokens of a text from generation_config.json, where transformers keeps them too."""
    file = folder / GENERATION
    raw = read_json(file) if file.is_file() else {}
    return {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw.get(key) is not None}


def _name(folder: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")
    return name[:100] or "model"


def _model(config: DecoderConfig) -> dict[str, Any]:
    """The section as plain values, without what is absent."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items() if inner is not None}
        return list(value) if isinstance(value, tuple) else value

    model = plain(config.model_dump(mode="json"))
    if not model.get("eos_ids"):
        model.pop("eos_ids", None)
    return model


def _quantization(config: DecoderConfig) -> dict[str, Any]:
    section: dict[str, Any] = {
        "weights": "int4",
        "group_size": GROUP_SIZE,
        "activations": {"bits": 8, "group": "auto"},
        "kv_cache": "int8",
        "router": "fp32",
        "embedding": "int4",
    }
    if config.moe is not None:
        section["expert_group_axis"] = "out"
    return section
