"""What `make bench-flash` computes: policies against a plain model of them, replayed routing, limits of a group."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from tests.tiny import tiny_text

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def _trace(seed: int, tokens: int = 120, layers: int = 3, experts: int = 8, k: int = 2) -> list[list[tuple[int, int]]]:
    """With preferences that drift, so that policies differ."""
    drawn, trace = random.Random(seed), []
    for token in range(tokens):
        for layer in range(layers):
            near = [(token // 12 + layer + i) % experts for i in range(4)]
            chosen = drawn.sample(near, k) if drawn.random() < 0.7 else drawn.sample(range(experts), k)
            trace.append([(layer, expert) for expert in chosen])
    return trace


def _plain(trace: list[list[tuple[int, int]]], slots: int, value: Any) -> float:
    """Hits of a cache that looks at all it holds for each expert it gives up."""
    held: set[tuple[int, int]] = set()
    found = asked = 0
    for now, uses in enumerate(trace):
        asked += len(uses)
        found += sum(use in held for use in uses)
        past = trace[: now + 1]
        for use in uses:
            if use in held:
                continue
            if len(held) >= slots:
                others = held - set(uses)
                if not others:
                    continue
                held.remove(min(others, key=lambda other: (value(past, trace[now + 1 :], other), other)))
            held.add(use)
    return found / asked


def _last(past: Any, _: Any, use: Any) -> float:
    return max(i for i, uses in enumerate(past) if use in uses)


def _count(past: Any, future: Any, use: Any) -> tuple[int, float]:
    return sum(use in uses for uses in past), _last(past, future, use)


def _next(_: Any, future: Any, use: Any) -> float:
    return -next((i for i, uses in enumerate(future) if use in uses), len(future) + 1)


def _decayed(past: Any, _: Any, use: Any) -> float:
    return sum(2.0 ** ((i - len(past)) / 3 / 5) for i, uses in enumerate(past) if use in uses)


def _second(past: Any, future: Any, use: Any) -> tuple[bool, float]:
    times = [i for i, uses in enumerate(past) if use in uses]
    return (True, times[-2]) if len(times) > 1 else (False, times[-1])


@pytest.mark.parametrize("slots", [2, 5, 9, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_policies_are_those_of_a_plain_model(seed: int, slots: int) -> None:
    policies = importlib.import_module("policies")
    trace = _trace(seed)
    cases = [
        (policies.Lru(), _last), (policies.Lfu(), _count), (policies.Belady(trace), _next),
        (policies.Decayed(5), _decayed), (policies.Second(2), _second),
    ]  # fmt: skip
    for policy, value in cases:
        assert policies.hits(trace, slots, policy, 3) == _plain(trace, slots, value), type(policy).__name__


def test_belady_is_never_beaten() -> None:
    policies = importlib.import_module("policies")
    for row in policies.table_of(_trace(3), 3, 24, (0.1, 0.3, 0.5)):
        assert all(share <= row["Belady"] for share in row.values())


def test_halving_prefers_what_was_used_lately() -> None:
    policies = importlib.import_module("policies")
    aged, counted = policies.Aged(4), policies.Lfu()
    for policy in (aged, counted):
        for now in range(8):
            old = policy.seen((0, 0), now, 1)
        for now in range(40, 43):
            new = policy.seen((0, 1), now, 1)
        assert (new > old) == (policy is aged)


def test_neighbours_of_pairs_that_miss_together() -> None:
    policies = importlib.import_module("policies")
    pairs = [(0, 5), (1, 4), (2, 7), (3, 6)]
    trace = [[(0, e) for e in pairs[i % 4]] for i in range(200)]
    at_a_time, share = policies.neighbours(trace, 2, 1, 8)
    assert (at_a_time, share) == (2.0, 0.5)  # every second read is saved
    drawn = random.Random(0)
    scattered = [[(0, e) for e in drawn.sample(range(40), 2)] for _ in range(400)]
    assert policies.neighbours(scattered, 4, 1, 40)[1] < 0.1


def test_a_chain_has_no_circle_and_two_neighbours_at_most() -> None:
    policies = importlib.import_module("policies")
    a, b, c, d = ((0, i) for i in range(4))
    links = policies.chain(Counter({(a, b): 5, (b, c): 4, (a, c): 3, (b, d): 2, (c, d): 1}))
    assert links == {a: [b], b: [a, c], c: [b, d], d: [c]}


def test_layers_of_a_mapped_trace() -> None:
    routing = importlib.import_module("replayed_routing")
    chosen = np.arange(7 * 2).reshape(7, 2, 1)  # token t, layer l: 2 t + l
    mapped = routing.mapped(chosen, 5, 2)
    assert mapped[..., 0].tolist() == [[0, 1, 4, 5, 8], [2, 3, 6, 7, 10]]
    with pytest.raises(UserError, match="need 9 tokens of a trace of 2 layers, and it has 7"):
        routing.mapped(chosen, 5, 3)


def test_a_solved_router_selects_what_it_should() -> None:
    routing = importlib.import_module("replayed_routing")
    drawn = np.random.default_rng(0)
    x = drawn.standard_normal((40, 96))
    chosen = np.stack([drawn.permutation(12)[:3] for _ in range(40)])
    logits = x @ routing.solved(x, chosen, 12).T
    assert np.abs(logits).min() > 1.99
    assert np.array_equal(np.sort(np.argsort(-logits)[:, :3]), np.sort(chosen))


def test_drawn_experts_are_different_and_alike() -> None:
    routing = importlib.import_module("replayed_routing")
    found = routing.drawn(2000, 2, 10, 3)
    assert found.shape == (2000, 2, 3)
    assert all(len(set(row)) == 3 for row in found.reshape(-1, 3).tolist())
    counts = np.bincount(found.ravel(), minlength=10)
    assert np.abs(counts / counts.mean() - 1).max() < 0.1


def test_lookahead_is_as_right_as_asked() -> None:
    routing = importlib.import_module("replayed_routing")
    drawn = np.random.default_rng(0)
    x = drawn.standard_normal((200, 512))
    chosen = np.stack([[drawn.permutation(60)[:4] for _ in range(4)] for _ in range(200)])
    strength = routing.tuned(x, chosen, 60, 0.8)
    g = routing.gains(strength, 4, 512)
    routers = [(routing.solved(x, chosen[:, i], 60) / g[i], 0.0) for i in range(4)]
    inputs = [x * g[i] for i in range(4)]
    assert routing.lookahead_share(inputs, chosen, routers) == pytest.approx(0.8, abs=0.01)
    assert routing.lookahead_share([x * g[i + 1] for i in range(3)], chosen, routers) == 1.0
    scores = np.stack([x @ (r[0] * g[i]).T for i, r in enumerate(routers)], 1)
    assert np.array_equal(np.sort(np.argsort(-scores)[..., :4]), np.sort(chosen))


def test_the_runtime_repeats_a_trace(tmp_path: Path) -> None:
    routing = importlib.import_module("replayed_routing")
    spec = tmp_path / "spec.yaml"
    drawn = np.random.default_rng(1)
    chosen = np.stack([[drawn.permutation(16)[:4] for _ in range(2)] for _ in range(150)])
    trace = tmp_path / "trace.json.gz"
    routing.Recorded("random", 16, chosen, 0.7).write(trace)
    spec.write_text(tiny_text(layers=3), "utf-8")
    out = tmp_path / "made"
    artifact = routing.make(spec, trace, out, 60, 0.7, Progress(quiet=True), random=20)
    about = routing.json.loads((out / "routing.json").read_text())
    assert about["repeated"] == 1.0
    assert about["ahead"] == pytest.approx(0.7, abs=0.03)
    assert np.array_equal(about["chosen"], routing.mapped(chosen, 3, 60))
    # the cache of a budget is asked for the same experts
    own = routing.recorded(routing.Artifact.open(artifact), list(range(80)), window=20, keep=20)
    assert np.array_equal(own[:60], np.sort(routing.mapped(chosen, 3, 60)))
    assert np.array_equal(own[60:], np.sort(routing.drawn(20, 3, 16, 4)))
    assert not (out / "checkpoint").exists()
    routing.synthesize(routing.load_spec(spec), out / "checkpoint", qat=True)
    with pytest.raises(UserError, match="200 tokens in 128 dimensions"):
        routing.write_routing(
            out / "checkpoint", routing.decoder_of(routing.load_spec(spec), ""), np.zeros((200, 3, 4)), 0
        )


@pytest.mark.parametrize("text", ["[]", '{"name": "x", "experts": 4, "chosen": [[[4]]]}', '{"name": "x"}', "nothing"])
def test_a_file_that_is_no_trace(tmp_path: Path, text: str) -> None:
    routing = importlib.import_module("replayed_routing")
    file = tmp_path / "trace.json"
    file.write_text(text)
    with pytest.raises(UserError, match="not a trace of routing"):
        routing.Recorded.read(file)
    packed = tmp_path / "trace.json.gz"
    packed.write_text(text)
    with pytest.raises(UserError, match="not a trace of routing"):
        routing.Recorded.read(packed)


def test_a_group_of_version_2(tmp_path: Path) -> None:
    limits = importlib.import_module("limits")
    (tmp_path / "cgroup.controllers").write_text("cpu io memory\n")
    with limits.limited(memory_mb=600, root=tmp_path) as group:
        (folder,) = group.folders
        assert group.missing == ""
        assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +io"
        assert (folder / "memory.max").read_text() == "600000000"
        assert not group.killed()
        (folder / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
        assert group.killed()
        (folder / "cgroup.procs").touch()
        assert group.command(["true", "a b"])[-2:] == ["true", "a b"]
        for file in folder.iterdir():  # a real group has no files that must go first
            file.unlink()
    assert not folder.exists()


def test_a_group_of_version_1_and_a_device(tmp_path: Path) -> None:
    limits = importlib.import_module("limits")
    for controller in ("memory", "blkio"):
        (tmp_path / controller).mkdir()
    with limits.limited(memory_mb=600, read_gb_per_s=2.0, file=BENCH / "limits.py", root=tmp_path) as group:
        memory = group.folders[0]
        assert (memory / "memory.limit_in_bytes").read_text() == "600000000"
        device = limits.device_of(BENCH / "limits.py")
        if device is None:
            assert "no block device" in group.missing
        else:
            assert (group.folders[1] / "blkio.throttle.read_bps_device").read_text() == f"{device} 2000000000"
        for folder in group.folders:
            for file in folder.iterdir():
                file.unlink()


def test_without_the_right_to_limit_nothing_is_limited(tmp_path: Path) -> None:
    limits = importlib.import_module("limits")
    with limits.limited(memory_mb=600, root=tmp_path / "nowhere") as group:
        assert group.folders == ()
        assert group.missing == "memory: No such file or directory"
        assert group.command(["a"]) == ["a"]
    with limits.limited(root=tmp_path) as group:
        assert group.missing == ""


def test_a_partition_is_limited_as_its_disk(tmp_path: Path) -> None:
    limits = importlib.import_module("limits")
    number = (tmp_path / "x").touch() or (tmp_path / "x").stat().st_dev
    disk = tmp_path / "disk"
    part = disk / "part"
    part.mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (part / "dev").write_text("8:1\n")
    (part / "partition").write_text("1\n")
    devices = tmp_path / "devices"
    devices.mkdir()
    (devices / f"{os.major(number)}:{os.minor(number)}").symlink_to(part)
    assert limits.device_of(tmp_path / "x", devices) == "8:0"


def test_what_a_run_reports() -> None:
    runs = importlib.import_module("flash_runs")
    experts = {
        "hits": 70,
        "misses": 30,
        "bytes_read": 5000,
        "slots": 9,
        "slot_bytes": 104,
        "ahead": 20,
        "ahead_used": 15,
        "waiting_s": 0.25,
    }
    found = runs.of_report({"prefill_s": [3.0, 2.0], "peak_rss_mb": 7.0, "experts": experts})
    assert (found.seconds, found.peak_mb, found.hits, found.ahead, found.reads) == (2.0, 7.0, 0.55, 0.15, 50)
    assert (found.bytes, found.wasted) == (5000, 500.0)  # 5 of the 50 experts that were read
    whole = runs.of_report({"prefill_s": [1.0], "peak_rss_mb": 7.0})
    assert (whole.hits, whole.wasted, whole.bytes) == (1.0, 0.0, 0)
    fewer = experts | {"bytes_read": 500, "misses": 0}
    decoded = {"decode_tokens": 4, "decode_s": [2.5, 1.5], "decode_experts": fewer, "experts": experts}
    last = runs.of_report({"prefill_s": [9.0], "peak_rss_mb": 7.0, **decoded})
    assert (last.seconds, last.bytes, last.reads, last.waited) == (1.5, 500, 20, 0.25)
    middle = runs.middle([found, whole, runs.Sample(9.0, 8.0, reads=5)])
    assert (middle.seconds, middle.peak_mb, middle.reads) == (2.0, 8.0, 50)


def test_budgets_of_the_small_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is limited to the budget + 2%, and a few tokens go before the text."""
    runs = importlib.import_module("flash_runs")
    seen: list[Any] = []

    class Fake:
        def path(self, name: str) -> Path:
            return tmp_path / name

    (tmp_path / "model.pte").write_bytes(b"x")
    monkeypatch.setattr(runs.Machine, "_run", lambda self, file, ids, setting, group: seen.append(len(ids)))

    def limited(**given: Any) -> Any:
        seen.append(given["memory_mb"])
        return importlib.import_module("limits").limited(root=tmp_path)

    monkeypatch.setattr(runs, "limited", limited)
    runs.Machine(2, 2.0, limit=True).sample(Fake(), list(range(50)), runs.Setting("", budget=100))
    runs.Machine(2).sample(Fake(), list(range(50)), runs.Setting("", budget=100))
    assert seen == [102.0, 8, 50, None, 8, 50]


# elsewhere nothing is paced, and the bench says so (limits.py)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD and O_DIRECT of Linux")
def test_direct_reads_are_paced(tmp_path: Path) -> None:
    """Two readers share one storage; a group that could not be made paces all the same."""
    limits, storage = importlib.import_module("limits"), importlib.import_module("storage_rates")
    file = tmp_path / "file"
    file.write_bytes(os.urandom(4 << 20))
    with limits.limited(read_gb_per_s=0.02, file=file, root=tmp_path) as group:
        try:
            rates = storage.rates_in(group.command([]), file, [(1 << 20, 4096), (65536, 4096)])
        except RuntimeError:
            pytest.skip("this file system has no direct reads")  # and nothing to pace: tmpfs before Linux 6.6
    for rate in rates:
        # reads of a second that end later count whole; a busy machine is slower
        assert 0.2 * 0.02e9 < rate <= 1.1 * 0.02e9
