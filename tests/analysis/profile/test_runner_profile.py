"""The runner's profile: counts against a session's traces, memory that adds up, lengths, refusals."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.analysis.profile.experts import counts_array
from moec.runtime import native
from moec.targets.xnnpack.session import CpuSession
from tests.runtime import runtime_model as m


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "model.pte"
    m.write_pte(path, int8_cache=True)
    return path


def _run(model: Path, ids: list[int], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(native.runner_binary()), str(model), "--profile", "--tokens", "-", *map(str, arguments)]
    text = " ".join(map(str, ids))
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, input=text)


def _profile(model: Path, ids: list[int], *arguments: object) -> dict[str, Any]:
    done = _run(model, ids, *arguments)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _ids(count: int) -> list[int]:
    return np.random.default_rng(3).integers(0, m.V, count).tolist()


def test_counts_are_those_of_the_session(model: Path) -> None:
    ids = _ids(57)  # chunks of 16, the last one odd, cut again at 23
    found = _profile(model, ids, "--points", "23,50", "--decode", 5, "--follow", "--threads", 1)
    expected = {"prefill_counts": np.zeros((1, m.E), int), "decode_counts": np.zeros((1, m.E), int)}
    with CpuSession(model, threads=1) as session:
        session.trace(True)
        done = 0
        for point in (23, 50):
            session.reset()
            session.prefill(ids[:point])
            traces = session.take_traces()
            indices = np.concatenate([np.asarray(t.indices_TK).reshape(-1, m.TOP_K) for t in traces])[done:point]
            np.add.at(expected["prefill_counts"][0], indices.ravel(), 1)
            for token in ids[point : point + 5]:
                session.decode(token)
            for trace in session.take_traces():
                np.add.at(expected["decode_counts"][0], np.asarray(trace.indices_TK).ravel(), 1)
            done = point
    for name, counts in expected.items():
        assert counts_array(found[name], m.E).tolist() == counts.tolist()
    both = expected["prefill_counts"] + expected["decode_counts"]
    assert found["points"][-1]["experts_touched"] == (both > 0).sum()


def test_generates_what_bench_generates(model: Path) -> None:
    ids = _ids(21)
    bench = [str(native.runner_binary()), str(model), "--tokens", "-", "--decode", "7", "--json"]
    text = " ".join(map(str, ids))
    plain = subprocess.run(bench, capture_output=True, text=True, check=True, input=text)
    assert _profile(model, ids, "--decode", 7)["generated"] == json.loads(plain.stdout)["generated"]


def test_memory_adds_up(model: Path) -> None:
    found = _profile(model, _ids(200), "--points", "20,180", "--decode", 4, "--drop-cache", "--warm", 2)
    first, last = found["points"]
    assert found["dropped"]
    for memory in (found["before"], found["loaded"], first["decoded"], last["prefilled"]):
        assert memory["resident"] == memory["anonymous"] + memory["weights"] + memory["libraries"]
        assert memory["caches"] + memory["activations"] <= memory["anonymous"]
    assert found["before"]["weights"] == 0
    # a page where the program ends and its weights begin belongs to both mappings
    assert 0 < first["decoded"]["weights"] <= (-(-found["file_bytes"] // 4096) + 2) * 4096
    # keys and values in INT8 with a float scale for each row of a head, both to the page
    per_token = 2 * m.KV * (m.HEAD + 4)
    grown = last["decoded"]["caches"] - first["decoded"]["caches"]
    assert grown == pytest.approx(160 * per_token, abs=4 * 4096)  # four caches, each ends inside a page
    assert found["peak"] > 0.9 * last["decoded"]["resident"]
    for point in found["points"]:
        assert len(point["prefill_s"]) == len(point["decode_s"]) == 3
        assert len(point["token_s"]) == 4
    assert all(a < b for a, b in zip(first["prefill_s"], last["prefill_s"], strict=True))


def test_peak_is_not_the_parents(model: Path) -> None:
    """A process that was started by a large one begins with that one's maximum in getrusage."""
    ballast = np.ones(300_000_000 // 8)
    found = _profile(model, _ids(20))
    assert ballast.sum() > 0
    assert found["peak"] < 200e6


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        (0, (), "the prompt is empty"),
        (20, ("--points", "21"), "point 21: the prompt has 20 tokens"),
        (20, ("--points", "18", "--decode", "3", "--follow"), "point 18: the prompt has 20 tokens"),
        (20, ("--points", "5,5"), "the points must be ascending"),
        (20, ("--points", "0"), "--points: not a number from 1 up: 0"),
        (20, ("--points", "4,"), "--points: not a number from 1 up"),
        (20, ("--points",), "--points: not a number from 1 up"),
        (20, ("--decode", str(m.S)), f"exceed the model's context of {m.S}"),
    ],
)
def test_refuses(model: Path, tokens: int, arguments: tuple[str, ...], message: str) -> None:
    done = _run(model, _ids(tokens), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
