"""What a spec says, as frozen typed values: `Spec` and its `model:` section.

Lengths are in tokens, widths in features. Sections of their own: `quantization.py`, `targets.py`, `training.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializeAsAny,
    WithJsonSchema,
)

from moec.compiler.spec.device import device_files, is_device_file
from moec.compiler.spec.quantization import Quantization, RoleQuantization, WeightScheme
from moec.compiler.spec.sources import parse_model, source_of
from moec.compiler.spec.strict import Fault, Section, shown, suggestion
from moec.compiler.spec.targets import TargetOptions, default_targets, parse_targets
from moec.compiler.spec.training import Training

__all__ = [
    "Quantization",
    "RoleQuantization",
    "Spec",
    "WeightScheme",
]

# Bounds that keep every derived size far from 64-bit overflow and catch a slipped digit.
Width = Annotated[int, Field(ge=1, le=1 << 20)]
Count = Annotated[int, Field(ge=1, le=1 << 16)]
Tokens = Annotated[int, Field(ge=1, le=1 << 24)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
# YAML gives lists and strings; these two conversions are the only ones that a spec makes.
LoosePath = Annotated[Path, Field(strict=False)]


def _none(value: Any) -> Any:
    """`quantization: none` is a word in YAML; a bare null is more likely a forgotten value."""
    if value == "none":
        return None
    if value is None:
        raise ValueError("write `none` for an fp32 artifact, or a mapping such as {weights: int4, group_size: 32}")
    if isinstance(value, str):
        raise ValueError(f"expected `none` or a mapping such as {{weights: int4}}, got {value!r}")
    return value


def _name(value: str) -> str:
    if not re.fullmatch(NAME_PATTERN, value):
        raise ValueError(f"use letters, digits, '.', '_' and '-' (it names files), got {shown(value)}")
    return value


def _device(value: str) -> str:
    known = device_files()
    if not is_device_file(value) and value not in known:
        raise ValueError(f"unknown device {shown(value)}" + suggestion(value, known))
    return value


class Spec(Section):
    """One YAML file: what to compile, from which weights, with which quantization, for which targets."""

    name: Annotated[str, AfterValidator(_name)]
    model: Annotated[
        SerializeAsAny[Section],
        PlainValidator(parse_model),
        WithJsonSchema({"description": "a mapping with the key of one source"}),
    ]
    checkpoint: LoosePath | None = None
    quantization: Annotated[
        Quantization | None, BeforeValidator(_none), PlainSerializer(lambda q: "none" if q is None else q)
    ]
    targets: Annotated[
        Mapping[str, SerializeAsAny[TargetOptions]],
        PlainValidator(parse_targets),
        WithJsonSchema({"description": "a list of targets, or a mapping of target to options"}),
    ] = Field(default_factory=default_targets)
    device: Annotated[str, AfterValidator(_device)] | None = Field(
        default=None, description="a shipped device's name, or the path of a device file (with a / or .yaml)"
    )
    training: Training | None = None

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        yield from group_faults(raw)


def group_faults(raw: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of a spec's `quantization:` that the source of its model reports."""
    try:
        scheme = Quantization.model_validate(raw.get("quantization"))
        model = parse_model(raw.get("model"))
    except ValueError:  # these faults are reported where they are
        return
    for fault in source_of(model).quantization_faults(model, scheme):
        yield fault._replace(loc=("model", *fault.loc))
