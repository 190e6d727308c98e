"""The spec that a checkpoint's config.json implies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moec.checkpoints.coded import CodedEntry
from moec.checkpoints.codes_of_config import FORMATS, with_codes
from moec.checkpoints.config_json import GROUP_SIZE, config_from_json, is_own, is_packed, read_json
from moec.checkpoints.folder import CONFIG, foreign_folder, read_tensors
from moec.checkpoints.mxfp4 import FORMAT, is_mxfp4
from moec.checkpoints.safetensors_file import Entry, shown
from moec.compiler.errors import CheckpointError, UserError
from moec.compiler.weights import CodeFormat
from moec.sources.decoder.config import DecoderConfig

GENERATION = "generation_config.json"
CONTEXT = 4096  # positions of the KV cache in a spec that nobody wrote
_ROLES: tuple[tuple[str, str], ...] = (  # of a weight that is held as codes, by its name
    (r"\.experts\.", "experts"),
    (r"\.shared_(experts?|mlp)\.", "shared"),
    (r"attn|attention", "attention"),
    (r"^(lm_head|output)\.", "head"),
    (r"embed", "embedding"),
)


def spec_from_config(folder: str | Path, dequantize: Iterable[str] = ()) -> str:
    """YAML text of a spec for the checkpoint in `folder`: its model, and INT4 weights on the axes that it stores.

    A model that is not one of moec's own decoders is named as transformers' own: `model: {transformers: FOLDER}`.

    Codes of the formats in `dequantize` are quantized anew, those of others are carried.

    Errors: CheckpointError, one line per fault, for a config.json that is missing, damaged or not supported; UserError
    for a format in `dequantize` that no transformers checkpoint is read in.
    """
    folder = Path(folder)
    named = {name.lower(): name for name in FORMATS}
    given = tuple(dict.fromkeys(named.get(kind.lower(), kind) for kind in dequantize))
    for kind in given:
        if kind not in FORMATS:
            remedy = f"formats are {', '.join(FORMATS)}"
            raise UserError(f"--dequantize: {shown(kind)} is no format of a folder's codes", remedy=remedy)
    file = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint folder", place=str(folder), remedy="name a folder with config.json")
    foreign = foreign_folder(folder)
    if foreign is not None:
        raise foreign
    raw = read_json(file)
    if not is_own(raw):
        return _transformers_spec(folder, raw, given)
    if given:
        raise UserError(
            "--dequantize is for codes of other tools, which this checkpoint has none of", place=str(folder)
        )
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


def _transformers_spec(folder: Path, raw: Mapping[str, Any], dequantize: tuple[str, ...]) -> str:
    """The spec of a transformers model; a context longer than CONTEXT is bounded, since its KV cache is allocated."""
    sections = [raw, *(value for key, value in raw.items() if key == "text_config" and isinstance(value, dict))]
    lengths = [n for s in sections if isinstance(n := s.get("max_position_embeddings"), int) and n > CONTEXT]
    model: dict[str, Any] = {"transformers": str(folder.resolve())}
    if lengths:
        model["context"] = CONTEXT
    if dequantize:
        model["dequantize"] = list(dequantize)
    quantization: dict[str, Any] = {"weights": "int4", "group_size": GROUP_SIZE, "expert_group_axis": "in"}
    coded = is_mxfp4(raw) and not dequantize
    held = {} if is_mxfp4(raw) else _carried(folder, raw, dequantize)
    if coded:
        quantization["experts"] = {"weights": str(FORMAT.grid), "group_size": FORMAT.group_size}
    quantization |= _bits(held)
    spec = {
        "name": _name(folder),
        "model": model,
        "quantization": quantization,
        "targets": ["xnnpack"],
    }
    about = "; experts in MXFP4 are carried bit for bit" if coded else ""
    if held:
        kinds = Counter(f"{entry.dtype} as {entry.format}" for entry in held.values())
        about += "; carried: " + ", ".join(f"{count} {what}" for what, count in kinds.most_common())
    about += f"; its context of {lengths[0]} is bounded" if lengths else ""
    return f"# From {CONFIG} of {shown(folder.resolve().name)}{about}.\n" + yaml.dump(spec, sort_keys=False, width=110)


def _carried(folder: Path, raw: Mapping[str, Any], dequantize: tuple[str, ...]) -> dict[str, CodedEntry]:
    """The weights of a folder whose codes are carried, by their names; none where the files cannot be read."""
    faults: list[str] = []
    stored = read_tensors(folder, faults).entries if any(folder.glob("*.safetensors")) else {}
    if faults or not stored:
        return {}
    entries: Mapping[str, Entry] = with_codes(stored, raw, str(folder))[0]
    return {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, CodedEntry) and entry.format is not None and entry.dtype not in dequantize
    }


def _bits(held: Mapping[str, CodedEntry]) -> dict[str, Any]:
    """What `quantization` says so that codes are carried: each role in the format that holds all of its weights, and
    INT8 for those that the files hold as floats, since whoever made them kept them from fewer bits."""
    by_role: dict[str, list[CodeFormat]] = {}
    for name, entry in held.items():
        role = next((role for pattern, role in _ROLES if re.search(pattern, name)), "ffn")
        if entry.format is not None:
            by_role.setdefault(role, []).append(entry.format)
    if not by_role:
        return {}
    if {"experts", "shared"} <= set(by_role):  # one operator
        by_role["experts"] = by_role["shared"] = by_role["experts"] + by_role["shared"]
    formats = {role: _holding(found) for role, found in by_role.items()}
    weights, group = Counter({f: len(by_role[role]) for role, f in formats.items()}).most_common(1)[0][0]
    section: dict[str, Any] = {"weights": weights, "group_size": group}
    formats = {"embedding": ("int8", GROUP_SIZE), "head": ("int8", GROUP_SIZE)} | formats
    for role, (own, own_group) in sorted(formats.items()):
        if (own, own_group) != (weights, group):
            section[role] = {"weights": own, "group_size": own_group}
    return section


def _holding(formats: Sequence[CodeFormat]) -> tuple[str, int]:
    """The type and group size that hold codes of all `formats`: INT8 has the values of every other."""
    grids = {f.grid for f in formats}
    return str(grids.pop()) if len(grids) == 1 else "int8", min(f.group_size for f in formats)


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
