"""Options of the MLIR target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moec.compiler.spec.targets import TargetOptions


class Options(TargetOptions):
    """What executes the artifact here, and how long one call may be.

    engine: `jit` lowers the linalg text with torch-mlir's own passes and runs it in its ExecutionEngine
    (`moec[mlir]`); `iree` also compiles the torch text to `model.vmfb` for IREE's runtime (`moec[iree]`). max_tokens:
    the longest chunk of one call; the text itself is dynamic in it. linalg: also write the expansion as
    linalg-on-tensors, which `jit` needs; without it the artifact is text in the torch dialect alone.
    """

    engine: Literal["jit", "iree"] = "jit"
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    linalg: bool = True
