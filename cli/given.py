"""The spec that a command's argument names: a YAML file, or a checkpoint folder or GGUF file that implies a spec."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.compiler.spec import Spec


def spec_given(path: Path, *, dequantize: str | None = None, quiet: bool = False) -> Spec:
    """The spec of a file, or the one that a checkpoint implies, which is printed to stderr unless `quiet`.

    `dequantize`: types of a GGUF file's tensors or formats of a folder's codes, separated by commas, whose values may
    be quantized again.

    Errors: SpecError; CheckpointError for what moec cannot read as a checkpoint; UserError for `dequantize` of a spec.
    """
    from moec.cli.output import say
    from moec.compiler.spec import load_spec
    from moec.compiler.spec.loader import parse_spec

    if not path.is_dir() and not _is_gguf(path):
        if dequantize is not None:
            remedy = "write it into the spec's `model:`"
            raise UserError("--dequantize is for a checkpoint, not for a spec", place=str(path), remedy=remedy)
        return load_spec(path)
    text = text_implied(path, dequantize)
    if not quiet:
        say(text, stream=sys.stderr)
    return parse_spec(text, file=str(path), folder=path if path.is_dir() else path.parent)


def text_implied(path: Path, dequantize: str | None = None) -> str:
    """YAML text of the spec that a checkpoint folder or a GGUF file implies; errors as `spec_given`."""
    from moec.checkpoints.spec_from_config import spec_from_config
    from moec.checkpoints.spec_from_gguf import spec_from_gguf, unknown_types

    kinds = [kind.strip() for kind in (dequantize or "").split(",") if kind.strip()]
    if not _is_gguf(path):
        return spec_from_config(path, kinds)
    for kind in unknown_types(kinds):
        raise UserError(f"--dequantize: {kind} is no quantized type of GGUF", remedy="name types such as Q4_K,Q6_K")
    return spec_from_gguf(path, kinds)


def _is_gguf(path: Path) -> bool:
    from moec.checkpoints.folder import GGUF

    return path.suffix == GGUF and path.is_file()
