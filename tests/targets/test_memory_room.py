"""What must find room within a budget of memory beside the experts: a refused session, a restored one, another model of
the same file, a draft; and where a budget goes that an artifact brings."""

from __future__ import annotations

import gc
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moec.assistant.assistant import Assistant
from moec.assistant.load import load, load_draft
from moec.assistant.prefixes import PrefixCache
from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import CompileError, NoRoomError, RunError
from moec.compiler.spec import Spec
from moec.compiler.target import Session, Target, target_of
from moec.targets.xnnpack.memory import ExpertCacheOptions
from moec.targets.xnnpack.session import CpuSession
from tests.conftest import Moec, refused
from tests.targets.budgets import AMPLE_MB, EXPERTS, LAYERS, MODEL, VOCAB, changed, least_mb, opened_within, spec


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("room")
    return build.compile(spec(), checkpoint=synthesize(spec(), folder / "c", seed=0, qat=True), out=folder / "a")


def misses(session: CpuSession) -> int:
    stats = session.expert_stats()
    assert stats is not None
    return stats.misses


def test_a_session_without_room_costs_no_expert(artifact: Artifact) -> None:
    """What is in memory stays there when a fork is refused."""
    model = artifact.path("model.pte")
    experts = ExpertCacheOptions(read_ahead=False)
    with opened_within(model, 0, threads=1, experts=experts) as session:
        forks = []
        with pytest.raises(RunError, match="no room for the caches of another session"):
            forks.extend(session.fork() for _ in range(100))
        for _ in range(2):
            session.reset()
            session.prefill([7])
        held = misses(session)
        with pytest.raises(RunError, match="no room for the caches of another session"):
            session.fork()
        session.reset()
        session.prefill([7])
        assert misses(session) == held
        for fork in forks:
            fork.close()


def test_a_session_that_nobody_has_gives_its_room_back(artifact: Artifact) -> None:
    """At once, without a collection of cycles."""
    model = artifact.path("model.pte")
    with opened_within(model, 3, threads=1) as session:
        slots = session.expert_stats().slots  # type: ignore[union-attr]
        gc.disable()
        try:
            forks = []
            while session.expert_stats().slots == slots:  # type: ignore[union-attr]
                forks.append(session.fork())
            del forks
            assert session.expert_stats().slots == slots  # type: ignore[union-attr]
        finally:
            gc.enable()


def test_a_restored_session_has_its_caches_once(tmp_path: Path) -> None:
    """Those of the file and the session's own are both there for a while: refused where that has no room."""
    long = changed({"max_tokens": 512}, layers=2, context=4096)
    built = build.compile(long, checkpoint=synthesize(long, tmp_path / "c", qat=True), out=tmp_path / "a")
    model, file = built.path("model.pte"), tmp_path / "session"
    ids = np.random.default_rng(5).integers(0, VOCAB, 4000).tolist()
    with opened_within(model, 1, threads=2) as session:
        session.prefill(ids)
        session.save(file)
        wanted = session.prefill([3])
        with pytest.raises(NoRoomError, match="restore into a new session or one that was reset"):
            session.restore(file)
        assert session.position == 4001  # as it was
        prefixes = PrefixCache(tmp_path / "prefixes", built.manifest.contents)
        prefixes.keep(session)
        kept = list((tmp_path / "prefixes").iterdir())
        session.rewind(1)  # the caches of 4,001 tokens are still there
        assert prefixes.restore(session, [*ids, 3, 4], 1) == 4001
        assert list((tmp_path / "prefixes").iterdir()) == kept
        session.reset()
        session.restore(file)
        np.testing.assert_array_equal(session.prefill([3]), wanted)
    with CpuSession(model, threads=2) as session:  # with room for both
        session.prefill(ids[:10])
        session.restore(file)
        np.testing.assert_array_equal(session.prefill([3]), wanted)


def test_another_model_of_the_same_file_counts(artifact: Artifact) -> None:
    model = artifact.path("model.pte")
    alone = least_mb(model)
    with CpuSession(model, threads=1) as other:
        other.prefill(list(range(100)))  # most experts of all layers
        assert least_mb(model) >= alone + 0.5 * model.stat().st_size / 1e6


def bringing(artifact: Artifact, folder: Path, memory_mb: int) -> Artifact:
    """A copy that brings a budget."""
    copy = shutil.copytree(artifact.folder, folder)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["spec"]["targets"]["xnnpack"]["memory_mb"] = memory_mb
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return Artifact.open(copy)


