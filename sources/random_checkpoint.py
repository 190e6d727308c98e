"""A random checkpoint of a transformers config, for trying a model without having its weights.

    python -m moec.sources.random_checkpoint FOLDER --out DIR [--seed N] [--set key=value ...] [--stream]

FOLDER holds config.json; `--set` changes keys of it (JSON values, dots reach into nested sections). Weights are
adversarial: biases and norms are not neutral, selection biases not zero, so that nothing a wrong rewrite drops goes
unnoticed.

With `--stream` they are what transformers initialises a model with, in bfloat16, and no more than one module is in
memory, for models of gigabytes whose speed is of interest: zero mean, norms without effect, so that signals stay of
order one and tokens spread over the experts. Experts of a config whose `quantization_config` is mxfp4 are random codes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.checkpoints.safetensors_file import SafetensorsWriter
from moec.compiler.errors import UserError
from moec.compiler.progress import Progress

SPREAD = 0.15  # standard deviation of every weight: logits of order one at widths below a hundred
SELECTION_SPREAD = 0.2  # of the bias that only shifts which experts are chosen; scores lie between 0 and 1
_MXFP4_GROUP = 32
_MXFP4_SCALE = 120  # 2^(120 - 127): codes that are drawn uniformly stand for numbers of standard deviation 0.023


def save_random(
    folder: Path,
    out: Path,
    *,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    spread: float = SPREAD,
    table_spread: float | None = None,
    selection_spread: float = SELECTION_SPREAD,
) -> Path:
    """Write config.json and safetensors of the model in `folder` (or its config.json) with random weights to `out`.

    `spread`: their standard deviation; with inputs^-0.5 a layer amplifies neither its input nor its rounding.
    `table_spread`: that of tables of embeddings, default `spread`; where it is much larger, tokens stay apart through
    all layers and reach all experts, as those of a trained model do.
    `selection_spread`: that of biases which only shift which experts are chosen; a score is at most 1, so that a large
    one keeps some experts from ever being chosen.

    MissingExtra without transformers; CheckpointError or CompileError for a config that it does not know.
    """
    from moec.sources.transformers_model import random_model

    config = _changed_config(folder, changes or {})
    torch.manual_seed(seed)
    model = random_model(config, folder)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and parameter.dim() == 1 and not name.endswith("bias") else 0.0
            deviation = spread if table_spread is None or id(parameter) not in tables else table_spread
            parameter.copy_(torch.randn_like(parameter) * deviation + centre)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.randn_like(buffer) * selection_spread)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    return out


def _changed_config(folder: Path, changes: Mapping[str, Any]) -> Any:
    """The config of `folder` with `changes`; UserError for a key that it does not have."""
    from moec.sources.transformers_config import read_config

    config = read_config(folder)
    for key, value in changes.items():
        owner, names = config, key.split(".")
        for name in names[:-1]:
            owner = getattr(owner, name)
        if not hasattr(owner, names[-1]):
            raise UserError(f"the config has no key {key}", place=str(folder), remedy="name one that config.json holds")
        setattr(owner, names[-1], value)
    return config


def stream_random(
    folder: Path,
    out: Path,
    *,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write config.json and one safetensors file of the model in `folder`, as transformers initialises it, to `out`.

    bfloat16, or MXFP4 codes for the experts where the config says so; at most one module's weights are in memory.
    Errors as those of `save_random`.
    """
    from moec.sources.transformers_config import build_model

    config = _changed_config(folder, changes or {})
    with torch.device("meta"):
        model = build_model(config, folder).to(torch.bfloat16)
    torch.manual_seed(seed)
    coded = _mxfp4(config)
    layout = [
        (stored, dtype, shape)
        for name, value in _tensors(model).items()
        for stored, dtype, shape in _stored(name, value, coded)
    ]
    out.mkdir(parents=True, exist_ok=True)
    part = out / "model.part"
    stage = (progress or Progress(quiet=True)).stage("random weights", len(layout))
    with stage as step, SafetensorsWriter(part, layout) as writer:
        for prefix, module in model.named_modules():
            for stored, pieces in _drawn(model, prefix, module, coded):
                writer.write(stored, pieces)
                step(stored)
    part.rename(out / "model.safetensors")
    source = folder if folder.is_file() else folder / "config.json"
    if changes:
        config.save_pretrained(out)
    elif source.resolve() != (out / "config.json").resolve():
        shutil.copyfile(source, out / "config.json")
    return out


