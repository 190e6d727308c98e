"""A device file from measurements: figures with their spread and how they were taken, as YAML that the loader reads."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from moec.compiler.spec.device import Device

SCHEMA_LINE = "# yaml-language-server: $schema=../device-schema.json"
_GOOD_TO = 4  # significant digits: more than any spread


def figure(rounds: Sequence[float], source: str, *, least: bool = False, unit: float = 1.0) -> dict[str, Any]:
    """The best round (the largest, or with `least` the smallest) over `unit`, with all rounds as its spread."""
    values = [value / unit for value in rounds]
    best = min(values) if least else max(values)
    return {"number": _short(best), "low": _short(min(values)), "high": _short(max(values)), "source": source}


def known(value: float, source: str) -> dict[str, Any]:
    """A figure without a spread."""
    return {"number": _short(value), "source": source}


def _short(value: float) -> float:
    return float(f"{value:.{_GOOD_TO}g}")


def device_yaml(device: Device, comment: str) -> str:
    """The text of a device file, in the order of the class's fields."""
    lines = [SCHEMA_LINE, *textwrap.wrap(comment, 116, initial_indent="# ", subsequent_indent="# ")]
    lines += _mapping(device.model_dump(mode="json", exclude_none=True), "")
    return "\n".join(lines) + "\n"


def _mapping(value: Mapping[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += [f"{indent}{key}:", *_mapping(item, indent + "  ")]
        elif isinstance(item, list):
            lines.append(f"{indent}{key}: [{', '.join(item)}]")
        elif isinstance(item, str) and key in ("source", "title"):
            lines.append(f"{indent}{key}: >-")
            lines += textwrap.wrap(item, 110, initial_indent=indent + "  ", subsequent_indent=indent + "  ")
        else:
            lines.append(f"{indent}{key}: {item}")
    return lines
