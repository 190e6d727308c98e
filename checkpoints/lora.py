"""A LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors.

    W' = W + s * B A        A [r, K], B [N, r],  s = alpha / r, or alpha / sqrt(r) with use_rslora
    W' = m * (W + s * B A) / |W + s * B A|        DoRA: m [N], the norm of each row

Tables of embeddings have A [r, V] and B [D, r], and s * (B A)^T is added. A parameter with a matrix for each expert has
A [E * r, K], expert after expert, and B [N, r * E], where the experts of one rank lie side by side; which side of the
parameter K is, versions of PEFT took differently (`Adapter.first`). What changes the result otherwise is refused; what
only trains (dropout, initial values that leave the model as it is) is not read.

N outputs, K inputs, r rank, E experts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.checkpoints.config_json import read_json
from moec.checkpoints.folder import ADAPTER, listed
from moec.checkpoints.safetensors_file import FLOATS, Entry, finite, read_header, shown
from moec.compiler.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
_MOST_ALPHA = 1e30  # NaN, infinity and integers that no float holds are not below it
_PREFIX = "base_model.model."
_BASE = ".base_layer.weight"
_ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Settings with which the result is another one, unless they are off.
_OTHER = (
    "fan_in_fan_out", "lora_bias", "use_qalora", "layer_replication", "alora_invocation_tokens", "use_bdlora",
    "trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Initial values that change the weights of the model as well, so that A and B belong to others than those of the base.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Versions from which A has an expert's inputs, or its outputs; before, it had the first side of a parameter [E, a, b].
_OF_INPUTS, _OF_OUTPUTS = (0, 19, 1), (0, 19, 0)
_MERGE = "merge it: PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload().save_pretrained(OUT)"


@dataclass(frozen=True)
class Update:
    """The change of one module. rank: of each expert, where A holds several."""

    module: str
    a: Entry
    b: Entry
    magnitude: Entry | None
    rank: int
    scaling: float
    is_table: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix [N, K] that it changes, or of each of a stack; of a table [V, D]."""
        outputs, inputs = self.b.shape[0], self.a.shape[1]
        return (inputs, outputs) if self.is_table else (outputs, inputs)

    @property
    def stacked(self) -> int:
        """How many matrices it changes."""
        return self.a.shape[0] // self.rank

    def merged(self, weight: Tensor) -> Tensor:
        """float32 `weight` [N, K] after the update."""
        a_RK, b_NR = _read(self.a), _read(self.b)
        found = weight + (b_NR @ a_RK if not self.is_table else (b_NR @ a_RK).t()) * self.scaling
        if self.magnitude is None:
            return found
        m_N = _read(self.magnitude).reshape(-1)
        return found * (m_N / torch.linalg.vector_norm(found, dim=1))[:, None]

    def merged_stack(self, weight: Tensor, *, first: bool) -> Tensor:
        """float32 `weight` [E, N, K], or [E, K, N] if A reads its `first` side, after the update."""
        count = len(weight)
        a_ERK = _read(self.a).reshape(count, self.rank, -1)
        b_NRE = _read(self.b).reshape(-1, self.rank, count)
        found = weight.clone()
        for e in range(count):
            delta_NK = (b_NRE[..., e] @ a_ERK[e]) * self.scaling
            found[e] += delta_NK.t() if first else delta_NK
        return found


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: every tensor of its file belongs to one of the updates, or is the weight of the base model
    that PEFT saves beside an updated head or table (`bases`, by module). version: of the PEFT that saved it, () if it
    does not say."""

    folder: Path
    updates: tuple[Update, ...]
    bases: Mapping[str, Entry]
    version: tuple[int, ...] = ()

    def first(self, *, transposed: bool) -> set[bool]:
        """Whether the columns of A are the first side of a parameter [E, a, b] that has a matrix for each expert; both,
        where the file leaves it open. transposed: whether a is the inputs."""
        if not self.version:
            return {transposed, True}
        if self.version >= _OF_INPUTS:
            return {transposed}
        return {not transposed} if self.version >= _OF_OUTPUTS else {True}

    def digest(self) -> str:
        """SHA-256 of its two files."""
        found = hashlib.sha256()
        for name in (ADAPTER, WEIGHTS):
            with (self.folder / name).open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
        return found.hexdigest()

    def about(self) -> str:
        """One line about what is merged."""
        ranks = sorted({update.rank for update in self.updates})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"merged: adapter {shown(self.folder.name)}, {len(self.updates)} modules of {rank}"


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder. CheckpointError for what is no LoRA adapter, damaged, or not merged here."""
    config = _config(folder)
    entries = _entries(folder)
    parts: dict[str, dict[str, Entry]] = {}
    tables: set[str] = set()
    unread, bases = [], {}
    for name, entry in entries.items():
        if name.startswith(_PREFIX) and name.endswith(_BASE):
            bases[name.removeprefix(_PREFIX).removesuffix(_BASE)] = entry
            continue
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is None or not name.startswith(_PREFIX):
            unread.append(name)
            continue
        module = name.removeprefix(_PREFIX).removesuffix(end)
        parts.setdefault(module, {})[_ENDS[end]] = entry
        if "embedding" in end:
            tables.add(module)
    if unread:
        raise _refused(
            folder,
            f"holds {listed(unread)}, which are no LoRA matrices (whole weights, trained biases, another method)",
        )
    if not parts:
        raise _refused(folder, f"{WEIGHTS} holds no tensors")
    updates = (_update(folder, config, module, held, module in tables) for module, held in sorted(parts.items()))
    return Adapter(folder, tuple(updates), bases, _version(config.get("peft_version")))


