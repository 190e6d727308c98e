"""What differs between two artifacts, or between two graph texts, in words and in numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moec.analysis.verify import metrics
from moec.compiler.artifact import Artifact
from moec.compiler.errors import UserError
from moec.compiler.target import Session

_CONTEXT_LINES = 2
_MAX_LINES = 200


@dataclass(frozen=True)
class Difference:
    """`entries` are (what, in A, in B); `lines` a unified diff of graph texts; `figures` compare logits."""

    a: str
    b: str
    entries: tuple[tuple[str, str, str], ...] = ()
    lines: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        return not self.entries and not self.lines and self.figures.get("max abs error", 0.0) == 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "entries": [{"what": w, "a": x, "b": y} for w, x, y in self.entries],
            "lines": list(self.lines),
            "figures": dict(self.figures),
        }


def diff_texts(a: str, b: str, *, names: tuple[str, str]) -> Difference:
    """Compare two graph texts line by line; value numbers that merely shifted are not a difference of their own."""
    lines = list(difflib.unified_diff(a.splitlines(), b.splitlines(), *names, lineterm="", n=_CONTEXT_LINES))
    if len(lines) > _MAX_LINES:
        lines = [*lines[:_MAX_LINES], f"... {len(lines) - _MAX_LINES} more lines"]
    return Difference(*names, lines=tuple(lines))


def diff_artifacts(a: Artifact, b: Artifact, figures: Mapping[str, float]) -> Difference:
    """Compare manifests field by field, without times and the digests of files."""
    left, right = (_comparable(x) for x in (a, b))
    entries = [
        (key, str(left.get(key, "-")), str(right.get(key, "-")))
        for key in sorted(set(left) | set(right))
        if left.get(key, "-") != right.get(key, "-")
    ]
    return Difference(str(a.folder), str(b.folder), entries=tuple(entries), figures=figures)


def _comparable(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest.model_dump(mode="json")
    kept = {k: v for k, v in manifest.items() if k not in ("passes", "files")}
    kept["passes"] = [f"{p.name} ({p.changed})" for p in artifact.manifest.passes]
    kept["files"] = {f.name: f.bytes for f in artifact.manifest.files}
    return dict(_flat(kept, ""))


def _flat(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def logits_figures(a: Session, b: Session, prompts: Mapping[str, list[int]]) -> dict[str, float]:
    """The same ids through both: how far the logits of B are from those of A."""
    if a.vocab_size != b.vocab_size:
        raise UserError(f"vocabularies of {a.vocab_size} and {b.vocab_size} tokens: logits cannot be compared")
    rows: list[tuple[float, np.ndarray, np.ndarray, float]] = []
    for ids in prompts.values():
        used = ids[: min(a.context, b.context)]
        a.reset()
        b.reset()
        x, y = np.asarray(a.prefill(used, logits="all")), np.asarray(b.prefill(used, logits="all"))
        rows.append(
            (metrics.sqnr_db(x, y), metrics.row_cosines(x, y), metrics.top1_matches(x, y), metrics.max_abs_error(x, y))
        )
    cosines = np.concatenate([r[1] for r in rows])
    return {
        "tokens": float(len(cosines)),
        "SQNR dB (worst prompt)": min(r[0] for r in rows),
        "median cosine": float(np.median(cosines)),
        "min cosine": float(cosines.min()),
        "top-1 agreement": float(np.concatenate([r[2] for r in rows]).mean()),
        "max abs error": max(r[3] for r in rows),
    }
