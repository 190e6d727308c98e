"""The type of a stage's products: `precision: auto` is bfloat16 where the hardware computes it, float32 elsewhere."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moec.compiler.errors import UserError
from moec.compiler.spec.training import Training, TrainingStage

if TYPE_CHECKING:
    from moec.training.stages import Plan

_X86 = ("x86_64", "amd64", "i386", "i686")


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are computed by instructions for them.

    NVIDIA's GPUs have them from Ampere on; one that is not here is taken to. On hardware without, torch emulates them:
    on AVX2 a product then takes seven times as long as in float32.
    """
    if device.type == "cuda":
        return not torch.cuda.is_available() or bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    if platform.machine().lower() in _X86:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolved(stage: TrainingStage, device: torch.device) -> TrainingStage:
    """The stage with `auto` decided for a device."""
    if stage.precision != "auto":
        return stage
    return stage.model_copy(update={"precision": "bf16" if has_bfloat16(device) else "fp32"})


def with_precisions(plan: Plan, device: torch.device) -> Plan:
    """The plan with every stage's precision decided, which is what run.json records, and notes where it matters."""
    notes: dict[str, str] = {
        stage.name: text for stage in plan.training.stages if (text := note(stage, device)) is not None
    }
    training = plan.training.model_copy(update={"stages": tuple(resolved(s, device) for s in plan.training.stages)})
    return replace(plan, training=training, spec=plan.spec.model_copy(update={"training": training}), notes=notes)


def note(asked: TrainingStage, device: torch.device) -> str | None:
    """What a user should know of a stage's precision before it begins."""
    if has_bfloat16(device):
        return None
    if asked.precision == "auto":
        return "products in float32: this hardware has none in bfloat16"
    if asked.precision == "bf16":
        return "this hardware emulates products in bfloat16: `precision: fp32` or `auto` trains several times as fast"
    return None


def require_same(before: Sequence[object], training: Training, place: str) -> None:
    """UserError if a run was begun with other precisions. before: the stages of its run.json."""
    for was, stage in zip(before, training.stages, strict=False):
        if not isinstance(was, dict) or was.get("name") != stage.name:
            continue  # another spec, which is refused elsewhere
        known = was.get("precision")
        if known in ("fp32", "bf16") and known != stage.precision:
            raise UserError(
                f"stage {stage.name} was begun with `precision: {known}`, and would go on with {stage.precision}",
                place=place,
                remedy=f"set the stage's `precision: {known}`, or choose another --out",
            )
