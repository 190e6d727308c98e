"""What a target is. A new target is a new folder under `targets/` that calls `register`."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moec.compiler.errors import ArtifactError, CompileError, UserError
from moec.compiler.extras import Need
from moec.compiler.spec.targets import target_packages

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact, Manifest
    from moec.compiler.footprint import Footprint
    from moec.compiler.pipeline import Pass
    from moec.compiler.program import Program
    from moec.compiler.progress import Progress
    from moec.compiler.spec.targets import TargetOptions
    from moec.compiler.timing import BenchPlan


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
    position: int  # tokens in the session
    turn: int  # answers that were begun

    @property
    def tokens(self) -> list[int]: ...
    def prefill(self, ids: Sequence[int] | np.ndarray, logits: str = "last") -> np.ndarray: ...
    def decode(self, token: int) -> np.ndarray: ...
    def reset(self) -> None: ...
    def rewind(self, position: int) -> None: ...
    def fork(self) -> Session: ...
    def save(self, path: str | Path) -> None: ...
    def restore(self, path: str | Path) -> None: ...
    def generate(self, prompt: Any, **options: Any) -> Iterator[str]: ...
    def keep_prefix(self, name: str) -> None: ...
    def trace(self, enabled: bool) -> None: ...
    def take_traces(self) -> list[MoeTrace]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Table:
    """A table for people: `moec inspect` prints those that a target makes of its facts. `right`: columns of numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    right: tuple[int, ...] = ()


class Facts(BaseModel):
    """What a target records in the manifest under `details`; a target's own class adds its fields.

    dtype: of activations in the program, as torch names it. computes: keys of the quantization that the target computes
    otherwise than the spec says (`{"activations": "fp32"}`); verification compares with this. asymmetric_roles: roles
    whose activations another engine rounds asymmetrically. Keys of other versions are kept out and do no harm.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    dtype: str = "float32"
    computes: dict[str, str] = Field(default_factory=dict)
    asymmetric_roles: tuple[str, ...] = ()


class Target(ABC):
    """An engine that runs artifacts: how a Program becomes its files, and what can be done with them here.

    A target is a folder: `target.py` defines the class and calls `register`, `options.py` holds the class `Options`.
    The first three methods are required. The others have defaults: most of them say that the target cannot do it.
    Importing `target.py` must not import torch: plans are made without it.
    """

    name: ClassVar[str]
    about: ClassVar[str] = ""
    #: Extras that compiling or running needs.
    needs: ClassVar[tuple[Need, ...]] = ()
    facts_class: ClassVar[type[Facts]] = Facts
    #: Whether its sessions can be saved and restored.
    saves_sessions: ClassVar[bool] = False
    #: Whether attention over INT8 caches multiplies codes, which rounds queries and weights to 16 bits
    #: (compiler/ops/attention_codes.py); else in floats. Verification compares with the same. No entry of the manifest:
    #: it is that of the engine here, which also runs what earlier versions compiled.
    integer_attention: ClassVar[bool] = False
    #: Whether it has `latent_attention` and `head_linear`: latent attention then caches latents.
    latent_attention: ClassVar[bool] = False

    @abstractmethod
    def legalize(self, options: TargetOptions) -> list[Pass]:
        """The passes from QUANTIZED (or FUSED, unquantized) to LEGAL, in order."""

    @abstractmethod
    def lower(self, program: Program, out: Path, options: TargetOptions, progress: Progress) -> LoweredFiles:
        """Write the files of a LEGAL program into the folder `out`. CompileError for what the engine cannot take."""

    @abstractmethod
    def load(self, artifact: Artifact) -> Session:
        """A session on the artifact, with the arithmetic that it ships with. ArtifactError when it is damaged."""

    def obstacle(self) -> str | None:
        """What keeps artifacts from running here and is no extra, such as a missing C++ compiler, in one line; or
        None."""
        return None

    def rounds(self, artifact: Artifact) -> bool:
        """Whether `load_exact` gives another arithmetic than `load`: 16-bit activations, for instance."""
        return False

    def load_exact(self, artifact: Artifact) -> Session:
        """The artifact with float32 in place of narrower floats, which tells rounding from mistakes."""
        return self.load(artifact)

    def load_unrounded(self, artifact: Artifact) -> Session | None:
        """The artifact's own codes with activations that are not rounded to integers; None where that cannot be run."""
        return None

    def footprint(self) -> Footprint | None:
        """Sizes and rates that a plan needs; None: the target cannot be planned for."""
        return None

    def bench(self, artifact: Artifact, plan: BenchPlan, progress: Progress) -> dict[str, Any]:
        """Times an artifact in a process of its own.

        The report has `prefill_tokens_per_s`, `decode_tokens_per_s` (at the first context), `load_s`, `peak_rss_mb`
        (the largest of all runs), `threads`, `isa`, `file_bytes`, and `contexts`: one entry for each, with its own
        rate, spread and peak. Rates are medians over `plan.repeats`.
        """
        raise self._not_here(
            artifact, "cannot be timed on this machine", "compile the spec for another of `moec targets`"
        )

    def profile(self, artifact: Artifact, request: Any) -> dict[str, Any]:
        """Runs one request of a profile in a process of its own (`runtime/runner/profile_json.cpp` lists the keys)."""
        raise self._not_profiled(artifact)

    def device(self, artifact: Artifact, serial: str | None, runner: Path | None, say: Say, *, dry_run: bool) -> Any:
        """An attached device that profiles in place of this machine: `push(model, name)`, `run(request, name)`."""
        raise self._not_profiled(artifact)

    def check_profiles(self, artifact: Artifact) -> None:
        """UserError, before anything is measured, for a target without `profile`."""
        if type(self).profile is Target.profile:
            raise self._not_profiled(artifact)

    def describe(self, artifact: Artifact) -> list[Table]:
        """What `moec inspect` shows beside files and sizes."""
        return []

    def facts(self, artifact: Artifact) -> Facts:
        """The manifest's `details` as this target's own class. ArtifactError when they are damaged."""
        return own_facts(artifact, self.facts_class)

    def _not_here(self, artifact: Artifact, what: str, remedy: str) -> UserError:
        return UserError(f"an artifact for {self.name} {what}", place=str(artifact.folder), remedy=remedy)

    def _not_profiled(self, artifact: Artifact) -> UserError:
        remedy = "`moec inspect` gives its sizes by role and `moec verify` its numbers"
        return self._not_here(artifact, "cannot be profiled from here", remedy)


