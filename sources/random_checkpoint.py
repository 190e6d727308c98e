"""A random checkpoint of a transformers config, for trying a model without having its weights.

    python -m moec.sources.random_checkpoint FOLDER --out DIR [--seed N] [--set key=value ...]

FOLDER holds config.json; `--set` changes keys of it (JSON values, dots reach into nested sections). Weights are
adversarial: biases and norms are not neutral, selection biases not zero, so that nothing a wrong rewrite drops goes
unnoticed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moec.compiler.errors import UserError

SPREAD = 0.15  # standard deviation of every weight: logits of order one at widths below a hundred
SELECTION_SPREAD = 0.2  # of the bias that only shifts which experts are chosen; scores lie between 0 and 1


def save_random(
    folder: Path,
    out: Path,
    *,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    spread: float = SPREAD,
    table_spread: float | None = None,
) -> Path:
    """Write config.json and safetensors of the model in `folder` (or its config.json) with random weights to `out`.

    `spread`: their standard deviation; with inputs^-0.5 a layer amplifies neither its input nor its rounding.
    `table_spread`: that of tables of embeddings, default `spread`; where it is much larger, tokens stay apart through
    all layers and reach all experts, as those of a trained model do.

    MissingExtra without transformers; CheckpointError or CompileError for a config that it does not know.
    """
    from moec.sources.transformers_config import read_config
    from moec.sources.transformers_model import random_model

    config = read_config(folder)
    for key, value in (changes or {}).items():
        owner, names = config, key.split(".")
        for name in names[:-1]:
            owner = getattr(owner, name)
        if not hasattr(owner, names[-1]):
            raise UserError(f"the config has no key {key}", place=str(folder), remedy="name one that config.json holds")
        setattr(owner, names[-1], value)
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
                buffer.copy_(torch.randn_like(buffer) * SELECTION_SPREAD)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Random weights for a transformers config.")
    parser.add_argument("folder", type=Path, help="a folder that holds config.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
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
        save_random(given.folder, given.out, seed=given.seed, changes=changes)
    except UserError as error:
        parser.exit(2, f"{error.line()}\n")


if __name__ == "__main__":
    main()
