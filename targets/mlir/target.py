"""The MLIR target: torch-mlir text of the fused graph and of its reference expansion, which is executed here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.errors import ArtifactError, CompileError
from moec.compiler.extras import Need, require
from moec.compiler.pipeline import Pass
from moec.compiler.program import Program
from moec.compiler.target import LoweredFiles, Session, register
from moec.targets.mlir.options import Options

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact


class MlirTarget:
    """See docs/mlir.md for the files of an artifact and what to do with them."""

    name = "mlir"
    about = "torch-mlir text of the fused graph and its expansion; run here by MLIR's engine or IREE"
    needs = (
        Need("torch_mlir", "mlir", "compile"),
        Need("torch_mlir", "mlir", "run"),
        Need("iree.compiler", "iree", "compile", when="engine: iree"),
        Need("iree.runtime", "iree", "run", when="engine: iree"),
    )

    def legalize(self, options: Any) -> list[Pass]:
        from moec.targets.mlir.legalize import legalize_passes

        return legalize_passes()

    def lower(self, program: Program, out: Path, options: Any, progress: Any) -> LoweredFiles:
        from moec.targets.mlir.lower import lower  # torch-mlir: seconds to import

        if not isinstance(options, Options):
            raise CompileError(f"options of another target: {type(options).__name__}")
        return lower(program, out, options, progress)

    def load(self, artifact: Artifact) -> Session:
        from moec.targets.mlir.session import MlirSession

        manifest = artifact.manifest
        if manifest.target != self.name:
            raise ArtifactError(f"is an artifact for {manifest.target}", place=str(artifact.folder))
        iree = manifest.details.get("engine") == "iree"
        module, extra = ("iree.runtime", "iree") if iree else ("torch_mlir", "mlir")
        require(module, extra, "running this MLIR artifact")
        if not iree and all(f.name != "reference.linalg.mlir" for f in manifest.files):
            raise ArtifactError(
                "holds no linalg text to execute", place=str(artifact.folder), remedy="compile it with `linalg: true`"
            )
        return MlirSession(
            artifact.path("model.vmfb" if iree else "reference.linalg.mlir"),
            artifact.path("weights.safetensors"),
            vocab_size=manifest.model.vocab_size,
            context=manifest.model.context,
            max_tokens=manifest.model.max_tokens,
            moe_layers=len(manifest.model.moe_layers),
            details=manifest.details,
        )


register("mlir", MlirTarget)
