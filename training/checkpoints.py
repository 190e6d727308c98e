"""Weights into and out of a trained model: initial values, checkpoints read, checkpoints in the released layout."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from moec.checkpoints import WeightStore, open_store
from moec.checkpoints.config_json import GROUP_SIZE, config_to_json
from moec.checkpoints.folder import CONFIG
from moec.checkpoints.safetensors_file import TYPES, SafetensorsWriter
from moec.checkpoints.store import PACKED_ROLES, stored_tensors
from moec.compiler.errors import CompileError
from moec.compiler.program import Role
from moec.compiler.quant import QuantizedTensor
from moec.compiler.replacing import replacing
from moec.compiler.source import TOKENIZER
from moec.compiler.spec.quantization import Quantization
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import WeightInfo, weight_layout
from moec.training.chat_template import TEMPLATE
from moec.training.model import TrainingDecoder
from moec.training.rounding import Rounding

_STD = 0.02  # of initial weights, as GPT-2 and its successors use it


def initial_weights(config: DecoderConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name, float32: the same for a seed in any number of processes.

    Gaussian of standard deviation 0.02; what writes into the residual stream (`o_proj`, `down_proj`) is divided by
    sqrt(2 * layers), so that the stream keeps its size at any depth (Radford et al. 2019). Norms 1, selection bias 0.
    """
    for info in weight_layout(config).values():
        yield info.name, _initial(info, config, seed)


def _initial(info: WeightInfo, config: DecoderConfig, seed: int) -> Tensor:
    if info.role is Role.NORM:
        return torch.ones(info.shape)
    if info.name.endswith(".expert_bias"):
        return torch.zeros(info.shape)
    writes = info.name.endswith((".o_proj.weight", ".down_proj.weight", ".down_proj"))
    std = _STD / math.sqrt(2 * config.layers) if writes else _STD
    digest = hashlib.sha256(f"{seed}:{info.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randn(info.shape, generator=generator).mul_(std)


def stored_weights(folder: str | Path, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a checkpoint by name, float32 (INT4 codes dequantized). CheckpointError if it does not fit."""
    store = open_store(folder, config)
    for name in weight_layout(config):
        yield name, store[name].load()


@torch.no_grad()
def load_weights(model: TrainingDecoder, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy every weight by name; all of them must be given. Of a whole value a sharded tensor takes its share."""
    places: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = set(weight_layout(model.config))
    for name, value in weights:
        place = places[name]
        if isinstance(place, DTensor):  # cut here: every process has the whole value
            value = distribute_tensor(value.to(place.device), place.device_mesh, place.placements, src_data_rank=None)
        place.copy_(value)
        missing.discard(name)
    assert not missing, f"weights not given: {sorted(missing)[:3]}"


def load_model(folder: str | Path, config: DecoderConfig, rounding: Rounding | None = None) -> TrainingDecoder:
    """A checkpoint as a model in evaluation mode. With `rounding` it computes as QAT does on these weights."""
    model = TrainingDecoder(config, rounding)
    load_weights(model, stored_weights(folder, config))
    return model.eval()


def packing_faults(config: DecoderConfig, quantization: Quantization) -> list[str]:
    """Why the packed layout cannot hold a model rounded by `quantization`: lines for people, none if it can."""
    faults = []
    for role in PACKED_ROLES:
        if not any(info.role is role for info in weight_layout(config).values()):
            continue
        scheme = quantization.scheme(role)
        wanted = "out" if role is Role.EXPERT else "in"
        if scheme is None or (scheme.weights, scheme.group_size, scheme.axis) != ("int4", GROUP_SIZE, wanted):
            found = "fp32" if scheme is None else f"{scheme.weights}, groups of {scheme.group_size} along {scheme.axis}"
            faults.append(
                f"{role.value} is {found}, the packed layout holds int4, groups of {GROUP_SIZE} along {wanted}"
            )
    return faults


def write_checkpoint(
    out: Path,
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: Path | None,
    rounding: Rounding | None = None,
    others: WeightStore | None = None,
) -> None:
    """Write float32 `weights` (all names of the layout) as a checkpoint folder that replaces what stood at `out`.

    Each is asked for once, in the order of the layout, and not kept.

    others: `weights` has the routers alone, and all other tensors are copied from here, in their types and layout.

    BF16 with a float32 router matrix; with `rounding`, the packed INT4 layout with the codes that training computed
    with; with a `rounding.bits` other than 4 or with levels, which no packed layout holds, float32 values of those
    codes and scales.
    """
    packed = others.packed if others is not None else rounding is not None and rounding.is_int4
    layout = [part for info in weight_layout(config).values() for part in _parts(info, packed, rounding, others)]
    with replacing(out, kind="a checkpoint") as folder:
        (folder / CONFIG).write_text(json.dumps(config_to_json(config, packed=packed), indent=2) + "\n", "utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER)
            if (tokenizer.parent / TEMPLATE).is_file():  # of the model that the tokenizer is of
                shutil.copyfile(tokenizer.parent / TEMPLATE, folder / TEMPLATE)
        with SafetensorsWriter(folder / "model.safetensors", layout) as writer:
            for info in weight_layout(config).values():
                if others is not None and info.role is not Role.ROUTER:
                    for name, _, _ in _parts(info, packed, rounding, others):
                        writer.write(name, [others.entries[name].tensor()])
                    continue
                for name, value in _values(info, weights[info.name].detach().cpu(), packed, rounding, others):
                    writer.write(name, [value])


def _parts(
    info: WeightInfo, packed: bool, rounding: Rounding | None, others: WeightStore | None
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    if others is not None:
        # of a router matrix float32, whatever the checkpoint had
        return [
            (name, dtype if info.role is Role.ROUTER and len(shape) == 2 else TYPES[others.entries[name].dtype], shape)
            for name, dtype, shape in stored_tensors(info, packed=packed)
        ]
    if rounding is not None and not packed and info.role in PACKED_ROLES:
        return [(info.name, torch.float32, info.shape)]  # rounded values that no packed layout holds
    return stored_tensors(info, packed=packed)


def _values(
    info: WeightInfo, value: Tensor, packed: bool, rounding: Rounding | None, others: WeightStore | None
) -> Iterator[tuple[str, Tensor]]:
    rounds = rounding.weight(info.role) if rounding is not None else None
    parts = _parts(info, packed, rounding, others)
    if rounds is None or info.role not in PACKED_ROLES:
        yield parts[0][0], value.to(parts[0][1])
        return
    if not packed:
        yield parts[0][0], rounds(value).detach()
        return
    quantized: QuantizedTensor = rounds.quantized(value)
    if not torch.isfinite(quantized.scales).all():
        raise CompileError(f"{info.name} has weights that float16 scales cannot hold", remedy="lower the learning rate")
    yield parts[0][0], quantized.codes
    yield parts[1][0], quantized.scales
