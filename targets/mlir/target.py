"""The MLIR target: torch-mlir text of the fused graph and of its reference expansion, which is executed here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.errors import ArtifactError
from moec.compiler.extras import Need, require
from moec.compiler.target import LoweredFiles, Session, Target, own_facts, own_manifest, own_options, register
from moec.compiler.trust import require_trust
from moec.targets.mlir.facts import MlirFacts
from moec.targets.mlir.options import Options

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact
    from moec.compiler.pipeline import Pass
    from moec.compiler.program import Program
    from moec.compiler.progress import Progress
    from moec.compiler.spec.targets import TargetOptions


class MlirTarget(Target):
    """See docs/mlir.md for the files of an artifact and what to do with them."""

    name = "mlir"
    about = "torch-mlir text of the fused graph and its expansion; run here by MLIR's engine or IREE"
    needs = (
        Need("torch_mlir", "mlir", "compile"),
        Need("torch_mlir", "mlir", "run"),
        Need("iree.compiler", "iree", "compile", when="engine: iree"),
        Need("iree.runtime", "iree", "run", when="engine: iree"),
    )
    facts_class = MlirFacts

    def legalize(self, options: TargetOptions) -> list[Pass]:
        from moec.targets.mlir.legalize import legalize_passes

        return legalize_passes()

    def lower(self, program: Program, out: Path, options: TargetOptions, progress: Progress) -> LoweredFiles:
        from moec.targets.mlir.lower import lower  # torch-mlir: seconds to import

        return lower(program, out, own_options(options, Options), progress)

    def load(self, artifact: Artifact) -> Session:
        from moec.targets.mlir.session import MlirSession

        manifest = own_manifest(artifact, self.name)
        require_trust(
            "running an MLIR artifact executes its program, which may call any function of this machine",
            place=str(artifact.folder),
        )
        facts = own_facts(artifact, MlirFacts)
        iree = facts.engine == "iree"
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
            facts=facts,
        )


register("mlir", MlirTarget)
