"""Checks that the files of a checkpoint hold every tensor of the model; a missing or unknown one is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moec.checkpoints.folder import listed
from moec.checkpoints.quantized import is_plain, said_by_tensors
from moec.checkpoints.safetensors_file import Entry, shown
from moec.compiler.errors import CheckpointError
from moec.sources.conversions import Conversions

# What another program put before or into every name -> what happened, and what to do.
_WRAPPED: tuple[tuple[str, str], ...] = (
    (
        r"\.lora_[AB]|lora_embedding|\.base_layer\.|^base_model\.model\.",
        "an unmerged PEFT model: save it again after merge_and_unload()",
    ),
    (r"^_orig_mod\.", "a module of torch.compile was saved: save the one inside, or take `_orig_mod.` off the names"),
    (r"^module\.", "a data-parallel wrapper was saved: save its `.module`, or take `module.` off the names"),
    (r"^(language_model|model\.language_model|text_model)\.", "a part of a larger model: give its own config.json"),
)
# Scales of a quantized KV cache: ours has its own, found anew at every token.
_CACHE_SCALE = re.compile(r"\.(k|v|kv|q|prob)_scale$|\.(k|v)_zero_point$")
_USE = "give the BF16, F16 or F32 checkpoint that it was made from"


def check_tensors(
    folder: Path, entries: Mapping[str, Entry], model: Conversions, format_name: str | None
) -> tuple[str, ...]:
    """Lines about stored tensors that the model does not have and that do not matter. Nothing is read.

    `format_name`: the quantization that config.json speaks of. CheckpointError otherwise: codes where weights belong,
    tensors that the files lack, tensors of another shape, and tensors of one of the model's layers that it does not
    know (a bias, an adapter, a scale), without which the layer would compute something else.
    """
    missing = [name for name in model.names if not model.sources(name)]
    gaps = [lacking for name in model.names for lacking in model.gaps(name)]
    codes = [entries[s] for name in model.names for s in model.sources(name) if not is_plain(entries[s])]
    inside = list(_inside_layers(model))
    shown_by = said_by_tensors(entries, model.names) if missing or codes or inside else None
    if format_name is not None or (shown_by is not None and not _is_wrapped(model.unread)):
        raise _quantized(folder, format_name, shown_by, bool(missing or codes or inside))
    if codes:
        what = f"tensor {shown(codes[0].name)} is {codes[0].dtype}: codes, no weights, and nothing says of which format"
        raise CheckpointError(what, place=str(folder), remedy=_USE)
    lacking = [*missing, *gaps]
    if lacking:
        raise _incomplete(folder, lacking, model.unread)
    if inside:
        what = f"the files hold {listed(inside)}, which the model of config.json does not have there"
        why = _wrapping(inside) or "use the config.json that belongs to these files"
        raise CheckpointError(what, place=str(folder), remedy=why)
    for name, shape in model.names.items():
        stored = entries[model.sources(name)[0]]
        if model.is_whole(name) and stored.shape != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(stored.shape)}, the model needs {list(shape)}",
                place=str(folder),
                remedy="use the config.json that belongs to these files",
            )
    unread = [key for key in model.unread if not _CACHE_SCALE.search(key)]
    scales = [key for key in model.unread if _CACHE_SCALE.search(key)]
    lines = []
    if unread:
        lines.append(f"not read: {listed(unread)}, which the model of config.json does not have")
    if scales:
        lines.append(f"not read: {listed(scales)}, scales of a quantized KV cache")
    return tuple(lines)


def _inside_layers(model: Conversions) -> Iterator[str]:
    """Stored tensors that belong to one of the model's layers (a linear, a norm, an embedding) and that it lacks."""
    for key, name in model.unread.items():
        if _CACHE_SCALE.search(key):
            continue
        path = name
        while "." in path:
            path = path.rpartition(".")[0]
            if path in model.layers:
                yield key
                break


def _is_wrapped(names: Iterable[str]) -> bool:
    return _wrapping(names) is not None


def _wrapping(names: Iterable[str]) -> str | None:
    listed_names = list(names)
    for pattern, why in _WRAPPED:
        if any(re.search(pattern, name) for name in listed_names):
            return why
    return None


def _incomplete(folder: Path, lacking: list[str], unread: Mapping[str, str]) -> CheckpointError:
    many = f"{len(lacking)} tensors of the model" if len(lacking) > 1 else "a tensor of the model"
    what = f"the files lack {many}: {listed(lacking)}"
    if unread:
        what += f" (they hold {listed(list(unread), 1)})"
    return CheckpointError(what, place=str(folder), remedy=_wrapping(unread) or "use a complete checkpoint")


def _quantized(
    folder: Path, by_config: str | None, by_tensors: tuple[str, str] | None, has_codes: bool
) -> CheckpointError:
    if by_config is not None and not has_codes:
        return CheckpointError(
            f"config.json has a quantization_config of {by_config}, but no tensor is stored so",
            place=str(folder),
            remedy="remove quantization_config from config.json if these are plain weights",
        )
    what = by_config if by_config is not None else by_tensors[0] if by_tensors is not None else ""
    seen = f" (tensor {shown(by_tensors[1])})" if by_tensors is not None else ""
    return CheckpointError(f"its weights are quantized: {what}{seen}", place=str(folder), remedy=_USE)
