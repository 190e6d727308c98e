"""Cache-aware selection: what it may change and what not, more hits than without it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.assistant.load import load
from moec.checkpoints import open_store, synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import RunError
from moec.compiler.spec import Spec
from moec.targets.xnnpack.memory import ExpertCacheOptions, ExpertStats
from moec.targets.xnnpack.session import CpuSession
from tests.conftest import Moec, refused
from tests.targets.test_memory_budget import EXPERTS, LAYERS, TOP_K, VOCAB, least_mb, spec

SHARE = 0.25
IDS = np.random.default_rng(3).integers(0, VOCAB, 120).tolist()
PROMPT = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(spec(), tmp_path_factory.mktemp("ck") / "c", seed=0, qat=True)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build.compile(spec(), checkpoint=checkpoint, out=tmp_path_factory.mktemp("art") / "a")


def decoded(model: Path, budget: int | None, share: float, threads: int = 1) -> tuple[Any, ...]:
    """(logits of the prompt, logits of tokens run alone, traces of these, stats)."""
    options = ExpertCacheOptions(cache_aware=share)
    session = CpuSession(model, threads=threads, memory_mb=budget, experts=options, exact_calls=True)
    try:
        assert session.exact_calls == (share == 0)
        prompt = session.prefill(IDS[:PROMPT])
        session.trace(True)
        alone = np.stack([session.decode(token) for token in IDS[PROMPT:]])
        return prompt, alone, session.take_traces(), session.expert_stats()
    finally:
        session.close()


def test_only_what_is_run_alone_changes_and_as_the_rule_says(artifact: Artifact, checkpoint: Path) -> None:
    """Every selection of every layer, against a cache and a router in numpy."""
    model = artifact.path("model.pte")
    budget = least_mb(model) + 8
    plain = decoded(model, budget, 0.0)
    aware = decoded(model, budget, SHARE)
    np.testing.assert_array_equal(plain[0], aware[0])
    stats: ExpertStats = aware[3]
    assert plain[3].preferred == 0
    assert stats.preferred == stats.slots // LAYERS * LAYERS
    assert LAYERS * TOP_K <= stats.preferred < LAYERS * EXPERTS
    assert stats.misses < 0.8 * plain[3].misses

    built = spec().model
    store = open_store(checkpoint, built)  # type: ignore[arg-type]
    routers = [store[f"model.layers.{n}.feed_forward.router.weight"].load().double().numpy() for n in range(LAYERS)]
    biases = [store[f"model.layers.{n}.feed_forward.expert_bias"].load().double().numpy() for n in range(LAYERS)]
    recent: list[tuple[int, int]] = []  # the one used last first
    different = unclear = 0
    for number, trace in enumerate(aware[2]):
        layer = number % LAYERS
        logits = trace.x_TD[0].astype(np.float64) @ routers[layer].T
        choice = 1 / (1 + np.exp(-logits)) + biases[layer]
        raised = choice.copy()
        raised[[e for at, e in recent if at == layer]] += SHARE * (choice.max() - choice.min())
        raised[choice.argmax()] = np.inf
        order = np.argsort(-raised)
        selected = trace.indices_TK[0].tolist()
        # float32 against float64: two that are nearer than 1e-6 may change places
        if abs(raised[order[TOP_K - 1]] - raised[order[TOP_K]]) < 1e-6:
            unclear += 1
        else:
            assert set(order[:TOP_K].tolist()) == set(selected)
        different += set(np.argsort(-choice)[:TOP_K].tolist()) != set(selected)
        scores = 1 / (1 + np.exp(-logits[selected]))
        np.testing.assert_allclose(trace.weights_TK[0], scores / scores.sum(), rtol=1e-5)  # the router's own
        for expert in sorted(selected):
            if (layer, expert) in recent:
                recent.remove((layer, expert))
            recent.insert(0, (layer, expert))
        del recent[stats.preferred :]
    assert unclear < 5
    assert different > 50
    assert not np.array_equal(plain[1], aware[1])


def test_the_same_on_any_number_of_threads(artifact: Artifact) -> None:
    """For the same history and as many experts taken to be in memory, which a budget gives within a megabyte or two."""
    model = artifact.path("model.pte")
    one = decoded(model, least_mb(model) + 8, SHARE)
    for more in range(4, 14):
        three = decoded(model, least_mb(model, 3) + more, SHARE, threads=3)
        if three[3].preferred == one[3].preferred:
            np.testing.assert_array_equal(three[1], one[1])
            return
    raise AssertionError("no budget gave as many experts")


def test_what_is_refused(artifact: Artifact) -> None:
    model = artifact.path("model.pte")
    with pytest.raises(RunError, match="cache-aware selection needs a memory budget; add --memory-mb N"):
        load(artifact, cache_aware=0.1)
    with pytest.raises(RunError, match=r"cache-aware selection by 1.5; give a number from 0 to 1"):
        load(artifact, memory_mb=4000, cache_aware=1.5)
    with pytest.raises(RunError, match="with eviction lfu; use eviction lru"):
        ExpertCacheOptions("lfu", cache_aware=0.1)
    session = load(artifact, memory_mb=4000, cache_aware=0.0)
    assert isinstance(session, CpuSession)
    assert session.expert_stats().preferred == 0  # type: ignore[union-attr]
    session.close()
    assert model.exists()


def test_the_command_line(artifact: Artifact, moec: Moec) -> None:
    ids = ("--ids", "1,2,3", "--max-new-tokens", "5")
    refused(moec("run", artifact.folder, *ids, "--cache-aware", "0.1"), "needs a memory budget", "add --memory-mb N")
    assert moec("run", artifact.folder, *ids, "--memory-mb", "4000", "--cache-aware", "2")[0] == 2
    status, _, err = moec("run", artifact.folder, *ids, "--memory-mb", "4000", "--cache-aware", "0.1")
    assert status == 0
    assert "cache-aware selection by 0.1: outputs depend on which experts are in memory" in err
    status, out, err = moec(
        "bench", artifact.folder, "--memory-mb", "4000", "--cache-aware", "0.1", "--prefill", "8", "--decode", "4",
        "--repeats", "1", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["experts"]["preferred"] == LAYERS * EXPERTS
    assert "outputs depend" in err


def test_an_artifact_cannot_bring_it(checkpoint: Path) -> None:
    """So that `verify`, `diff` and every report see selections that are the router's."""
    with pytest.raises(ValueError, match="cache_aware"):
        Spec.model_validate(spec().model_dump(mode="json", exclude_none=True) | {
            "targets": {"xnnpack": {"memory_mb": 4000, "cache_aware": 0.1}}
        })  # fmt: skip
