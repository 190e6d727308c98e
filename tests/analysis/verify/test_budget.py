"""`moec verify --memory-mb`: the same findings as in memory, bit for bit, and one line for what does not work."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.analysis.verify.agreement import verify_agreement
from moec.analysis.verify.artifact import verify_artifact
from moec.analysis.verify.quality.fidelity import ArtifactModel
from moec.analysis.verify.quality.texts import Chunk
from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import RunError
from moec.compiler.session_process import ProcessSession
from moec.compiler.target import MoeTrace
from tests.conftest import Moec, refused
from tests.targets.budgets import AMPLE_MB, EXPERTS, LAYERS, spec
from tests.tiny import TinyModels, tiny_text

IDS = np.random.default_rng(3).integers(0, 300, 150).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("budget")
    checkpoint = synthesize(spec(), made / "c", seed=0)
    return build.compile(spec(), checkpoint=checkpoint, out=made / "a").folder


@pytest.fixture(scope="module")
def tight(folder: Path) -> int:
    """A budget a little above the least of a process that runs the artifact."""
    with pytest.raises(RunError, match="a memory budget of 1 MB is less than") as caught:
        ProcessSession(Artifact.open(folder).within(1))
    found = re.search(r"less than (\d+) MB", str(caught.value))
    assert found
    return int(found[1]) + 4


def test_it_finds_what_it_finds_in_memory(folder: Path, tight: int) -> None:
    """Every check and every row of every layer, to the last digit."""
    plain = verify_artifact(folder, tokens=120, quality_tokens=60)
    within = verify_artifact(folder, tokens=120, quality_tokens=60, memory_mb=tight)
    assert plain.passed, [c.line() for c in plain.failures]
    *checks, same = within.checks
    assert checks == list(plain.checks)
    assert within.layers == plain.layers
    assert plain.fidelity is not None
    assert plain.fidelity.overall is not None
    assert repr(within.fidelity) == repr(plain.fidelity)  # errors of one chunk are not a number
    assert (same.name, same.passed) == (f"within {tight} MB: logits equal those in memory", True)
    assert within.figures["budget MB"] == tight
    assert f"of {LAYERS * EXPERTS} in memory" in within.figures["experts read"]
    misses = int(within.figures["experts read"].split(" of ")[0])
    assert misses > LAYERS * EXPERTS  # they did not all fit


def test_other_logits_than_in_memory_are_found(folder: Path, tight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ProcessSession._forward

    def wrong(
        self: ProcessSession, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool
    ) -> list[MoeTrace]:
        found = usual(self, tokens, start, rows, every)
        if rows is not None and start >= 20:
            rows[-1, 7] = np.nextafter(rows[-1, 7], np.float32(np.inf))
        return found

    monkeypatch.setattr(ProcessSession, "_forward", wrong)
    report = verify_artifact(folder, tokens=120, quality_tokens=0, memory_mb=tight)
    assert [c.name for c in report.failures] == [f"within {tight} MB: logits equal those in memory"]


def bringing(folder: Path, memory_mb: int, out: Path) -> Path:
    """A copy of the artifact whose spec gives it a budget."""
    copy = shutil.copytree(folder, out)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["spec"]["targets"]["xnnpack"]["memory_mb"] = memory_mb
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def rows(session: Any, parts: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([session.prefill(list(part), "all") for part in parts])


@pytest.mark.parametrize("unrounded", [False, True])
def test_a_process_gives_what_a_session_gives(folder: Path, tight: int, unrounded: bool) -> None:
    artifact = Artifact.open(folder)
    own = build.load_unrounded(artifact) if unrounded else build.load(artifact)
    assert own is not None
    parts = [IDS[:70], IDS[70:71], IDS[71:80]]
    with ProcessSession(artifact.within(tight), unrounded=unrounded) as session:
        for each in (own, session):
            each.trace(True)
        assert (session.vocab_size, session.context, session.exists) == (own.vocab_size, own.context, True)
        np.testing.assert_array_equal(rows(session, parts), rows(own, parts))
        for theirs, ours in zip(session.take_traces(), own.take_traces(), strict=True):
            assert theirs.layer == ours.layer
            np.testing.assert_array_equal(theirs.indices_TK, ours.indices_TK)
            np.testing.assert_array_equal(theirs.y_TD, ours.y_TD)
        for each in (own, session):
            each.rewind(30)
        np.testing.assert_array_equal(session.prefill(IDS[30:40]), own.prefill(IDS[30:40]))
        for each in (own, session):
            each.reset()
        np.testing.assert_array_equal(session.decode(5), own.decode(5))
        about = session.about_process()
        assert about["experts"]["misses"] > 0
        # rows and traces that were asked for come on top; less than without a budget
        assert 20 < about["peak_rss_mb"] <= 1.02 * tight + 4
        with pytest.raises(RunError, match="token"):
            session.prefill([10**6])
        np.testing.assert_array_equal(session.decode(6), own.decode(6))
    own.close()
    with pytest.raises(RunError, match="the session is closed"):
        session.decode(1)
    session.close()


def test_a_process_that_ends(folder: Path) -> None:
    session = ProcessSession(Artifact.open(folder))
    assert session._process is not None
    os.kill(session._process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"the process that ran it ended \(signal 9\)") as caught:
        session.decode(1)
    assert str(folder) in str(caught.value)
    assert session.closed


def test_the_command(folder: Path, tight: int, moec: Moec) -> None:
    more = ("--tokens", "40", "--quality-tokens", "0", "-q")
    status, out, err = moec("verify", folder, *more, "--memory-mb", tight, "--json", "-")
    assert status == 0, err
    report = json.loads(out)
    assert report["figures"]["budget MB"] == tight
    assert report["checks"][-1]["name"] == f"within {tight} MB: logits equal those in memory"
    refusal = moec("verify", folder, *more, "--memory-mb", "1")
    refused(refusal, "a memory budget of 1 MB is less than", "experts of one token", "give a larger --memory-mb")
    refusal = moec("verify", folder, "--against", "onnx", "--memory-mb", "4000")
    refused(refusal, "--memory-mb is for one artifact", "name a compiled folder alone")


@pytest.mark.slow
def test_the_budget_that_an_artifact_brings(folder: Path, tight: int, tmp_path: Path) -> None:
    copy = bringing(folder, tight, tmp_path / "a")
    report = verify_artifact(copy, checkpoint=folder.parent / "c", tokens=40, quality_tokens=0)
    assert report.passed, [c.line() for c in report.failures]
    assert report.figures["budget MB"] == tight


def test_a_small_artifact_brings_its_budget(tiny: TinyModels, tmp_path: Path) -> None:
    """As the slow one above, where all experts fit."""
    made = tiny(tiny_text(layers=2, context=256))
    copy = bringing(made / "artifact", AMPLE_MB, tmp_path / "a")
    report = verify_artifact(copy, checkpoint=made / "checkpoint", tokens=8, quality_tokens=0)
    assert report.passed, [c.line() for c in report.failures]
    assert report.figures["budget MB"] == AMPLE_MB
    assert report.checks[-1].name == f"within {AMPLE_MB} MB: logits equal those in memory"


def test_who_holds_more_than_the_artifact_runs_it_in_memory(folder: Path, tmp_path: Path, moec: Moec) -> None:
    """A float model, other artifacts, a harness: none of it counts against the budget that an artifact brings."""
    small = bringing(folder, 1, tmp_path / "a")
    with pytest.raises(RunError, match="a memory budget of 1 MB is less than"):
        build.load(Artifact.open(small))
    chunk = Chunk("text", tuple(IDS))
    found, wanted = (next(ArtifactModel(Artifact.open(f)).logits([chunk])) for f in (small, folder))
    np.testing.assert_array_equal(found, wanted)
    assert verify_agreement(small, [str(folder)], checkpoint=folder.parent / "c", tokens=16).passed
    status, out, err = moec("diff", small, folder, "--json")
    assert status == 1, err  # their manifests differ
    assert json.loads(out)["figures"]["max abs error"] == 0
