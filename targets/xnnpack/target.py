"""The XNNPACK CPU target: a `.pte` with our operators as C++ kernels and the XNNPACK delegate for dense linears."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.errors import ArtifactError, CompileError
from moec.compiler.pipeline import Pass
from moec.compiler.program import Program
from moec.compiler.target import LoweredFiles, Session, register
from moec.targets.xnnpack.options import Options

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact


class XnnpackTarget:
    name = "xnnpack"
    about = "phones' CPUs: a .pte with our kernels and the XNNPACK delegate; run here by the same runtime"

    def legalize(self, options: Any) -> list[Pass]:
        from moec.targets.xnnpack.legalize import legalize_passes

        return legalize_passes(_own(options))

    def lower(self, program: Program, out: Path, options: Any, progress: Any) -> LoweredFiles:
        from moec.targets.xnnpack.lower import lower  # ExecuTorch's compiler: seconds to import

        return lower(program, out, _own(options), progress)

    def obstacle(self) -> str | None:
        """Why artifacts cannot be run here: neither built kernels nor a compiler for them; None if they can."""
        from moec.targets.xnnpack.native import obstacle

        return obstacle()

    def load(self, artifact: Artifact) -> Session:
        return self._session(artifact, float_activations=False)

    def load_unrounded(self, artifact: Artifact) -> Session | None:
        """The artifact with fp32 activations on the same codes; None where the XNNPACK delegate rounds some of them."""
        if artifact.manifest.details.get("asymmetric_roles"):
            return None
        return self._session(artifact, float_activations=True)

    def _session(self, artifact: Artifact, *, float_activations: bool) -> Session:
        from moec.targets.xnnpack.session import CpuSession

        manifest = artifact.manifest
        if manifest.target != self.name:
            raise ArtifactError(f"is an artifact for {manifest.target}", place=str(artifact.folder))
        options = manifest.spec.get("targets", {}).get(self.name) or {}
        return CpuSession(
            artifact.path("model.pte"), threads=options.get("threads"), float_activations=float_activations
        )


def _own(options: Any) -> Options:
    if not isinstance(options, Options):
        raise CompileError(f"options of another target: {type(options).__name__}")
    return options


register("xnnpack", XnnpackTarget)
