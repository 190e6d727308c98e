"""The spec that a GGUF file implies: each role stored in the codes that the file holds, so that they are carried."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from moec.checkpoints.gguf_codes import BLOCK, CARRIED, FLOATS, bits_per_weight, is_quantized
from moec.checkpoints.gguf_file import TYPES, GgufFile, GgufTensor, read_gguf
from moec.checkpoints.safetensors_file import shown
from moec.checkpoints.spec_from_config import CONTEXT
from moec.compiler.errors import CheckpointError

_WIDE = 5.5  # bits a weight from which a role that is quantized anew becomes INT8
# Roles of a spec's `quantization:` by the tensor's name below its layer; what is not here is kept in fp32.
_ROLES: tuple[tuple[str, str], ...] = (
    (r"token_embd\.weight", "embedding"),
    (r"output\.weight", "head"),
    (r"blk\.\d+\.attn_(q|k|v|output)\.weight", "attention"),
    (r"blk\.\d+\.ffn_(gate|up|down)_shexp\.weight", "shared"),
    (r"blk\.\d+\.ffn_(gate|up|down)(_exps|\.\d+)\.weight", "expert"),
    (r"blk\.\d+\.ffn_(gate|up|down)\.weight", "ffn"),
)
_KEYS = {"expert": "experts"}  # where the spec's key is not the role


def role_of(name: str) -> str | None:
    """The role of a matrix that a spec may quantize, by its GGUF name; None for routers, norms and biases."""
    return next((role for pattern, role in _ROLES if re.fullmatch(pattern, name)), None)


def refused_types(file: GgufFile, dequantize: Iterable[str]) -> CheckpointError | None:
    """Why the file cannot be compiled as it is: tensors of types whose codes are not carried and that nobody named."""
    named = {kind.upper() for kind in dequantize}
    others = Counter(
        tensor.type
        for tensor in file.tensors.values()
        if tensor.type not in CARRIED and tensor.type not in FLOATS and tensor.type not in named
    )
    if not others:
        return None
    what = ", ".join(f"{count} of {kind}" for kind, count in sorted(others.items()))
    if not all(is_quantized(kind) for kind in others):
        return CheckpointError(f"holds tensors that are no weights: {what}", place=str(file.file))
    kinds = ",".join(sorted({*others, *named}))
    return CheckpointError(
        f"holds {sum(others.values())} tensors whose codes cannot be carried ({what}); "
        f"those of {', '.join(CARRIED)} can",
        place=str(file.file),
        remedy=f"use a Q4_0 or Q8_0 file; or have their values quantized anew: --dequantize {kinds}, "
        f"in a spec `model: {{gguf: FILE, dequantize: [{kinds.replace(',', ', ')}]}}`",
    )


def unknown_types(dequantize: Iterable[str]) -> list[str]:
    """Those of the names that are no quantized type of GGUF."""
    known = {name for name, _, _ in TYPES.values() if is_quantized(name)}
    return [kind for kind in dequantize if kind.upper() not in known]


def spec_from_gguf(path: str | Path, dequantize: Iterable[str] = ()) -> str:
    """YAML text of a spec for a file: groups of 32 along the input, and the bits of what the file holds for each role.

    Codes are carried. A role whose tensors hold codes of several types is INT8, which has all their values. A role
    that is quantized anew has INT8 from 5.5 bits a weight of the file on, else INT4, as has a file of floats alone.

    CheckpointError for a damaged file, and for types that cannot be carried and that `dequantize` does not name.
    """
    path = Path(path)
    file = read_gguf(path)
    given = tuple(dict.fromkeys(kind.upper() for kind in dequantize))
    refused = refused_types(file, given)
    if refused is not None:
        raise refused
    model: dict[str, Any] = {"gguf": str(path.resolve())}
    length = next((value for key, value in file.metadata.items() if key.endswith(".context_length")), None)
    if isinstance(length, int) and length > CONTEXT:
        model["context"] = CONTEXT
    if given:
        model["dequantize"] = list(given)
    spec = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:100] or "model",
        "model": model,
        "quantization": {**_bits(file, given), "group_size": BLOCK, "expert_group_axis": "in"},
        "targets": ["xnnpack"],
    }
    held = ", ".join(f"{count} {kind}" for kind, count in Counter(t.type for t in file.tensors.values()).most_common())
    about = "" if "context" not in model else f"; its context of {length} is bounded"
    head = f"# From {shown(path.resolve().name)}: {held}{about}.\n"
    return head + yaml.dump(spec, sort_keys=False, width=110, default_flow_style=None)


def _bits(file: GgufFile, dequantize: tuple[str, ...]) -> dict[str, str]:
    """`weights` and the overrides of a spec's quantization."""
    by_role: dict[str, list[GgufTensor]] = {}
    for tensor in file.tensors.values():
        role = role_of(tensor.name)
        if role is not None:
            by_role.setdefault("expert" if role == "shared" else role, []).append(tensor)  # stored alike, one operator
    has_codes = any(t.type in CARRIED and t.type not in dequantize for ts in by_role.values() for t in ts)
    stored = {role: _weights_of(tensors, dequantize, has_codes) for role, tensors in by_role.items()}
    if not stored:
        return {"weights": "int4"}
    sizes: Counter[str] = Counter()
    for role, tensors in by_role.items():
        sizes[stored[role]] += sum(math.prod(t.shape) for t in tensors)
    usual = sizes.most_common(1)[0][0]
    found = {"weights": usual}
    for role, value in sorted(stored.items()):
        if value == usual:
            continue
        found[_KEYS.get(role, role)] = value
        if role == "expert" and any(role_of(t.name) == "shared" for t in by_role[role]):
            found["shared"] = value
    if "embedding" in found and "head" in stored and "head" not in found:
        found["head"] = stored["head"]  # it would follow the embedding
    return found


def _weights_of(tensors: list[GgufTensor], dequantize: tuple[str, ...], has_codes: bool) -> str:
    """The type that holds all codes of a role: their own where they are alike, else INT8, which holds all of them."""
    carried = {str(CARRIED[t.type].grid) for t in tensors if t.type in CARRIED and t.type not in dequantize}
    if carried:
        return carried.pop() if len(carried) == 1 else "int8"
    if all(t.type in FLOATS for t in tensors):
        return "int8" if has_codes else "int4"
    total = sum(math.prod(t.shape) for t in tensors)
    wide = sum(bits_per_weight(t.type) * math.prod(t.shape) for t in tensors) >= _WIDE * total
    return "int8" if wide else "int4"


def types_of(file: GgufFile) -> Mapping[str, int]:
    """How many tensors of each type a file holds, the most frequent first."""
    return dict(Counter(tensor.type for tensor in file.tensors.values()).most_common())
