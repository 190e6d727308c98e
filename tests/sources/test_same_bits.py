"""Every shipped family: however tokens are cut into calls, and a session came to them, the logits are the same bits.

A draft can then be checked in one pass, and a prefix that was prefilled in one chunk serves a prompt of another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.assistant.load import load
from moec.checkpoints.synthesize import synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.spec import Spec, load_spec
from tests.sources.test_family_artifacts import FAMILIES, with_checkpoint

TINY = Path(__file__).parents[2] / "specs" / "models" / "mobilemoe-tiny.yaml"
CUTS = {"whole": [10**6], "pairs": [2] * 99, "threes": [3] * 99, "mixed": [7, 1, 16, 5, 1, 1, 40] * 9}


def check(artifact: Artifact, folder: Path, most: int = 160) -> None:
    with load(artifact) as session:  # type: ignore[attr-defined]
        count = min(most, session.context - 20)
        ids = np.random.default_rng(3).integers(0, session.vocab_size, count + 20).tolist()
        alone = np.stack([session.decode(i) for i in ids])
        assert np.abs(alone).max() > 0.5, "logits too small to tell anything"
        for name, sizes in CUTS.items():
            session.reset()
            found, at = [], 0
            for size in sizes:
                part = ids[at : min(at + size, count)]
                if part:
                    found.append(session.prefill(part, "all"))
                at += size
            np.testing.assert_array_equal(np.concatenate(found), alone[: session.position], err_msg=name)
            session.reset()
            np.testing.assert_array_equal(session.prefill(ids[:count]), alone[count - 1 : count], err_msg="last alone")
        session.save(folder / "s.session")
        with session.fork() as fork:
            np.testing.assert_array_equal(fork.prefill(ids[count:], "all"), alone[count:])
            if not session.rewinds:  # a state of which nothing is known: only its beginning can be gone back to
                assert not all(entry.update.startswith("appended") for entry in artifact.manifest.states)
                fork.reset()
                fork.prefill(ids[: count // 2])
            fork.rewind(count // 2)
            np.testing.assert_array_equal(fork.prefill(ids[count // 2 : count], "all"), alone[count // 2 : count])
        session.reset()
        session.prefill(ids[5:15])
        session.restore(folder / "s.session")
        np.testing.assert_array_equal(np.stack([session.decode(i) for i in ids[count:]]), alone[count:])


def _tiny(folder: Path, **changes: Any) -> Artifact:
    raw = load_spec(TINY).model_dump(mode="json")
    spec = Spec.model_validate({**raw, **changes})
    synthesize(spec, folder / "checkpoint", seed=1)
    return build.compile(spec, checkpoint=folder / "checkpoint", out=folder / "artifact")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"quantization": "none"}, marks=pytest.mark.slow),  # XNNPACK computes float linears
        pytest.param(
            {"targets": [{"xnnpack": {"kernels": {"attention": "xnnpack", "ffn": "xnnpack"}}}]}, marks=pytest.mark.slow
        ),
    ],
    ids=["int4", "float", "delegated"],
)
def test_mobilemoe(tmp_path: Path, changes: dict[str, Any]) -> None:
    check(_tiny(tmp_path, **changes), tmp_path, 300)


@pytest.mark.slow
@pytest.mark.parametrize("file", FAMILIES, ids=lambda f: f.stem)
def test_family(file: Path, tmp_path: Path) -> None:
    check(build.compile(with_checkpoint(file, tmp_path / "model", {}), out=tmp_path / "artifact"), tmp_path)
