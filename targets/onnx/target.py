"""The ONNX target: `model.onnx` with external data, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.extras import Need, require
from moec.compiler.target import LoweredFiles, Session, Table, Target, own_facts, own_manifest, own_options, register
from moec.targets.onnx.facts import OnnxFacts, tables
from moec.targets.onnx.options import Options

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact
    from moec.compiler.pipeline import Pass
    from moec.compiler.program import Program
    from moec.compiler.progress import Progress
    from moec.compiler.spec.targets import TargetOptions
    from moec.compiler.timing import BenchPlan


class OnnxTarget(Target):
    """See docs/onnx.md for what an application does with the files."""

    name = "onnx"
    about = "ONNX with INT4 weights and the fused node as a local function; run here by ONNX Runtime"
    needs = (Need("onnx", "onnx", "compile"), Need("onnx", "onnx", "run"), Need("onnxruntime", "onnx", "run"))
    facts_class = OnnxFacts

    def legalize(self, options: TargetOptions) -> list[Pass]:
        from moec.targets.onnx.legalize import legalize_passes

        return legalize_passes()

    def lower(self, program: Program, out: Path, options: TargetOptions, progress: Progress) -> LoweredFiles:
        require("onnx", "onnx", "compiling for onnx")
        from moec.targets.onnx.lower import lower

        return lower(program, out, own_options(options, Options), progress)

    def load(self, artifact: Artifact) -> Session:
        manifest = own_manifest(artifact, self.name)
        for package in ("onnxruntime", "onnx"):
            require(package, "onnx", "running an ONNX artifact")
        from moec.targets.onnx.session import OnnxSession

        return OnnxSession(
            artifact.path("model.onnx"),
            vocab_size=manifest.model.vocab_size,
            context=manifest.model.context,
            max_tokens=manifest.model.max_tokens,
            facts=own_facts(artifact, OnnxFacts),
            threads=own_options(artifact.options(), Options).threads,
        )

    def bench(self, artifact: Artifact, plan: BenchPlan, progress: Progress) -> dict[str, Any]:
        for package in ("onnxruntime", "onnx"):
            require(package, "onnx", "timing an ONNX artifact")
        from moec.targets.onnx.bench import bench

        return bench(artifact, plan, progress)

    def describe(self, artifact: Artifact) -> list[Table]:
        return tables(own_facts(artifact, OnnxFacts))


register("onnx", OnnxTarget)
