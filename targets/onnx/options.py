"""Options of the ONNX target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moec.compiler.spec.targets import TargetOptions


class Options(TargetOptions):
    """What the file is made of.

    flavour: `standard` is pure ONNX; `ort` uses ONNX Runtime's own MatMulNBits and QMoE, for speed. kv_cache: `spec`
    stores the cache as the quantization says (int8 adds scales to the inputs and outputs), `fp32` as floats whatever it
    says, which is what onnxruntime-genai expects. max_tokens: the longest chunk of one call of `moec run`; the file
    itself has no limit. threads: the session's default.
    """

    flavour: Literal["standard", "ort"] = "standard"
    kv_cache: Literal["spec", "fp32"] = "spec"
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 128
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