def test_a_model_without_experts_is_not_compiled_with_a_budget(tmp_path: Path) -> None:
    facts = {k: v for k, v in MODEL.items() if k != "moe"} | {"architecture": "mobilellm", "ffn_width": 96, "layers": 1}
    raw = {"name": "dense", "model": facts, "targets": {"xnnpack": {"memory_mb": 4000}}}
    dense = Spec.model_validate({**raw, "quantization": {"weights": "int4", "group_size": 32}})
    checkpoint = synthesize(dense, tmp_path / "c", qat=True)
    with pytest.raises(CompileError, match=r"memory_mb needs routed experts.*leave memory_mb out"):
        build.compile(dense, checkpoint=checkpoint, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_draft_is_in_memory_whatever_budget_it_brings(artifact: Artifact, tmp_path: Path) -> None:
    draft = bringing(artifact, tmp_path / "a", 1)
    with pytest.raises(RunError, match="a memory budget of 1 MB is less than"):
        load(draft)
    with load(artifact) as session, load_draft(draft, artifact, session) as helper:
        assert isinstance(helper, CpuSession)
        assert helper.expert_stats() is None


def test_a_budget_counts_what_makes_text(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is read before the budget is counted; without a budget, when text is first asked for."""
    done = []
    target = type(target_of(artifact))
    opening = target.load

    def opened(self: Target, of: Artifact) -> Session:
        done.append("model")
        return opening(self, of)

    assistant = SimpleNamespace(prefixes=None)

    def made(of: Artifact) -> SimpleNamespace:
        done.append("text")
        return assistant

    monkeypatch.setattr(target, "load", opened)
    monkeypatch.setattr(Assistant, "of", made)
    for within in (artifact.within(AMPLE_MB), bringing(artifact, tmp_path / "a", AMPLE_MB)):
        with load(within) as session:
            assert done == ["text", "model"]
            assert session.writer() is assistant  # type: ignore[attr-defined]
            assert done == ["text", "model"]  # once
        done.clear()
    with load(artifact):
        assert done == ["model"]


def test_a_draft_is_refused(artifact: Artifact) -> None:
    within = artifact.within(AMPLE_MB)
    with load(within) as session, pytest.raises(RunError, match=r"not count .* of a draft; leave --draft out"):
        load_draft(artifact, within, session)


@pytest.mark.parametrize("budget", [0, -1, 10**12])
def test_a_number_that_is_no_budget(artifact: Artifact, budget: int, moec: Moec) -> None:
    with pytest.raises(RunError, match=f"--memory-mb {budget}: .*; give another --memory-mb") as caught:
        artifact.within(budget)
    assert "damaged" not in str(caught.value)
    refused(moec("run", artifact.folder, "--ids", "1", "--memory-mb", str(budget)), "--memory-mb")


def test_bench_says_what_it_was_within(artifact: Artifact, moec: Moec) -> None:
    status, out, err = moec("bench", artifact.folder, "--memory-mb", "4000", "--prefill", "8", "--repeats", "1")
    assert status == 0, err
    all_fit = rf"within 4000 MB: {LAYERS * EXPERTS} of {LAYERS * EXPERTS} experts fit"
    share = r"\d+% of the selected experts were in memory, \d.* read"
    assert re.search(rf"{all_fit}; decoding from position 8: {share}\n", out), out
    contexts = ("--context", "16,32", "--decode", "4", "--repeats", "1")
    status, out, err = moec("bench", artifact.folder, "--memory-mb", "4000", "--prefill", "8", *contexts)
    assert status == 0, err
    assert re.findall(rf"{all_fit}; decoding from position (\d+): {share}\n", out) == ["16", "32"], out


def test_a_model_without_experts_is_not_told_to_give_more(tmp_path: Path, moec: Moec) -> None:
    facts = {k: v for k, v in MODEL.items() if k != "moe"} | {"architecture": "mobilellm", "ffn_width": 96, "layers": 1}
    dense = Spec.model_validate(
        {"name": "dense", "model": facts, "quantization": {"weights": "int4", "group_size": 32}}
    )
    built = build.compile(dense, checkpoint=synthesize(dense, tmp_path / "c", qat=True), out=tmp_path / "a")
    fault = moec("run", built.folder, "--ids", "1", "--memory-mb", "4000")
    refused(fault, "a memory budget needs routed experts", "run it without --memory-mb, or compile it without")


def test_a_device_gets_the_budget_that_an_artifact_brings(artifact: Artifact, moec: Moec, tmp_path: Path) -> None:
    copy = bringing(artifact, tmp_path / "a", 4000)
    status, out, err = moec("profile", copy.folder, "--adb", "--dry-run", "--context", "16")
    assert status == 0, err
    assert "--memory-mb 4000 --eviction lrfu > result.json" in out + err
