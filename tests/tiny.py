"""The tiny model as tests compile it: one builder of specs, checkpoints and artifacts, which makes each variant once.

Folders are shared by the tests of a session: nothing in them may be changed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.cli import main as cli

SPEC = Path(__file__).parents[1] / "specs" / "models" / "mobilemoe-tiny.yaml"


def tiny_text(*, layers: int = 2, context: int = 1024, **values: str) -> str:
    """The shipped spec with other values of keys that have a line of their own; the first of a name counts."""
    lines = SPEC.read_text("utf-8").splitlines(keepends=True)
    for name, value in {"layers": str(layers), "context": str(context), **values}.items():
        at = [i for i, line in enumerate(lines) if line.split(":")[0].strip() == name]
        assert at, f"{SPEC.name} has no key {name}"
        lines[at[0]] = f"{lines[at[0]].split(name)[0]}{name}: {value}\n"
    return "".join(lines)


class TinyModels:
    """Folders with spec.yaml, checkpoint and artifact."""

    def __init__(self, temporary: pytest.TempPathFactory) -> None:
        self._temporary = temporary
        self._made: dict[tuple[str, bool, bool, str], Path] = {}

    def __call__(self, text: str, *, qat: bool = True, named: bool = False, router: str = "") -> Path:
        """Of a spec's text. `qat`: codes in the checkpoint; `named`: the spec names it; `router`: as `--router`."""
        key = (text, qat, named, router)
        if key in self._made:
            return self._made[key]
        folder = self._temporary.mktemp("tiny")
        (folder / "spec.yaml").write_text(("checkpoint: checkpoint\n" if named else "") + text, "utf-8")
        spec, checkpoint = str(folder / "spec.yaml"), str(folder / "checkpoint")
        synthesize = ["checkpoint", "synthesize", spec, "--out", checkpoint, "--seed", "1", "--quiet"]
        more = [*(["--qat"] if qat else []), *(["--router", router] if router else [])]
        assert cli.run([*synthesize, *more]) == 0
        given = [] if named else ["--checkpoint", checkpoint]
        assert cli.run(["compile", spec, *given, "--out", str(folder / "artifact"), "--quiet"]) == 0
        self._made[key] = folder
        return folder
