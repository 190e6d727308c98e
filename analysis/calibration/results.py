"""What a calibration found, in a folder of the user's cache: codes, factors of scaled channels, and the report.

The folder is named by a digest of the weights, the graph, the text and the request, so that verifying an artifact, or
compiling for another target, finds what compiling made. Environment: MOEC_CALIBRATION_DIR (default
~/.cache/moec/calibration). The newest eight are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moec.compiler.quant import QuantizedTensor
from moec.compiler.replacing import replacing

INDEX = "calibration.json"
FORMAT = 2
_KEPT = 8


def cache_folder() -> Path:
    """Where results are kept: MOEC_CALIBRATION_DIR, or moec/calibration in the user's cache folder."""
    override = os.environ.get("MOEC_CALIBRATION_DIR")
    if override:
        return Path(override).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "moec" / "calibration"


@dataclass
class Writer:
    """Results of one method while they are computed; each weight goes to a file of its own."""

    folder: Path
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    factors: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    _count: int = 0

    @classmethod
    def after(cls, first: Results, folder: Path) -> Writer:
        """One that begins with the results of `first`: files are shared with it, and none of them is written again."""
        for file in first.folder.glob("*.safetensors"):
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)
        return cls(folder, dict(first.weights), dict(first.scaled), prefix=f"after-{first.method}-")

    def _new(self, kind: str) -> str:
        self._count += 1
        return f"{self.prefix}{kind}{self._count}.safetensors"

    def codes(self, name: str, tensor: QuantizedTensor) -> None:
        """The codes of weight `name`, as the graph is to read them."""
        file = self._new("")
        parts = {"codes": tensor.codes.contiguous(), "scales": tensor.scales.contiguous()}
        if tensor.zero_points is not None:
            parts["zero_points"] = tensor.zero_points.contiguous()
        save_file(parts, self.folder / file)
        self.weights[name] = {
            "file": file,
            "bits": tensor.bits,
            "group_size": tensor.group_size,
            "levels": tensor.levels,
        }

    def scaled(self, name: str, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """The weight `name` is multiplied by factors: [N] of its rows, [K] of its columns, or [E, ...] by expert."""
        file = self._new("f")
        given = {"rows": rows, "columns": columns}
        save_file({k: v.contiguous() for k, v in given.items() if v is not None}, self.folder / file)
        self.factors[name] = file

    def close(self, method: str, report: Mapping[str, Any]) -> None:
        """Write the index: the results are then complete."""
        content = {
            "format": FORMAT,
            "method": method,
            "weights": self.weights,
            "factors": self.factors,
            "report": dict(report),
        }
        (self.folder / INDEX).write_text(json.dumps(content, indent=1), "utf-8")


class Results:
    """The results in a folder that `Writer` wrote and closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = json.loads((folder / INDEX).read_text("utf-8"))
        self.method: str = content["method"]
        self.report: dict[str, Any] = content["report"]
        self.weights: dict[str, dict[str, Any]] = content["weights"]
        self.scaled: dict[str, str] = content["factors"]

    def codes(self, name: str) -> QuantizedTensor:
        """The codes of weight `name`."""
        entry = self.weights[name]
        parts = self._parts(entry["file"])
        return QuantizedTensor(
            parts["codes"],
            parts["scales"],
            entry["bits"],
            entry["group_size"],
            parts.get("zero_points"),
            entry.get("levels", ""),
        )

    def factors(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Factors of the rows and of the columns of weight `name`; None for none."""
        if name not in self.scaled:
            return None, None
        parts = self._parts(self.scaled[name])
        return parts.get("rows"), parts.get("columns")

    def _parts(self, file: str) -> dict[str, Tensor]:
        with safe_open(self.folder / file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)


def find(key: str) -> Results | None:
    """The results of an earlier run, if they are complete and of this format."""
    folder = cache_folder() / key
    try:
        if json.loads((folder / INDEX).read_text("utf-8"))["format"] != FORMAT:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    os.utime(folder)
    return Results(folder)


def new(key: str) -> Any:
    """The folder to write results into, which takes its place when the block ends well (see `replacing`)."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return replacing(cache_folder() / key, kind="results of a calibration")


def forget_old() -> None:
    """Drop all but the newest results."""
    found = [f for f in cache_folder().iterdir() if (f / INDEX).is_file()]
    for folder in sorted(found, key=lambda f: f.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
