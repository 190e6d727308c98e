"""What a command was given as its spec: a YAML file, or a checkpoint folder that implies one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.compiler.spec import Spec


def spec_given(path: Path, *, quiet: bool = False) -> Spec:
    """The spec of a file, or the one that a checkpoint folder stands for, which is printed to stderr unless `quiet`.

    Errors: SpecError; CheckpointError for a folder that moec cannot read as a checkpoint.
    """
    from moec.checkpoints.folder import GGUF, gguf_refused
    from moec.compiler.spec import load_spec
    from moec.compiler.spec.loader import parse_spec

    if path.suffix == GGUF and path.is_file():
        raise gguf_refused(path)
    if not path.is_dir():
        return load_spec(path)
    from moec.checkpoints.spec_from_config import spec_from_config

    text = spec_from_config(path)
    if not quiet:
        print(text, file=sys.stderr)
    return parse_spec(text, file=str(path), folder=path)
