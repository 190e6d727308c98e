"""Evidence about an artifact: its verification and its profile, found beside it or named by the user.

A file about another artifact is not shown. A verification and a profile hold the digest of the artifact's contents,
which is computed anew and compared before they are shown; the checks of passes hold the digests of the graphs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.compiler.artifact import Artifact
from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes

_MAX_BYTES = 64 << 20  # of a file; a profile of the largest model is a few MB


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
        data = json.loads(read_bytes(file, limit=_MAX_BYTES).decode("utf-8"))
    except UserError as error:
        return None, error.message
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {str(error).splitlines()[0]}"
    if not isinstance(data, dict) or not _is_a(data, kind):
        return None, {"profile": "not a profile", "passes": "not a verification of a spec's passes"}.get(
            kind, "not a verification of an artifact"
        )
    about = data if kind == "profile" else data.get("about")
    about = about if isinstance(about, dict) else {}
    if kind == "passes":
        graphs = [[p.name, p.digest] for p in artifact.manifest.passes]
        return (data, "") if about.get("graphs") == graphs else (None, "about another spec (other passes or graphs)")
    if about.get("contents") != artifact.manifest.contents:
        return None, "about another artifact (its contents differ)"
    try:
        artifact.check_contents()
    except UserError as error:
        return None, f"the artifact is not what it was about: {error}"
    return data, ""


def _is_a(data: dict[str, Any], kind: str) -> bool:
    if kind == "profile":
        return isinstance(data.get("runs"), list) and isinstance(data.get("ratios"), list) and bool(data["runs"])
    wanted = "passes" if kind == "passes" else "artifact"
    return data.get("kind") == wanted and isinstance(data.get("checks"), list)
