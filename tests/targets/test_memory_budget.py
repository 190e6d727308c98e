"""A budget of memory: equal logits at every budget, peak memory within it, one line for whatever goes wrong; and what
cache-aware selection may change.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.assistant.load import load
from moec.checkpoints import open_store, synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import RunError, UserError
from moec.compiler.spec import Spec
from moec.targets.xnnpack.memory import EVICTIONS, ExpertCacheOptions, ExpertStats
from moec.targets.xnnpack.session import CpuSession
from tests.conftest import Moec, refused
from tests.targets.budgets import (
    AMPLE_MB,
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    MODEL,
    TOP_K,
    VOCAB,
    changed,
    least_mb,
    opened_within,
    spec,
)
from tests.variants import crossed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(spec(), tmp_path_factory.mktemp("ck") / "c", seed=0, qat=True)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build.compile(spec(), checkpoint=checkpoint, out=tmp_path_factory.mktemp("art") / "a")


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> Path:
    return artifact.path("model.pte")


def logits(session: CpuSession) -> np.ndarray:
    """A prompt in calls of 100, 27, 9 and 2 tokens, then tokens alone: every schedule of the kernels.

    A small budget takes shorter calls.
    """
    ids = np.random.default_rng(7).integers(0, VOCAB, 170).tolist()
    found, at = [], 0
    for count in (100, 27, 9, 2, *[1] * 32):
        found.append(session.prefill(ids[at : at + count]))
        at += count
    return np.concatenate(found)


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    session = CpuSession(model, threads=1)
    try:
        return logits(session)
    finally:
        session.close()


@pytest.mark.parametrize(
    ("room", "how"),
    crossed(itertools.product([1, 4, 16, 200], [False, True]), tuple(itertools.product([1, 3], EVICTIONS))),
)
def test_equal_bit_for_bit(model: Path, expected: np.ndarray, room: tuple[int, bool], how: tuple[int, str]) -> None:
    (more, ahead), (threads, eviction) = room, how
    options = ExpertCacheOptions(eviction, readers=3, read_ahead=ahead)
    session = opened_within(model, more, threads=threads, experts=options)
    try:
        np.testing.assert_array_equal(logits(session), expected)
        stats = session.expert_stats()
    finally:
        session.close()
    assert stats is not None
    assert stats.experts == LAYERS * EXPERTS
    assert LAYERS * TOP_K <= stats.slots <= stats.experts
    assert 0 <= stats.ahead_used <= stats.ahead
    # at most one expert for each reader is half read when the numbers are taken
    assert 0 <= (stats.misses + stats.ahead) - stats.bytes_read / EXPERT_BYTES <= (3 if ahead else 0)
    assert ahead or stats.ahead == 0
    assert stats.slots * stats.slot_bytes <= stats.budget
    if stats.slots == stats.experts:  # everything fits: an expert is read once
        assert stats.misses + stats.ahead <= stats.experts
    else:
        assert stats.misses + stats.ahead > stats.slots


def test_without_a_budget_there_is_no_cache(model: Path) -> None:
    session = CpuSession(model, threads=1)
    assert session.expert_stats() is None
    session.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_counts_by_layer(model: Path, ahead: bool) -> None:
    """They add up to those of all; hits and misses are what the router selected in each layer."""
    ids = np.random.default_rng(5).integers(0, VOCAB, 40).tolist()
    options = ExpertCacheOptions(read_ahead=ahead)
    with opened_within(model, 4, threads=2, experts=options) as session:
        assert [layer.hits + layer.misses for layer in session.layer_expert_stats()] == [0] * LAYERS
        assert session.layer_expert_stats()[0].overlapped is None
        session.trace(True)
        asked = [0] * LAYERS
        for token in ids:
            session.prefill([token])
            for trace in session.take_traces():
                asked[trace.layer] += trace.indices_TK.size
        layers, total = session.layer_expert_stats(), session.expert_stats()
    assert total is not None
    assert [layer.hits + layer.misses for layer in layers] == asked
    for name in ("hits", "misses", "bytes_read", "stalled_ns", "reading_ns", "ahead", "ahead_used"):
        assert sum(getattr(layer, name) for layer in layers) == getattr(total, name)
    assert layers[0].ahead == 0  # nothing comes before it
    for counts in (*layers, total):
        assert 0 <= counts.misses + counts.ahead - counts.bytes_read / EXPERT_BYTES <= (4 if ahead else 0)
        assert 0 < counts.active_ns <= counts.reading_ns * 1.5 + 10**7  # of several readers; counted around the reads
        assert 0 <= counts.exposed_ns <= min(counts.active_ns, counts.waiting_ns)
        assert counts.waiting_ns <= counts.stalled_ns
        assert counts.overlapped == 1 - counts.exposed_ns / counts.active_ns
    with CpuSession(model, threads=1) as session:
        assert session.layer_expert_stats() == []


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7])
def test_the_peak_stays_within(artifact: Artifact, moec: Moec, fraction: float) -> None:
    """The runner's peak resident set: no Python in it. 2% more than the budget is allowed, pages being counted late."""
    status, out, err = moec("bench", artifact.folder, "--memory-mb", "1")
    found = re.search(r"a memory budget of 1 MB is less than (\d+) MB: .*give a larger --memory-mb\n", err)
    assert (status, out, bool(found)) == (2, "", True), err
    assert found is not None
    experts_mb = artifact.manifest.sizes_by_role["expert"] / 1e6
    budget = round(int(found[1]) + 1 + fraction * experts_mb)
    status, out, err = moec(
        "bench",
        artifact.folder,
        "--memory-mb",
        budget,
        "--prefill",
        "120",
        "--decode",
        "40",
        "--repeats",
        "2",
        "--json",
    )
    assert status == 0, err
    report = json.loads(out)
    assert report["peak_rss_mb"] <= 1.02 * budget
    assert report["experts"]["budget_mb"] == budget
    assert report["experts"]["misses"] > 0
    experts = report["experts"]
    assert 0 <= experts["exposed_s"] <= min(experts["active_s"], experts["waiting_s"]) + 1e-6
    assert experts["overlapped"] == pytest.approx(1 - experts["exposed_s"] / experts["active_s"])
    decoded = report["decode_experts"]  # of the last of two repeats
    assert decoded["hits"] + decoded["misses"] == 40 * LAYERS * TOP_K
    assert 0 < decoded["bytes_read"] < experts["bytes_read"] / 2
    assert 0 <= report["experts"]["slots"] - fraction * LAYERS * EXPERTS < 60


