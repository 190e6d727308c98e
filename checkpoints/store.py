"""A checkpoint folder as lazy weights: every tensor mapped and converted only when asked for.

Two layouts are read, both as released for MobileMoE: float tensors named as in `sources/decoder`, and INT4 codes with
float16 scales (`X.weight` becomes `X.qweight` and `X.weight_scale`). Everything that can be checked without reading the
weights is checked when the folder is opened, and all faults are reported together.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.checkpoints.config_json import (
    GROUP_SIZE,
    ConfigFaults,
    config_from_json,
    contradictions,
    is_packed,
    read_json,
)
from moec.checkpoints.folder import CONFIG, FAULTS_SHOWN, foreign_folder, read_tensors, shortened
from moec.checkpoints.safetensors_file import Entry, finite, shown
from moec.compiler.errors import CheckpointError
from moec.compiler.program import LazyWeight, Role
from moec.compiler.quant import QuantizedTensor
from moec.compiler.source import Checkpoint, NamedWeights
from moec.compiler.weights import CodeFormat, Provenance, StoredCodes
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import WeightInfo, weight_layout

PACKED_ROLES = (Role.EMBEDDING, Role.HEAD, Role.ATTENTION, Role.FFN, Role.EXPERT, Role.SHARED)
PACKED = "packed INT4 checkpoint"  # the provenance of its codes
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Expected:
    """A tensor that a checkpoint of some model should hold: `part` of the weight `weight`."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    weight: WeightInfo
    part: str  # value | codes | scales

    def __str__(self) -> str:
        return f"{' or '.join(self.dtypes)} {list(self.shape)}"


def packed_names(name: str) -> tuple[str, str]:
    """The released names of the codes and scales of a weight."""
    stem, _, last = name.rpartition(".")
    if last == "weight":
        return f"{stem}.qweight", f"{stem}.weight_scale"
    short = last.removesuffix("_proj")  # stacked experts: gate_up_proj, down_proj
    return f"{stem}.{short}_qweight", f"{stem}.{short}_scale"


