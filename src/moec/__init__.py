"""moec: an open compiler that puts Mixture-of-Experts language models on phones.

    artifact = moec.compile("specs/models/mobilemoe-s.yaml", checkpoint="MobileMoE-S-QAT", out="build/s")
    session = moec.load(artifact)
    logits = session.prefill([1, 2, 3], logits="last")  # float32 [1, vocabulary]
    logits = session.decode(4)  # float32 [vocabulary]
    for piece in session.generate([{"role": "user", "content": "Hi"}]):  # or a text to go on from
        print(piece, end="")

Names below are imported when they are first used: `import moec` alone loads neither torch nor ExecuTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.assistant.load import load
    from moec.compiler.artifact import Artifact
    from moec.compiler.build import compile
    from moec.compiler.errors import (
        ArtifactError,
        CheckpointError,
        CompileError,
        MissingExtra,
        RunError,
        SpecError,
        TrustError,
        UserError,
    )
    from moec.compiler.spec import Spec, load_spec
    from moec.compiler.target import Session

__version__ = "0.1.0"

_HOMES = {
    "moec.assistant.load": ["load"],
    "moec.compiler.artifact": ["Artifact"],
    "moec.compiler.build": ["compile"],
    "moec.compiler.errors": [
        "ArtifactError",
        "CheckpointError",
        "CompileError",
        "MissingExtra",
        "RunError",
        "SpecError",
        "TrustError",
        "UserError",
    ],
    "moec.compiler.spec": ["Spec", "load_spec"],
    "moec.compiler.target": ["Session"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 (the order of the documentation)
    "compile",
    "load",
    "load_spec",
    "Spec",
    "Artifact",
    "Session",
    "UserError",
    "SpecError",
    "CheckpointError",
    "CompileError",
    "ArtifactError",
    "RunError",
    "MissingExtra",
    "TrustError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