#: Receives each command line that a device is sent.
Say = Callable[[str], None]


@dataclass(frozen=True)
class LoweredFiles:
    """What `lower` wrote, relative to the artifact folder, and what the manifest should say of it.

    `digests`: SHA-256 of files that were hashed while they were written. `kernel_digest`: of the native sources that
    the artifact's operators need. `notes`: what a user should know, a line each.
    """

    files: tuple[str, ...]
    sizes_by_role: Mapping[str, int] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
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


OwnFacts = TypeVar("OwnFacts", bound=Facts)


def own_facts(artifact: Artifact, kind: type[OwnFacts]) -> OwnFacts:
    """The manifest's `details` as `kind`; ArtifactError naming the first damaged field."""
    return _checked(artifact.manifest, kind, place=str(artifact.folder / "manifest.json"))


def facts_of(manifest: Manifest) -> Facts:
    """What every target records; ArtifactError naming the first damaged field."""
    return _checked(manifest, Facts, place=f"manifest of {manifest.name}")


def _checked(manifest: Manifest, kind: type[OwnFacts], *, place: str) -> OwnFacts:
    try:
        return kind.model_validate(manifest.details)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in ("details", *first["loc"]))
        remedy = "compile it again with `moec compile`"
        raise ArtifactError(f"damaged: {where}: {first['msg']}", place=place, remedy=remedy) from error


_TARGETS: dict[str, Callable[[], Target]] = {}


def register(name: str, make: Callable[[], Target]) -> None:
    """Make a target known by `name`; `make` is called when it is first needed. A second entry is our mistake."""
    if name in _TARGETS:
        raise AssertionError(f"target {name} is registered twice")
    _TARGETS[name] = make


def registered() -> dict[str, Callable[[], Target]]:
    """Every registered target: name -> how it is made."""
    return dict(_TARGETS)


def find_target(name: str) -> Target:
    """The target called `name`; its package registers it when imported. UserError for an unknown or broken one."""
    packages = target_packages()
    if name not in packages:
        raise UserError(f"unknown target {name!r}", remedy=f"known here: {', '.join(packages)}")
    try:
        importlib.import_module(f"{packages[name]}.target")
        made = _TARGETS[name]()
    except Exception as error:
        if packages[name].startswith("moec."):
            raise
        # a fault of another distribution must not look like a bug of moec
        what = "does not register it" if isinstance(error, KeyError) else f"cannot be imported: {error}"
        raise UserError(
            f"target {name}: its package {packages[name]} {what}", remedy="reinstall or remove the distribution"
        ) from error
    if not isinstance(made, Target):
        what = f"registers {type(made).__name__}, which is no moec.compiler.target.Target"
        raise UserError(f"target {name}: its package {packages[name]} {what}", remedy="update the distribution")
    return made


def target_of(artifact: Artifact) -> Target:
    """The target of an artifact; ArtifactError when it is not installed."""
    name, known = artifact.manifest.target, target_packages()
    if name not in known:
        what = f"is for target {name!r}, which is not installed (known here: {', '.join(known)})"
        raise ArtifactError(what, place=str(artifact.folder), remedy="install that target, or compile for another")
    return find_target(name)