def stored_tensors(info: WeightInfo, *, packed: bool) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """The tensors that a weight is written as: (name, type, shape) of its codes and scales, or of its BF16 values.

    A router matrix is float32 in either layout; only the roles that the packed layout packs have codes.
    """
    if packed and info.role in PACKED_ROLES:
        codes, scales = packed_names(info.name)
        lead, width = info.shape[:-1], info.shape[-1]
        return [(codes, torch.uint8, (*lead, width // 2)), (scales, torch.float16, (*lead, width // GROUP_SIZE))]
    is_router_matrix = info.role is Role.ROUTER and len(info.shape) == 2
    return [(info.name, torch.float32 if is_router_matrix else torch.bfloat16, info.shape)]


def expected_tensors(config: DecoderConfig, *, packed: bool) -> dict[str, Expected]:
    """What a checkpoint of `config` holds, by stored name, in the order of the model."""
    found: list[Expected] = []
    for info in weight_layout(config).values():
        if not packed or info.role not in PACKED_ROLES:
            # the router is float32 in packed checkpoints, and may be in others
            found.append(Expected(info.name, _FLOATS, info.shape, info, "value"))
            continue
        (codes, _, codes_shape), (scales, _, scales_shape) = stored_tensors(info, packed=True)
        found.append(Expected(codes, ("U8",), codes_shape, info, "codes"))
        found.append(Expected(scales, ("F16",), scales_shape, info, "scales"))
    return {expected.name: expected for expected in found}


class WeightStore(Checkpoint):
    """The weights of a checked checkpoint. Open one with `open_store`.

    weights: model weight name -> LazyWeight (float32, logical shape). `load()` reads and dequantizes; `stored` has,
    where the checkpoint is packed, its codes and scales as views of the file. notes: files and
    tensors of the folder that are not read.
    """

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        *,
        packed: bool,
        entries: Mapping[str, Entry],
        raw_config: Mapping[str, Any],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.config = config
        self.packed = packed
        self.entries = entries
        self.raw_config = raw_config
        self.notes = notes
        self.weights: Mapping[str, LazyWeight] = {
            name: self._lazy(info) for name, info in weight_layout(config).items()
        }

    def __getitem__(self, name: str) -> LazyWeight:
        return self.weights[name]

    def weight(self, name: str, shape: tuple[int, ...]) -> LazyWeight:
        return NamedWeights(self.weights).weight(name, shape)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.entries.values())

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and places of the tensors; the weights themselves are not read."""
        text = "\n".join(
            f"{e.name} {e.dtype} {list(e.shape)} {e.file.name} {e.begin} {e.end}"
            for e in sorted(self.entries.values(), key=lambda e: e.name)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _lazy(self, info: WeightInfo) -> LazyWeight:
        if not self.packed or info.role not in PACKED_ROLES:
            return LazyWeight(info.shape, torch.float32, _float_loader(self.entries[info.name]))
        codes, scales = (self.entries[name] for name in packed_names(info.name))

        def stored() -> QuantizedTensor:
            return QuantizedTensor(codes.tensor(), scales.tensor(), bits=4, group_size=GROUP_SIZE)

        codes_held = StoredCodes(CodeFormat(4, GROUP_SIZE), stored, Provenance("carried", PACKED))
        return LazyWeight(info.shape, torch.float32, lambda: stored().dequantize(), codes_held)


def _float_loader(entry: Entry) -> Callable[[], torch.Tensor]:
    return lambda: finite(entry.tensor().to(torch.float32), entry.name, str(entry.file))


def open_store(folder: str | Path, config: DecoderConfig) -> WeightStore:
    """Open a checkpoint and check it against `config`. CheckpointError with one line per fault (the first ten)."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a checkpoint folder" if folder.exists() else "no such checkpoint folder"
        raise CheckpointError(what, place=str(folder), remedy="name the folder with config.json and *.safetensors")
    foreign = foreign_folder(folder)
    if foreign is not None:
        raise foreign
    faults: list[str] = []
    raw, packed = _read_config(folder, config, faults)
    stored = read_tensors(folder, faults)
    entries = stored.entries
    if not faults:
        faults += tensor_faults(folder, entries, config, packed=packed)
    if not faults and packed:
        faults += list(_scale_faults(entries, config))
    if faults:
        raise CheckpointError(shortened(faults))
    return WeightStore(folder, config, packed=packed, entries=entries, raw_config=raw, notes=stored.ignored)


def _read_config(folder: Path, config: DecoderConfig, faults: list[str]) -> tuple[dict[str, Any], bool]:
    """config.json and whether the weights are packed; what is wrong is added to `faults`."""
    file = folder / CONFIG
    try:
        raw = read_json(file)
    except CheckpointError as error:
        faults.append(str(error))
        return {}, False
    packed = False
    try:
        packed = is_packed(raw, file)
    except ConfigFaults as error:
        faults += [f"{file}: {line}" for line in error.lines]
    try:
        theirs = config_from_json(raw, file)
    except ConfigFaults as error:
        faults += [f"{file}: {line}" for line in error.lines]
        return raw, packed
    remedy = "correct the spec, or write one with `moec checkpoint spec`"
    faults += [f"{file}: {line}; {remedy}" for line in contradictions(theirs, config)]
    return raw, packed


def tensor_faults(folder: Path, entries: Mapping[str, Entry], config: DecoderConfig, *, packed: bool) -> list[str]:
    """What is missing, unexpected, or of a wrong shape or type. Lines with place and remedy."""
    if packed and (odd := _unpackable(config)):
        return [f"{folder / CONFIG}: {odd} are not a multiple of the packed group size {GROUP_SIZE}"]
    expected = expected_tensors(config, packed=packed)
    wrong_layout = _other_layout(folder, entries, packed=packed)
    if wrong_layout:
        return [wrong_layout]
    unexpected = [name for name in entries if name not in expected]
    faults: list[str] = []
    for name, wanted in expected.items():
        entry = entries.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, unexpected, n=1, cutoff=0.8) if len(faults) < FAULTS_SHOWN else []
            hint = f" (it holds {shown(near[0])})" if near else ""
            faults.append(f"{folder}: tensor {name} is missing, expected {wanted}{hint}; use a complete checkpoint")
        elif entry.shape != wanted.shape:
            faults.append(
                f"{entry.file}: tensor {name} is {list(entry.shape)}, expected {list(wanted.shape)}; "
                "use the checkpoint that fits the spec"
            )
        elif entry.dtype not in wanted.dtypes:
            faults.append(
                f"{entry.file}: tensor {name} is {entry.dtype}, expected {' or '.join(wanted.dtypes)}; "
                "use a checkpoint of the released layout"
            )
    remedy = "correct the spec if the model has it, else remove it from the checkpoint"
    faults += [f"{entries[name].file}: tensor {shown(name)} is not part of the model; {remedy}" for name in unexpected]
    return faults


def _unpackable(config: DecoderConfig) -> str | None:
    for info in weight_layout(config).values():
        if info.role in PACKED_ROLES and info.shape[-1] % GROUP_SIZE:
            return f"the {info.shape[-1]} columns of {info.name}"
    return None


def _other_layout(folder: Path, entries: Mapping[str, Entry], *, packed: bool) -> str | None:
    """One line instead of hundreds when config.json names one layout and the tensors are in the other."""
    weight = "model.embed_tokens.weight"
    codes, _ = packed_names(weight)
    if packed and weight in entries and codes not in entries:
        return (
            f"{folder / CONFIG}: says the weights are packed INT4, but {weight} is float; remove `quantization` from it"
        )
    if not packed and codes in entries and weight not in entries:
        return f"{folder / CONFIG}: has no `quantization`, but weights are packed INT4; copy the checkpoint's own one"
    return None


def _scale_faults(entries: Mapping[str, Entry], config: DecoderConfig) -> Iterator[str]:
    """Scales that are NaN or infinite: cheap to find (one value in 32), and they would poison every output."""
    for name in _scale_names(config):
        bits = entries[name].tensor().view(torch.int16).numpy()
        if bits.size and bool(np.any((bits & 0x7C00) == 0x7C00)):
            yield f"{entries[name].file}: tensor {name} holds scales that are not finite; download the file again"


def _scale_names(config: DecoderConfig) -> Iterable[str]:
    return (name for name, e in expected_tensors(config, packed=True).items() if e.part == "scales")