def _version(given: Any) -> tuple[int, ...]:
    """The numbers that `0.19.1` or `0.20.0.dev0@unknown` begins with."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", given) if isinstance(given, str) else None
    return () if found is None else tuple(int(part or 0) for part in found.groups())


def _config(folder: Path) -> Mapping[str, Any]:
    if not (folder / ADAPTER).is_file():
        what = "no such folder of an adapter" if not folder.is_dir() else f"there is no {ADAPTER}"
        raise CheckpointError(what, place=str(folder), remedy=f"name a folder with {ADAPTER} and {WEIGHTS}")
    config = read_json(folder / ADAPTER)
    if config.get("peft_type") != "LORA":
        raise _refused(folder, f"is an adapter of type {shown(config.get('peft_type'))}, not LORA")
    for key in _OTHER:
        if config.get(key):
            raise _refused(folder, f"has {key} {shown(config[key])}, with which the merged weights are others")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise _refused(folder, f"was trained from init_lora_weights {shown(initial)}, which changed the base model")
    return config


def _entries(folder: Path) -> dict[str, Entry]:
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = "its weights are pickled (adapter_model.bin), which can run code when opened" if pickled else ""
        remedy = "save it again with safe_serialization=True" if pickled else "copy all files of the adapter"
        raise CheckpointError(what or f"there is no {WEIGHTS}", place=str(folder), remedy=remedy)
    return read_header(folder / WEIGHTS)


def _update(folder: Path, config: Mapping[str, Any], module: str, held: Mapping[str, Entry], table: bool) -> Update:
    lacking = [part for part in ("a", "b") if part not in held]
    if lacking:
        raise _refused(folder, f"{shown(module)} has no lora_{lacking[0].upper()}")
    a, b, magnitude = held["a"], held["b"], held.get("magnitude")
    for entry in held.values():
        if entry.dtype not in FLOATS or not all(entry.shape):
            raise _refused(folder, f"tensor {shown(entry.name)} is {entry.dtype} {list(entry.shape)}, no floats")
    if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0]:
        raise _refused(folder, f"{shown(module)} has matrices of {list(a.shape)} and {list(b.shape)}, which do not fit")
    rank = _for_module(folder, config, "rank_pattern", module, config.get("r", 8))
    alpha = _for_module(folder, config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if type(rank) is not int or rank < 1 or a.shape[0] % rank:
        raise _refused(
            folder, f"{shown(module)} has {a.shape[0]} rows in lora_A, which rank {shown(rank)} does not divide"
        )
    if type(alpha) not in (int, float) or not abs(alpha) < _MOST_ALPHA:
        raise _refused(folder, f"lora_alpha is {shown(alpha)}")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    found = Update(module, a, b, magnitude, rank, float(scaling), table)
    if magnitude is not None and (
        table or found.stacked > 1 or magnitude.shape not in ((b.shape[0],), (b.shape[0], 1))
    ):
        raise _refused(folder, f"{shown(magnitude.name)} is {list(magnitude.shape)}, DoRA of rows has [{b.shape[0]}]")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise _refused(folder, f"use_dora and the tensors of {shown(module)} contradict each other")
    return found


def _for_module(folder: Path, config: Mapping[str, Any], key: str, module: str, usual: Any) -> Any:
    """What a pattern of names says of a module, as PEFT matches them: the end of its name."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise _refused(folder, f"{key} is {shown(patterns)}, no mapping")
    for pattern, value in patterns.items():
        if not re.fullmatch(r"[\w.^$-]+", pattern):
            raise _refused(folder, f"{key} has {shown(pattern)}; only names are read, no regular expressions")
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


def _read(entry: Entry) -> Tensor:
    return finite(entry.tensor().to(torch.float32), entry.name, str(entry.file))


def _refused(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(what, place=str(folder), remedy=_MERGE)


def base_names(module: str) -> Iterator[str]:
    """Names that a module may have in the model: PEFT wraps parameters of one module in each other."""
    yield module
    stripped = re.sub(r"\.base_layer(?=\.|$)", "", module)
    if stripped != module:
        yield stripped