def _mxfp4(config: Any) -> bool:
    given = getattr(config, "quantization_config", None)
    return isinstance(given, dict) and given.get("quant_method") == "mxfp4"


def _tensors(model: Any, prefix: str | None = None) -> dict[str, Tensor]:
    """What a checkpoint holds of `model`, or of the module `prefix` alone: parameters that are not tied to another,
    and buffers that are saved; in the order of modules."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    saved = model.state_dict(keep_vars=True)
    found = {}
    for owner, module in model.named_modules() if prefix is None else [(prefix, model.get_submodule(prefix))]:
        for own in (*module._parameters, *module._buffers):
            name = f"{owner}.{own}" if owner else own
            if name in saved and name not in tied:
                found[name] = saved[name]
    return found


def _is_coded(name: str, value: Tensor, coded: bool) -> bool:
    return coded and value.dim() == 3 and "experts" in name


def _stored(name: str, value: Tensor, coded: bool) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, type and shape of what the file holds of a tensor of the model."""
    if not _is_coded(name, value, coded):
        return [(name, value.dtype, tuple(value.shape))]
    experts, inputs, outputs = value.shape
    groups = (experts, outputs, inputs // _MXFP4_GROUP)
    return [(f"{name}_blocks", torch.uint8, (*groups, _MXFP4_GROUP // 2)), (f"{name}_scales", torch.uint8, groups)]


def _drawn(model: Any, prefix: str, module: torch.nn.Module, coded: bool) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """The tensors of one module as they are stored, and the pieces of each."""
    mine = _tensors(model, prefix)
    if not mine:
        return
    module.to_empty(device="cpu", recurse=False)
    with torch.no_grad():
        _initialise(model, module)
    for name, value in mine.items():
        if _is_coded(name, value, coded):
            blocks, scales = (shape for _, _, shape in _stored(name, value, coded))
            yield f"{name}_blocks", (torch.randint(256, blocks[1:], dtype=torch.uint8) for _ in range(blocks[0]))
            yield f"{name}_scales", iter([torch.full(scales, _MXFP4_SCALE, dtype=torch.uint8)])
        else:
            yield name, iter([getattr(module, name.rpartition(".")[2]).detach()])
    module.to_empty(device="meta", recurse=False)


def _initialise(model: Any, module: torch.nn.Module) -> None:
    """Matrices at random, around zero. Vectors as transformers has them: ones or zeros of a norm, decays, steps."""
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    own = {**module._parameters, **module._buffers}
    for name, value in own.items():
        if value is None:
            continue
        if value.dim() > 1 and "bias" not in name:
            value.normal_(0.0, spread)
        else:
            value.zero_()
    # a module's matrix may be its parent's to initialise, which transformers only does for both at once
    if any(value is not None and value.dim() == 1 for value in own.values()):
        model._init_weights(module)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Random weights for a transformers config.")
    parser.add_argument("folder", type=Path, help="a folder that holds config.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="as transformers initialises it, one module in memory")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config")
    given = parser.parse_args(arguments)
    changes = {}
    for text in given.set:
        key, _, value = text.partition("=")
        try:
            changes[key] = json.loads(value)
        except json.JSONDecodeError:
            changes[key] = value
    try:
        write = stream_random if given.stream else save_random
        write(given.folder, given.out, seed=given.seed, changes=changes)
    except UserError as error:
        parser.exit(2, f"{error.line()}\n")


if __name__ == "__main__":
    main()
