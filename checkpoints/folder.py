"""Which tensors a checkpoint folder holds, in which file each is read, and which files are ignored.

model.safetensors.index.json decides: it names a file for every tensor. Without it model.safetensors does; without that
the only *.safetensors file. Anything else (left-over shards, averaged weights, optimizer states) is not read, and is
reported as ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.checkpoints.config_json import read_json
from moec.checkpoints.safetensors_file import Entry, read_header, shown
from moec.compiler.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF = ".gguf"
ADAPTER = "adapter_config.json"
FAULTS_SHOWN = 10
_NAMED = 3  # how many of many are named in a message


@dataclass(frozen=True)
class Stored:
    """`entries`: the tensors by stored name. `ignored`: a line about each file or tensor that no authority names."""

    entries: Mapping[str, Entry]
    ignored: tuple[str, ...] = ()


def read_tensors(folder: Path, faults: list[str]) -> Stored:
    """The tensors of the folder's safetensors file(s); what is wrong with them is added to `faults`."""
    found = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if index.exists():
        return _indexed(folder, index, found, faults)
    whole = folder / WEIGHTS
    if whole not in found and len(found) != 1:
        what = "no *.safetensors file" if not found else f"{len(found)} safetensors files and no {INDEX}"
        faults.append(f"{folder}: {what}; copy all files of the checkpoint into this folder")
        return Stored({})
    chosen = whole if whole in found else found[0]
    others = [f.name for f in found if f != chosen]
    ignored = (f"ignored: {listed(others)}, beside {chosen.name}",) if others else ()
    return Stored(_header(chosen, faults), ignored)


def shortened(faults: list[str]) -> str:
    """The first faults and how many more there are."""
    more = len(faults) - FAULTS_SHOWN
    return "\n".join(faults[:FAULTS_SHOWN] + ([f"... and {more} more faults"] if more > 0 else []))


def listed(names: list[str], limit: int = _NAMED) -> str:
    """The first names and how many more there are; fit for a message whatever they hold."""
    text = ", ".join(shown(n) for n in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def _header(file: Path, faults: list[str]) -> dict[str, Entry]:
    try:
        return read_header(file)
    except CheckpointError as error:
        faults += str(error).splitlines()
        return {}


def _indexed(folder: Path, index: Path, found: list[Path], faults: list[str]) -> Stored:
    where = _weight_map(index, faults)
    entries: dict[str, Entry] = {}
    unnamed: list[str] = []
    for name in sorted(set(where.values())):
        file = folder / name
        # an index is input: it may not point outside its folder
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            faults.append(f"{index}: names {shown(name)}, which is not a file of this folder; copy it again")
            continue
        if not file.is_file():
            faults.append(f"{file}: missing, {INDEX} names it; copy all files of the checkpoint")
            continue
        before = len(faults)
        held = _header(file, faults)
        if len(faults) > before:
            continue
        wanted = [tensor for tensor, owner in where.items() if owner == name]
        lacking = sorted(tensor for tensor in wanted if tensor not in held)
        if lacking:
            what = f"lacks {listed(lacking)}, which {INDEX} names"
            faults.append(f"{file}: {what}; copy all files of the checkpoint again")
        entries |= {tensor: held[tensor] for tensor in wanted if tensor in held}
        unnamed += [f"{tensor} of {name}" for tensor in sorted(held) if where.get(tensor) != name]
    others = [f.name for f in found if f.name not in set(where.values())]
    ignored = []
    if others and where:
        ignored.append(f"ignored: {listed(others)}, which {INDEX} does not name")
    if unnamed:
        ignored.append(f"ignored: {listed(unnamed)}, which {INDEX} does not name there")
    return Stored(entries, tuple(ignored))


def _weight_map(index: Path, faults: list[str]) -> dict[str, str]:
    try:
        where = read_json(index).get("weight_map")
    except CheckpointError as error:
        faults.append(str(error))
        return {}
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        faults.append(f"{index}: has no mapping weight_map; copy it again from where the checkpoint comes from")
        return {}
    return where


def require_checkpoint(folder: Path) -> None:
    """CheckpointError for what is no folder, or a folder of something else that is known."""
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint folder", place=str(folder), remedy="name a folder with config.json")
    foreign = foreign_folder(folder)
    if foreign is not None:
        raise foreign


def foreign_folder(folder: Path) -> CheckpointError | None:
    """Why `folder` cannot be read as a checkpoint, if it is something else that is known; None otherwise.

    Known: a LoRA adapter alone or beside weights (whose numbers would be left out), pickled weights, GGUF files.
    """
    if not folder.is_dir():
        return None
    if (folder / ADAPTER).is_file() or (folder / "adapter_model.safetensors").is_file():
        return _adapter(folder)
    if any(folder.glob("*.safetensors")):
        return None
    pickled = sorted(f.name for kind in ("*.bin", "*.pth", "*.pt", "*.ckpt") for f in folder.glob(kind))
    pickled = [name for name in pickled if name != "training_args.bin"]
    if pickled:
        return CheckpointError(
            f"there are no safetensors files, only pickled weights ({listed(pickled)}), which can run code when opened",
            place=str(folder),
            remedy="if you trust them, convert: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)",
        )
    gguf = sorted(f.name for f in folder.glob("*.gguf"))
    if gguf:
        return CheckpointError(
            f"there are no safetensors files, only GGUF ({listed(gguf)})",
            place=str(folder),
            remedy="name the file itself: `moec compile FILE.gguf`, or in a spec `model: {gguf: FILE}`",
        )
    return None


def gguf_refused(file: Path) -> CheckpointError:
    """The error for a GGUF file where a folder of transformers is expected."""
    return CheckpointError(
        "is a GGUF file, not a folder of transformers",
        place=str(file),
        remedy="compile it by itself (`moec compile FILE.gguf`), or write `model: {gguf: FILE}`",
    )


def _adapter(folder: Path) -> CheckpointError:
    raw: dict[str, Any] = {}
    if (folder / ADAPTER).is_file():
        raw = read_json(folder / ADAPTER)
    kind, base = raw.get("peft_type"), raw.get("base_model_name_or_path")
    kind = "LoRA" if kind in (None, "LORA") else shown(kind)
    of = f" of {shown(base)}" if isinstance(base, str) else ""
    beside = any(f.name != "adapter_model.safetensors" for f in folder.glob("*.safetensors"))
    what = f"holds a {kind} adapter{of} beside the weights" if beside else f"holds a {kind} adapter{of}, no whole model"
    remedy = "merge it: PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload().save_pretrained(OUT)"
    if kind == "LoRA":
        remedy = "write `model: {transformers: BASE, adapters: [FOLDER]}`, or " + remedy
    if beside:
        remedy += f"; or move {ADAPTER} and its weights away to compile the model without it"
    return CheckpointError(what, place=str(folder), remedy=remedy)
