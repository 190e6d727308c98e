"""`moec checkpoint inspect`: what a checkpoint holds, and what does not fit a spec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from moec.checkpoints.config_json import PACKED_FORMAT, config_from_json, is_own, is_packed, read_json
from moec.checkpoints.folder import CONFIG, GGUF, foreign_folder, read_tensors
from moec.checkpoints.gguf_file import GgufFile, read_gguf
from moec.checkpoints.safetensors_file import Entry, shown
from moec.checkpoints.store import expected_tensors, open_store
from moec.compiler.errors import ArtifactError, CheckpointError, SpecError, UserError
from moec.compiler.source import TOKENIZER
from moec.compiler.tokenizer import load_tokenizer
from moec.sources.decoder.config import DecoderConfig, decoder_of
from moec.sources.decoder.layout import parameter_counts

if TYPE_CHECKING:
    from moec.compiler.spec.model import Spec


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class RoleSize(_Record):
    """The weights of one role: how many tensors are stored for them, how many parameters and bytes they are."""

    role: str
    tensors: int
    parameters: int
    bytes: int


class TokenizerInfo(_Record):
    """`vocab_size` counts special tokens; None if the file is no tokenizer."""

    vocab_size: int | None


class Inspection(_Record):
    """What `moec checkpoint inspect` says. `problems`: one line each, empty if the checkpoint is whole and fits."""

    folder: str
    files: tuple[str, ...]
    bytes: int
    tensors: int
    architecture: str | None
    layout: str
    dtypes: Mapping[str, int]
    parameters: Mapping[str, int]
    roles: tuple[RoleSize, ...]
    tokenizer: TokenizerInfo | None
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def inspect(folder: str | Path, spec: Spec | None = None) -> Inspection:
    """Look into `folder`, against the model of `spec` or, without one, of its own config.json.

    Reads headers and INT4 scales, not weights. CheckpointError only if there is no such folder.
    """
    folder = Path(folder)
    if folder.suffix == GGUF and folder.is_file():
        return _inspect_gguf(folder, spec)
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint folder", place=str(folder), remedy="name a folder with config.json")
    problems: list[str] = []
    foreign = foreign_folder(folder)
    if foreign is not None:
        problems.append(foreign.line())
    elif (folder / CONFIG).is_file() and not is_own(raw := _config(folder, problems)):
        return _inspect_transformers(folder, raw, spec)
    config, packed = _own_config(folder, problems)
    entries = read_tensors(folder, problems).entries
    wanted = config
    if spec is not None:
        try:
            wanted = decoder_of(spec, "compared with a checkpoint")
        except SpecError as error:
            problems.append(error.line())
    if not problems and wanted is not None:
        problems += _problems(folder, wanted)
    roles = _roles(entries, config, packed=packed) if config is not None else ()
    return Inspection(
        folder=str(folder),
        files=tuple(sorted({entry.file.name for entry in entries.values()})),
        bytes=sum(entry.bytes for entry in entries.values()),
        tensors=len(entries),
        architecture=config.architecture if config is not None else None,
        layout=_layout(entries, packed=packed),
        dtypes=_bytes_by_type(entries),
        parameters=parameter_counts(config) if config is not None else {},
        roles=roles,
        tokenizer=_tokenizer(folder),
        problems=tuple(problems),
    )


def _config(folder: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        return read_json(folder / CONFIG)
    except CheckpointError as error:
        problems.append(str(error))
        return {}


def _inspect_transformers(folder: Path, raw: Mapping[str, Any], spec: Spec | None) -> Inspection:
    """A model of transformers: what `moec compile` would refuse is a problem, and nothing else is."""
    from moec.sources.transformers_model import TransformersStore

    problems: list[str] = []
    parameters: dict[str, int] = {}
    try:
        store = TransformersStore(folder)
        store.check(folder if spec is None else getattr(spec.model, "transformers", folder))
        parameters = {"total": store.parameters()}
    except UserError as error:
        problems += str(error).splitlines()
    entries = read_tensors(folder, []).entries
    return Inspection(
        folder=str(folder),
        files=tuple(sorted({entry.file.name for entry in entries.values()})),
        bytes=sum(entry.bytes for entry in entries.values()),
        tensors=len(entries),
        architecture=f"{raw['model_type']} (transformers)",
        layout=_layout(entries, packed=False),
        dtypes=_bytes_by_type(entries),
        parameters=parameters,
        roles=(),
        tokenizer=_tokenizer(folder),
        problems=tuple(problems),
    )


def _inspect_gguf(file: Path, spec: Spec | None) -> Inspection:
    """A GGUF file: what `moec compile` would refuse is a problem, and nothing else is."""
    from moec.sources.gguf_model import open_gguf

    problems: list[str] = []
    found, parameters = GgufFile(file, {}, {}), 0
    try:
        found = read_gguf(file)
        model = None if spec is None else spec.model
        store = open_gguf(file, None if spec is None else spec.quantization, getattr(model, "dequantize", ()))
        store.companions()
        parameters = store.parameters()
    except UserError as error:
        problems += str(error).splitlines()
    sizes: dict[str, int] = {}
    for tensor in found.tensors.values():
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.end - tensor.begin
    tokens = found.metadata.get("tokenizer.ggml.tokens")
    return Inspection(
        folder=str(file),
        files=(file.name,),
        bytes=sum(sizes.values()),
        tensors=len(found.tensors),
        architecture=f"{shown(found.architecture)} (GGUF)" if found.architecture is not None else None,
        layout="GGUF",
        dtypes=dict(sorted(sizes.items(), key=lambda item: -item[1])),
        parameters={"total": parameters or sum(math.prod(t.shape) for t in found.tensors.values())},
        roles=(),
        tokenizer=TokenizerInfo(vocab_size=len(tokens)) if isinstance(tokens, list) else None,
        problems=tuple(problems),
    )


def _own_config(folder: Path, problems: list[str]) -> tuple[DecoderConfig | None, bool]:
    file = folder / CONFIG
    packed = False
    try:
        raw = read_json(file)
        packed = is_packed(raw, file)
        return config_from_json(raw, file), packed
    except CheckpointError as error:
        problems += str(error).splitlines()
        return None, packed


def _problems(folder: Path, config: DecoderConfig) -> list[str]:
    try:
        open_store(folder, config)
    except CheckpointError as error:
        return str(error).splitlines()
    return []


def _layout(entries: Mapping[str, Entry], *, packed: bool) -> str:
    if packed:
        return f"packed INT4 codes and float16 scales ({PACKED_FORMAT})"
    floats = sorted({e.dtype for e in entries.values()})
    return f"float ({', '.join(floats)})" if floats else "empty"


def _bytes_by_type(entries: Mapping[str, Entry]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in entries.values():
        found[entry.dtype] = found.get(entry.dtype, 0) + entry.bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _roles(entries: Mapping[str, Entry], config: DecoderConfig, *, packed: bool) -> tuple[RoleSize, ...]:
    found: dict[str, RoleSize] = {}
    for name, expected in expected_tensors(config, packed=packed).items():
        if name not in entries:
            continue
        role = expected.weight.role.value
        old = found.get(role, RoleSize(role=role, tensors=0, parameters=0, bytes=0))
        found[role] = RoleSize(
            role=role,
            tensors=old.tensors + 1,
            parameters=old.parameters + (0 if expected.part == "scales" else expected.weight.numel),
            bytes=old.bytes + entries[name].bytes,
        )
    return tuple(sorted(found.values(), key=lambda r: -r.bytes))


def _tokenizer(folder: Path) -> TokenizerInfo | None:
    file = folder / TOKENIZER
    if not file.is_file():
        return None
    try:
        tokenizer = load_tokenizer(file)
    except ArtifactError:
        return TokenizerInfo(vocab_size=None)
    tokenizer.close()
    return TokenizerInfo(vocab_size=tokenizer.vocab_size)
