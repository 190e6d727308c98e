"""What a target is. A new target is a new folder under `targets/` that calls `register`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from moec.compiler.errors import ArtifactError, CompileError
from moec.compiler.pipeline import Pass
from moec.compiler.program import Program

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact, Manifest
    from moec.compiler.progress import Progress
    from moec.compiler.spec.targets import TargetOptions


@dataclass(frozen=True)
class MoeTrace:
    """What one MoE layer did in one call of a session: inputs, routing and output, as the artifact computed them."""

    layer: int
    x_TD: np.ndarray  # float32: the expert input
    indices_TK: np.ndarray  # int32: the experts selected
    weights_TK: np.ndarray  # float32: combine weights, after normalisation and scaling
    y_TD: np.ndarray  # float32: the block's output


class Session(Protocol):
    """A loaded artifact with a KV cache. Ids are checked; faults are RunError. `SessionBase` says what each gives."""

    vocab_size: int
    context: int
    position: int

    def prefill(self, ids: Sequence[int] | np.ndarray, logits: str = "last") -> np.ndarray: ...
    def decode(self, token: int) -> np.ndarray: ...
    def reset(self) -> None: ...
    def trace(self, enabled: bool) -> None: ...
    def take_traces(self) -> list[MoeTrace]: ...
    def close(self) -> None: ...


class Target(Protocol):
    """`legalize` lists the passes from QUANTIZED (or FUSED, unquantized) to LEGAL; `lower` writes the files."""

    name: str

    def legalize(self, options: TargetOptions) -> list[Pass]: ...
    def lower(self, program: Program, out: Path, options: TargetOptions, progress: Progress) -> LoweredFiles: ...
    def load(self, artifact: Artifact) -> Session: ...


@runtime_checkable
class RunsExactly(Protocol):
    """A target of 16-bit arithmetic whose artifacts can also be run in float32, to tell rounding from mistakes."""

    def rounds(self, artifact: Artifact) -> bool: ...
    def load_exact(self, artifact: Artifact) -> Session: ...


@runtime_checkable
class RunsUnrounded(Protocol):
    """A target that rounds activations and can also run an artifact's own codes without: whole runs are comparable."""

    def load_unrounded(self, artifact: Artifact) -> Session | None: ...


@dataclass(frozen=True)
class LoweredFiles:
    """What `lower` wrote, relative to the artifact folder, and what the manifest should say of it.

    `digests`: SHA-256 of files that were hashed while they were written. `kernel_digest`: of the native sources that
    the artifact's operators need. `notes`: what a user should know, a line each.
    """

    files: tuple[str, ...]
    sizes_by_role: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    kernel_digest: str | None = None
    notes: tuple[str, ...] = ()


OwnOptions = TypeVar("OwnOptions")


def own_options(options: object, kind: type[OwnOptions]) -> OwnOptions:
    """`options` as a target's own class; CompileError for those of another."""
    if not isinstance(options, kind):
        raise CompileError(f"options of another target: {type(options).__name__}")
    return options


def own_manifest(artifact: Artifact, name: str) -> Manifest:
    """The manifest of an artifact for target `name`; ArtifactError for one of another."""
    if artifact.manifest.target != name:
        raise ArtifactError(f"is an artifact for {artifact.manifest.target}", place=str(artifact.folder))
    return artifact.manifest


_TARGETS: dict[str, Callable[[], Target]] = {}


def register(name: str, make: Callable[[], Target]) -> None:
    """Make a target known by `name`; `make` is called when it is first needed. A second entry is our mistake."""
    if name in _TARGETS:
        raise AssertionError(f"target {name} is registered twice")
    _TARGETS[name] = make


def registered() -> dict[str, Callable[[], Target]]:
    """Every registered target: name -> how it is made."""
    return dict(_TARGETS)
