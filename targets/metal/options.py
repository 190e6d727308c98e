"""Options of the Metal GPU target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moec.compiler.spec.targets import TargetOptions


class Options(TargetOptions):
    """`dtype` is the type of activations and of the KV cache; `max_tokens` the longest chunk of one call."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 128
