"""Quantized checkpoints of other tools that no reader knows, recognised by config.json and by their tensors.

Codes read as if they were weights give a model that computes nonsense without an error; so every sign of codes
(`quantization_config`, an integer or 8-bit float tensor where a weight belongs, a scale beside a weight) is recognised
here, and refused with the name of the format.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from moec.checkpoints.coded import CodedEntry
from moec.checkpoints.safetensors_file import FLOATS, Entry, shown

# Ends of names of tensors that show the format of the weight beside them, the most specific first.
_MARKS: tuple[tuple[str, str], ...] = (
    (".weight_packed", "compressed-tensors (packed codes, weight_packed)"),
    (".qzeros", "AWQ"),
    (".g_idx", "GPTQ"),
    (".qweight", "codes of its own layout (qweight)"),
    (".SCB", "bitsandbytes (INT8, SCB)"),
    (".weight.absmax", "bitsandbytes (4 bits, absmax)"),
    (".weight.quant_map", "bitsandbytes (4 bits, quant_map)"),
    (".weight_scale_2", "NVFP4 (weight_scale_2)"),
    (".weight_scale_inv", "FP8 (weight_scale_inv)"),
    ("_scale_inv", "FP8 (scale_inv)"),
    ("_blocks", "MXFP4 (blocks and scales)"),
    (".weight_scale", "codes with a weight_scale"),
    (".weight_zero_point", "codes with a weight_zero_point"),
    (".scales", "codes with scales"),
)
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "modelopt": "NVFP4 or FP8 (ModelOpt)",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
}


def said_by_config(raw: Mapping[str, Any]) -> str | None:
    """The format that `quantization_config` (or MLX's `quantization`) of a config.json names, in a few words."""
    section = raw.get("quantization_config")
    if isinstance(section, Mapping):
        method = section.get("quant_method")
        name = _METHODS.get(str(method).lower(), shown(method)) if method is not None else _unnamed(section)
        details = [
            shown(section[key]) if key == "format" else f"{key} {shown(section[key])}"
            for key in ("format", "fmt", "bits", "group_size")
            if isinstance(section.get(key), (str, int))
        ]
        return f"{name} ({', '.join(details)})" if details else name
    if section is not None:
        return "an unknown format"
    ours = raw.get("quantization")
    if isinstance(ours, Mapping) and "bits" in ours and "format" not in ours:
        return f"MLX ({shown(ours['bits'])} bits)"
    return None


def _unnamed(section: Mapping[str, Any]) -> str:
    for key in section:
        if isinstance(key, str) and key.startswith(("load_in_", "bnb_")):
            return "bitsandbytes"
    return "an unknown format"


def said_by_tensors(entries: Mapping[str, Entry], model: Collection[str]) -> tuple[str, str] | None:
    """(the format, the name of a tensor that shows it); None when every tensor is a plain weight.

    `model`: names that the model itself has, whatever they end in.
    """
    found: dict[str, str] = {}
    for name in entries:
        if name in model:
            continue
        for end, _ in _MARKS:
            if name.endswith(end):
                found.setdefault(end, name)
    types = {e.dtype for e in entries.values()}
    if ".scales" in found and ".qweight" not in found and "U32" in types:
        return "MLX (packed codes, scales)", found[".scales"]
    if ".qzeros" in found and ".g_idx" in found:
        return "GPTQ", found[".g_idx"]
    if ".weight_scale" in found and {"F8_E4M3", "F8_E5M2"} & types and ".weight_scale_2" not in found:
        return "FP8 (weight_scale)", found[".weight_scale"]
    for end, what in _MARKS:
        if end in found:
            return what, found[end]
    return None


def is_plain(entry: Entry) -> bool:
    """Whether a tensor can be a weight as it is: a float type of 16 bits or more, or codes whose values are read."""
    return entry.dtype in FLOATS or isinstance(entry, CodedEntry)