# only there a mapped file can be in huge pages, and only there a process can see how it is mapped
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="huge pages and /proc/self/smaps of Linux"
)
def test_experts_in_the_file_are_not_mapped_by_huge_pages(model: Path) -> None:
    """Where the file is in huge pages, one of them would bring experts into memory that the budget does not count."""

    def forbidden() -> int:
        """KiB of the mapped file that must not be in huge pages."""
        found, size, ours = 0, 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                ours = line.endswith(str(model))
            elif line.startswith("Size:"):
                size = int(line.split()[1])
            elif ours and line.startswith("VmFlags:") and " nh" in line:
                found += size
        return found

    with CpuSession(model) as session:
        session.prefill([1])
        assert forbidden() == 0
    with opened_within(model, 4):
        experts = LAYERS * EXPERTS * EXPERT_BYTES / 1024
        # each of the two matrices of a layer begins and ends within a page
        assert experts <= forbidden() <= experts + 2 * LAYERS * 8


def test_sessions_share_one_cache(model: Path) -> None:
    """A second session's caches are taken from the experts, and given back; one too many is refused."""
    first = opened_within(model, 4, threads=1)
    ids = list(range(40))
    first.prefill(ids)
    before = first.expert_stats()
    assert before is not None
    second = first.fork()
    shared = second.expert_stats()
    assert shared is not None
    assert shared.misses == before.misses
    np.testing.assert_array_equal(second.prefill([1, 2, 3]), first.prefill([1, 2, 3]))
    others = [second]

    def fork_on() -> None:
        while len(others) < 100:
            others.append(first.fork())

    with pytest.raises(RunError, match="has no room for the caches of another session"):
        fork_on()
    crowded = first.expert_stats()
    assert crowded is not None
    assert LAYERS * TOP_K <= crowded.slots < before.slots
    for other in others:
        other.close()
    after = first.expert_stats()
    assert after is not None
    assert after.slots == before.slots
    first.prefill([4])
    first.close()


