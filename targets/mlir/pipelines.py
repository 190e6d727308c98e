"""The passes between the texts, and from linalg-on-tensors to machine code. Run in a worker process only.

torch-mlir's wheel holds the passes and an ExecutionEngine, but no class that joins them for a CPU; `TO_LLVM` does.
"""

from __future__ import annotations

import re
from typing import Any

# with the extra library empty, as torch-mlir's own importer calls it
TO_TORCH = "func.func(torch-match-quantized-custom-ops),torchdynamo-export-to-torch-backend-pipeline{extra-library=}"
TO_LINALG = "torch-backend-to-linalg-on-tensors-backend-pipeline{allow-non-finites=true}"

TO_LLVM = (
    # what bufferization does not know
    "func.func(refback-generalize-tensor-pad,refback-generalize-tensor-concat)",
    "canonicalize",
    "func.func(linalg-fuse-elementwise-ops)",
    "canonicalize",
    "cse",
    # tensors to buffers; each buffer is freed where it dies, results belong to the caller
    "one-shot-bufferize{bufferize-function-boundaries=true function-boundary-type-conversion=identity-layout-map}",
    "refback-mlprogram-bufferize",
    "func.func(buffer-loop-hoisting)",
    "buffer-deallocation-pipeline",
    "func.func(refback-munge-memref-copy)",
    "func.func(convert-linalg-to-loops,lower-affine)",
    "canonicalize",
    "cse",
    "func.func(loop-invariant-code-motion)",
    "convert-scf-to-cf",
    "func.func(refback-expand-ops-for-llvm,arith-expand)",
    "expand-strided-metadata",
    "lower-affine",
    "func.func(convert-math-to-llvm)",
    "convert-math-to-libm",
    # deallocation leaves operators behind that only become memory accesses after the first round
    "finalize-memref-to-llvm",
    "convert-bufferization-to-memref",
    "finalize-memref-to-llvm",
    "func.func(convert-arith-to-llvm)",
    "convert-index-to-llvm",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "convert-ub-to-llvm",
    "reconcile-unrealized-casts",
)


class LoweringFault(Exception):
    """A pass refused the module: `operator` is what it stopped at, `what` its message, each on one line."""

    def __init__(self, stage: str, message: str) -> None:
        self.operator = operator_in(message)
        first = next((line for line in message.splitlines() if "error:" in line), message.splitlines()[0])
        self.what = re.sub(r'^.*?error: (?:"[^"]*":\d+:\d+: |loc\([^)]*\): )?', "", first).strip()[:300]
        self.stage = stage
        super().__init__(f"{stage}: {self.what}")


def operator_in(message: str) -> str | None:
    """The operator that a diagnostic speaks of: a kept one by its own name, else the dialect's."""
    kept = re.search(r'torch\.operator"?(?:\(.*?name = | )"(?:torch\.)?([\w.]+)"', message)
    named = re.search(r"operation '(?:torch\.)?([\w.]+)'", message) or re.search(r'"torch\.([\w.]+)"\(', message)
    found = kept or named
    return found.group(1) if found else None


def context() -> Any:
    """An MLIR context with the dialects of torch-mlir's output."""
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.passmanager import PassManager

    made = ir.Context()
    torch_dialect.register_dialect(made)
    with made:
        # tm_tensor, and others that the bindings cannot register, are loaded by a pass that may produce them
        PassManager.parse(f"builtin.module({TO_LINALG})").run(ir.Module.parse("func.func private @f()").operation)
    return made


def run(module: Any, passes: tuple[str, ...], stage: str) -> None:
    """Run passes over a module. LoweringFault naming the operator that one of them refused."""
    from torch_mlir.ir import MLIRError
    from torch_mlir.passmanager import PassManager

    with module.context:
        for name in passes:
            try:
                PassManager.parse(f"builtin.module({name})").run(module.operation)
            except MLIRError as error:
                raise LoweringFault(stage, str(error)) from None


def parse(text: str) -> Any:
    """A module. LoweringFault when the text is damaged."""
    from torch_mlir import ir

    with context():
        try:
            return ir.Module.parse(text)
        except ir.MLIRError as error:
            raise LoweringFault("reading the text", str(error)) from None
