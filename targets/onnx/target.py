"""The ONNX target: `model.onnx` with external data, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.errors import ArtifactError, CompileError
from moec.compiler.extras import Need, require
from moec.compiler.pipeline import Pass
from moec.compiler.program import Program
from moec.compiler.target import LoweredFiles, Session, register
from moec.passes.float_activations import float_activations
from moec.targets.onnx.options import Options

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact


class OnnxTarget:
    """See docs/onnx.md for what an application does with the files."""

    name = "onnx"
    about = "ONNX with INT4 weights and the fused node as a local function; run here by ONNX Runtime"
    needs = (Need("onnx", "onnx", "compile"), Need("onnx", "onnx", "run"), Need("onnxruntime", "onnx", "run"))

    def legalize(self, options: Any) -> list[Pass]:
        return [float_activations()]

    def lower(self, program: Program, out: Path, options: Any, progress: Any) -> LoweredFiles:
        require("onnx", "onnx", "compiling for onnx")
        from moec.targets.onnx.lower import lower

        if not isinstance(options, Options):
            raise CompileError(f"options of another target: {type(options).__name__}")
        return lower(program, out, options, progress)

    def load(self, artifact: Artifact) -> Session:
        manifest = artifact.manifest
        if manifest.target != self.name:
            raise ArtifactError(f"is an artifact for {manifest.target}", place=str(artifact.folder))
        for package in ("onnxruntime", "onnx"):
            require(package, "onnx", "running an ONNX artifact")
        from moec.targets.onnx.session import OnnxSession

        options = manifest.spec.get("targets", {}).get(self.name) or {}
        return OnnxSession(
            artifact.path("model.onnx"),
            vocab_size=manifest.model.vocab_size,
            context=manifest.model.context,
            max_tokens=manifest.model.max_tokens,
            details=manifest.details,
            threads=options.get("threads"),
        )


register("onnx", OnnxTarget)
