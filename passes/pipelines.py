"""The order of passes in every pipeline, on one screen. Targets append their own `legalize` passes."""

from __future__ import annotations

from moec.compiler.pipeline import Pass
from moec.compiler.plugins import installed_rules
from moec.compiler.spec.quantization import Quantization
from moec.passes.absorb_latents import absorb_latents
from moec.passes.canonicalize import canonicalize
from moec.passes.check_router import check_router
from moec.passes.drop_empty import drop_empty
from moec.passes.expand_complex import expand_complex
from moec.passes.flatten_tokens import flatten_tokens
from moec.passes.fold_constants import fold_constants
from moec.passes.fuse_attention import fuse_attention
from moec.passes.fuse_moe import fuse_moe
from moec.passes.fuse_recurrence import fuse_recurrence
from moec.passes.fuse_rms_norm import fuse_rms_norm
from moec.passes.fuse_rope import fuse_rope
from moec.passes.fuse_short_conv import fuse_short_conv
from moec.passes.narrow_routing import narrow_routing
from moec.passes.quantize_weights import quantize_weights
from moec.passes.sink_transposes import sink_transposes


def fusion() -> list[Pass]:
    """EXPORTED -> FUSED. Rules of other distributions (entry points `moec.passes`) run before ours that fuse."""
    return [
        canonicalize(),
        drop_empty(),
        expand_complex(),
        fold_constants(),
        *installed_rules(),
        fuse_rms_norm(),
        fuse_rope(),
        flatten_tokens(),
        narrow_routing(),
        fuse_moe(),
        fuse_attention(),
        fuse_short_conv(),
        fuse_recurrence(),
        sink_transposes(),
        check_router(),
    ]


def pipeline(quantization: Quantization | None, calibrate: Pass | None = None, *, latents: bool = False) -> list[Pass]:
    """EXPORTED -> FUSED for `quantization: none`, EXPORTED -> QUANTIZED otherwise.

    calibrate: the pass of a method that observes inputs (analysis/calibration/calibrate.py). latents: whether the
    target has `latent_attention` (`Target.latent_attention`).
    """
    absorb = [absorb_latents()] if latents else []
    if quantization is None:
        return [*fusion(), *absorb]
    return [*fusion(), *([] if calibrate is None else [calibrate]), quantize_weights(quantization), *absorb]
