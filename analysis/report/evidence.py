"""The files that tell about an artifact: its verification and its profile, found beside it or named by the user.

A file that speaks of another artifact is not shown: its digests must be those of the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.compiler.artifact import Artifact
from moec.compiler.errors import UserError

_COMPARED = ("spec", "graph")  # the kernel and the checkpoint's path may change without another artifact


@dataclass(frozen=True)
class Evidence:
    """The content of a file, or the reason why there is none."""

    data: dict[str, Any] | None
    file: Path | None = None
    reason: str = ""


def find_evidence(artifact: Artifact, kind: str, given: Path | None) -> Evidence:
    """`kind` is "verify", "passes" or "profile". UserError when a file that was named cannot be used.

    Looked for in the artifact's folder (KIND.json), and beside it: NAME.KIND.json and KIND.json.
    """
    if given is not None:
        data, fault = _read(given, kind, artifact)
        if data is None:
            raise UserError(fault, place=str(given), remedy=_remedy(kind, artifact))
        return Evidence(data, given)
    reasons = []
    for file in _candidates(artifact.folder, kind):
        data, fault = _read(file, kind, artifact)
        if data is not None:
            return Evidence(data, file)
        reasons.append(f"{file.name}: {fault}")
    return Evidence(None, None, "; ".join(reasons) or f"no {kind}.json beside the artifact; {_remedy(kind, artifact)}")


def _remedy(kind: str, artifact: Artifact) -> str:
    folder = artifact.folder
    if kind == "passes":
        return f"write one with `moec verify SPEC --json {folder}.passes.json`"
    return f"write one with `moec {kind} {folder} --json {folder}.{kind}.json`"


def _candidates(folder: Path, kind: str) -> Iterator[Path]:
    whole = folder.absolute()
    for file in (whole / f"{kind}.json", whole.parent / f"{whole.name}.{kind}.json", whole.parent / f"{kind}.json"):
        if file.is_file():
            yield file


def _read(file: Path, kind: str, artifact: Artifact) -> tuple[dict[str, Any] | None, str]:
    """The content, or None and what is wrong with it."""
    try:
        data = json.loads(file.read_text("utf-8"))
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {str(error).splitlines()[0]}"
    if not isinstance(data, dict) or not _is_a(data, kind):
        return None, {"profile": "not a profile", "passes": "not a verification of a spec's passes"}.get(
            kind, "not a verification of an artifact"
        )
    if kind == "passes":
        fits = data.get("subject") == artifact.manifest.model.name
        return (data, "") if fits else (None, f"about {data.get('subject')!r}, not {artifact.manifest.model.name!r}")
    digests = data.get("digests") if kind == "profile" else (data.get("about") or {}).get("digests")
    own = artifact.manifest.digests.model_dump()
    if not isinstance(digests, dict) or any(digests.get(name) != own[name] for name in _COMPARED):
        return None, "about another artifact (its digests differ)"
    return data, ""


def _is_a(data: dict[str, Any], kind: str) -> bool:
    if kind == "profile":
        return isinstance(data.get("runs"), list) and isinstance(data.get("ratios"), list) and bool(data["runs"])
    wanted = "passes" if kind == "passes" else "artifact"
    return data.get("kind") == wanted and isinstance(data.get("checks"), list)
