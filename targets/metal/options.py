"""Options of the Metal GPU target."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moec.compiler.spec.targets import TargetOptions


class Options(TargetOptions):
    """How the model runs on the GPU.

    dtype: type of activations and of a float KV cache. float16 holds the scales of quantized weights exactly; bfloat16
    does not, and is compiled only with `allow_requantization`. max_tokens: the longest chunk of one call.
    allow_requantization: round what the target cannot hold; the manifest then gives the measured SQNR of each weight.
    """

    device_needs: ClassVar[tuple[str, ...]] = ("gpu_fp16_gflop_per_s",)
    device_isas: ClassVar[tuple[str, ...]] = ("metal",)

    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 128
    allow_requantization: bool = False