SESSIONS_FIRST = """
import ctypes, sys
from moec.targets.xnnpack.session import _ExpertStats, _runtime
r, path, budget, count = _runtime(), sys.argv[1].encode(), int(sys.argv[2]), int(sys.argv[3])
model = r.moec_model_open(path, 1)
sessions = [r.moec_session_open(model) for _ in range(count)]
assert not any(r.moec_session_error(s) for s in sessions)
status = r.moec_model_limit_memory(model, budget, 0, 1)
stats = _ExpertStats()
r.moec_session_expert_stats(sessions[0], ctypes.byref(stats))
print(status, stats.slots, r.moec_model_error(model).decode())
"""


def limited(model: Path, budget: int, sessions: int) -> tuple[int, int, str]:
    """(status, slots, error) of a budget in bytes for a model of which so many sessions are open already."""
    command = [sys.executable, "-c", SESSIONS_FIRST, str(model), str(budget), str(sessions)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    status, slots, *error = done.stdout.rstrip("\n").split(" ", 2)
    return int(status), int(slots), "".join(error)


def test_sessions_that_are_open_before_the_budget_count(model: Path) -> None:
    """The caches of 20 more sessions take slots, whenever these were opened; too many of them are refused."""
    found = re.search(r"less than (\d+) MB", limited(model, 1, 1)[2])
    assert found
    budget = (int(found[1]) + 6) * 10**6
    (status, alone, _), (same, shared, _) = limited(model, budget, 1), limited(model, budget, 21)
    assert (status, same) == (0, 0)
    assert shared < alone - 8  # 4 MB, of which 2 are kept for other uses; a slot is 0.1 MB
    status, slots, error = limited(model, budget, 200)
    assert (status, slots) == (-1, 0)
    assert "has no room for the caches of another session" in error


def test_the_least_budget_is_enough_where_long_calls_take_much_memory(tmp_path: Path) -> None:
    """Activations are planned for 2,048 tokens; a token alone needs few of them."""
    long = changed({"max_tokens": 2048}, layers=2, context=2048)
    built = build.compile(long, checkpoint=synthesize(long, tmp_path / "c", qat=True), out=tmp_path / "a")
    model = built.path("model.pte")
    with CpuSession(model, threads=1) as session:
        wanted = session.prefill([1, 2, 3])
    with opened_within(model, 2, threads=1) as session:
        slots = session.expert_stats().slots  # type: ignore[union-attr]
        np.testing.assert_array_equal(session.prefill([1, 2, 3]), wanted)
        assert session.expert_stats().slots == slots  # type: ignore[union-attr]


@pytest.mark.parametrize(("experts", "top_k"), [(4, 4), (4, 1), (64, 64), (256, 1), (256, 32)])
def test_few_experts_and_many_one_selected_and_all(tmp_path: Path, experts: int, top_k: int) -> None:
    """Where every expert is selected, the least budget holds them all."""
    moe = {"experts": experts, "top_k": top_k, "expert_width": 64}
    other = changed({}, layers=2, moe=moe)
    built = build.compile(other, checkpoint=synthesize(other, tmp_path / "c", qat=True), out=tmp_path / "a")
    model = built.path("model.pte")
    with CpuSession(model, threads=2) as session:
        wanted = logits(session)
    for more in (0, 2):
        with opened_within(model, more, threads=2) as session:
            np.testing.assert_array_equal(logits(session), wanted)
            stats = session.expert_stats()
        assert stats is not None
        assert stats.slots >= 2 * top_k
        assert stats.slots == stats.experts or stats.misses + stats.ahead > stats.slots


@pytest.mark.slow
def test_a_context_of_8192_to_its_end(tmp_path: Path) -> None:
    """A prompt in one call, tokens alone until the context is full, and an error at the one that does not fit."""
    long = changed({"max_tokens": 2048}, layers=2, context=8192)
    built = build.compile(long, checkpoint=synthesize(long, tmp_path / "c", qat=True), out=tmp_path / "a")
    model = built.path("model.pte")
    ids = np.random.default_rng(3).integers(0, VOCAB, 8192).tolist()

    def whole(opened: CpuSession) -> np.ndarray:
        with opened as session:
            found = [session.prefill(ids[:8160]), *(session.prefill([token]) for token in ids[8160:])]
            with pytest.raises(UserError, match="8192"):
                session.prefill([1])
        return np.concatenate(found)

    wanted = whole(CpuSession(model, threads=2))
    for more in (2, 40):
        np.testing.assert_array_equal(whole(opened_within(model, more, threads=2)), wanted)


def test_what_a_large_budget_leaves_is_for_sessions_and_long_calls(model: Path) -> None:
    """All experts fit, with much to spare: nobody takes their memory, and no session is refused."""
    first = opened_within(model, 2000, threads=1)
    assert first.expert_stats().slots == LAYERS * EXPERTS  # type: ignore[union-attr]
    first.prefill(list(range(120)))
    others = [first.fork() for _ in range(60)]
    assert first.expert_stats().slots == LAYERS * EXPERTS  # type: ignore[union-attr]
    for session in (*others, first):
        session.close()


def merged(program: bytes, half: int) -> bytes:
    """A program whose layers have one gate/up matrix (half 0) or one down: the place of the first is that of all."""

    def number(at: int, form: str) -> int:
        return int(struct.unpack_from("<" + form, program, at)[0])

    def field(table: int, index: int) -> int:  # where a flatbuffer's table has a field
        return table + number(table - number(table, "i") + 4 + 2 * index, "H")

    def follow(at: int) -> int:
        return at + number(at, "I")

    offsets = follow(field(follow(field(follow(0), 5)), 1))  # of the constants, in their segment
    count = number(offsets, "I")
    places = [number(offsets + 4 + 8 * i, "Q") for i in range(count)]
    ends = dict(zip(sorted(places), [*sorted(places)[1:], 0], strict=True))
    sizes = [ends[place] - place for place in places]
    wanted = sorted(set(sizes))[-1 - half]  # gate/up is twice as large as down, and no other constant is as large
    same = [i for i in range(count) if sizes[i] == wanted]
    assert len(same) == LAYERS
    changed = bytearray(program)
    for i in same:
        struct.pack_into("<Q", changed, offsets + 4 + 8 * i, places[same[0]])
    return bytes(changed)


@pytest.mark.parametrize("half", [0, 1])
def test_layers_that_share_one_half_of_their_experts_are_refused(model: Path, tmp_path: Path, half: int) -> None:
    """The address of gate/up names a layer to the cache, and would give all of them the down matrices of one; a down
    matrix of two layers would be counted twice."""
    copy = tmp_path / "model.pte"
    copy.write_bytes(merged(model.read_bytes(), half))
    with CpuSession(copy, threads=1) as session:
        session.prefill([1, 2, 3])
    with pytest.raises(RunError, match="two layers of the model share one half of theirs"):
        CpuSession(copy, threads=1, memory_mb=AMPLE_MB)


def test_a_layer_that_selects_more_experts_than_it_has_is_damaged(model: Path, tmp_path: Path) -> None:
    """Every 8-byte number of the program that is top_k becomes 2^31 in turn: the room for what is read ahead is of its
    size."""
    program = model.read_bytes()
    (length,) = struct.unpack_from("<Q", program, 16)
    places = [at for at in range(0, length - 8, 4) if program[at : at + 8] == struct.pack("<Q", TOP_K)]
    faults = []
    copy = tmp_path / "model.pte"
    for at in places:
        copy.write_bytes(program[:at] + struct.pack("<Q", 2**31) + program[at + 8 :])
        try:
            CpuSession(copy, threads=1, memory_mb=AMPLE_MB).close()
        except UserError as error:
            faults.append(str(error))
    assert any("a layer selects more experts than it has, or none" in fault for fault in faults), (places, faults)


def test_a_file_that_is_cut_while_it_is_read(model: Path, tmp_path: Path) -> None:
    copy = shutil.copy(model, tmp_path / "model.pte")
    session = opened_within(copy, 2, threads=2)
    session.prefill([1, 2, 3])
    os.truncate(copy, copy.stat().st_size // 2)

    def read_on() -> None:
        for token in range(150):
            session.prefill([token])

    with pytest.raises(RunError, match="truncated while it is in use") as caught:
        read_on()
    assert "\n" not in str(caught.value)
    session.close()


def test_the_command_line(artifact: Artifact, moec: Moec) -> None:
    ids = ("--ids", "1,2,3", "--max-new-tokens", "5")
    plain = moec("run", artifact.folder, *ids)
    assert plain[0] == 0, plain[2]
    status, out, err = moec("run", artifact.folder, *ids, "--memory-mb", AMPLE_MB)
    assert (status, out) == (0, plain[1]), err
    refused(moec("run", artifact.folder, *ids, "--memory-mb", "20"), "less than", "give a larger --memory-mb")
    assert moec("run", artifact.folder, *ids, "--memory-mb", "0")[0] == 2
    serve = moec("serve", artifact.folder, "--port", "0", "--memory-mb", "20")  # takes the budget: refuses this one
    refused(serve, "less than", "give a larger --memory-mb")


def test_an_artifact_can_bring_its_own(checkpoint: Path, tmp_path: Path) -> None:
    """`targets: {xnnpack: {memory_mb: N}}`; `moec.load(..., memory_mb=N)` wins."""
    built = build.compile(spec(memory_mb=AMPLE_MB, eviction="lfu"), checkpoint=checkpoint, out=tmp_path / "a")
    for given, wanted in ((None, AMPLE_MB), (2 * AMPLE_MB, 2 * AMPLE_MB)):
        session = load(built, memory_mb=given)
        assert isinstance(session, CpuSession)
        stats = session.expert_stats()
        session.close()
        assert stats is not None
        assert stats.budget == wanted * 1_000_000


def test_what_has_no_experts_takes_no_budget(tmp_path: Path) -> None:
    changes = {"architecture": "mobilellm", "layers": 1, "moe": None, "ffn_width": 64}
    dense = spec().model_copy(update={"name": "dense"})
    dense = Spec.model_validate({**dense.model_dump(exclude_none=True, mode="json"), "model": {**MODEL, **changes}})
    checkpoint = synthesize(dense, tmp_path / "c", seed=0, qat=True)
    built = build.compile(dense, checkpoint=checkpoint, out=tmp_path / "a")
    with pytest.raises(RunError, match="needs routed experts"):
        load(built, memory_mb=AMPLE_MB)


@pytest.mark.parametrize("options", [("mru", 4), ("lru", 0), ("lru", 65)])
def test_options_that_make_no_sense(options: tuple[str, int]) -> None:
    with pytest.raises(RunError):
        ExpertCacheOptions(*options)


# --- cache-aware selection --------------------------------------------------------------------------------------------

SHARE = 0.25
IDS = np.random.default_rng(3).integers(0, VOCAB, 120).tolist()
PROMPT = 40


def decoded(model: Path, budget: int | None, share: float, threads: int = 1) -> tuple[Any, ...]:
    """(logits of the prompt, logits of tokens run alone, traces of these, stats)."""
    options = ExpertCacheOptions("lru", cache_aware=share, read_ahead=False)
    session = CpuSession(model, threads=threads, memory_mb=budget, experts=options, exact_calls=True)
    try:
        assert session.exact_calls == (share == 0)
        prompt = session.prefill(IDS[:PROMPT])
        session.trace(True)
        alone = np.stack([session.decode(token) for token in IDS[PROMPT:]])
        return prompt, alone, session.take_traces(), session.expert_stats()
    finally:
        session.close()


def test_cache_aware_selection_changes_only_what_is_run_alone_and_as_the_rule_says(
    artifact: Artifact, checkpoint: Path
) -> None:
    """Every selection of every layer, against a cache and a router in numpy."""
    model = artifact.path("model.pte")
    budget = least_mb(model) + 8  # few megabytes more or less are as good
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


def preferred(model: Path, budget: int, threads: int) -> int:
    session = CpuSession(model, threads=threads, memory_mb=budget, experts=ExpertCacheOptions(cache_aware=SHARE))
    try:
        return session.expert_stats().preferred  # type: ignore[union-attr]
    finally:
        session.close()


def test_cache_aware_selection_is_the_same_on_any_number_of_threads(artifact: Artifact) -> None:
    """For the same history and as many experts taken to be in memory, which depends on what else the process holds."""
    model = artifact.path("model.pte")
    found: dict[int, dict[int, int]] = {1: {}, 3: {}}  # the budget for each number of experts
    for threads, budgets in found.items():
        least = least_mb(model, threads)
        budgets.update((preferred(model, least + more, threads), least + more) for more in range(4, 20))
    for same in sorted(found[1].keys() & found[3].keys()):
        one, three = (decoded(model, found[threads][same], SHARE, threads) for threads in (1, 3))
        if one[3].preferred == three[3].preferred < LAYERS * EXPERTS:
            np.testing.assert_array_equal(three[1], one[1])
            return
    raise AssertionError(f"no budget gave as many experts: {found}")


def test_what_cache_aware_selection_is_refused_with(artifact: Artifact) -> None:
    model = artifact.path("model.pte")
    with pytest.raises(RunError, match="cache-aware selection needs a memory budget; add --memory-mb N"):
        load(artifact, cache_aware=0.1)
    with pytest.raises(RunError, match=r"cache-aware selection by 1.5; give a number from 0 to 1"):
        load(artifact, memory_mb=AMPLE_MB, cache_aware=1.5)
    session = load(artifact, memory_mb=AMPLE_MB, cache_aware=0.0)
    assert isinstance(session, CpuSession)
    assert session.expert_stats().preferred == 0  # type: ignore[union-attr]
    session.close()
    assert model.exists()


def test_cache_aware_on_the_command_line(artifact: Artifact, moec: Moec) -> None:
    ids = ("--ids", "1,2,3", "--max-new-tokens", "5")
    refused(moec("run", artifact.folder, *ids, "--cache-aware", "0.1"), "needs a memory budget", "add --memory-mb N")
    assert moec("run", artifact.folder, *ids, "--memory-mb", AMPLE_MB, "--cache-aware", "2")[0] == 2
    status, _, err = moec("run", artifact.folder, *ids, "--memory-mb", AMPLE_MB, "--cache-aware", "0.1")
    assert status == 0
    assert "cache-aware selection by 0.1: outputs depend on which experts are in memory" in err
    status, out, err = moec(
        "bench", artifact.folder, "--memory-mb", AMPLE_MB, "--cache-aware", "0.1", "--prefill", "8", "--decode", "4",
        "--repeats", "1", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["experts"]["preferred"] == LAYERS * EXPERTS
    assert "outputs depend" in err


def test_an_artifact_cannot_bring_cache_aware_selection(checkpoint: Path) -> None:
    """So that `verify`, `diff` and every report see selections that are the router's."""
    with pytest.raises(ValueError, match="cache_aware"):
        Spec.model_validate(spec().model_dump(mode="json", exclude_none=True) | {
            "targets": {"xnnpack": {"memory_mb": 4000, "cache_aware": 0.1}}
        })  # fmt: skip
