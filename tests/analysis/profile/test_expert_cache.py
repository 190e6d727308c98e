"""`moec profile --memory-mb`: what the cache of routed experts did, in all and by layer, against arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moec.analysis.profile.expert_cache import cache_facts, together, use_facts
from tests.conftest import Moec, refused

LAYERS, EXPERTS, TOP_K = 2, 16, 4
MORE = ("--context", "64,256", "--repeat", "2", "--decode", "8", "--threads", "1", "--quiet")
PHASES = ("prefill", "decode")


def least_mb(moec: Moec, artifact: Path) -> int:
    refusal = moec("profile", artifact, *MORE, "--memory-mb", "1")
    refused(refusal, "a memory budget of 1 MB is less than", "give a larger --memory-mb")
    found = re.search(r"less than (\d+) MB", refusal[2])
    assert found
    return int(found[1])


def test_counts_by_prompt_and_layer(line: Path, moec: Moec, tmp_path: Path) -> None:
    artifact = line / "artifact"
    budget = least_mb(moec, artifact) + 1
    file = tmp_path / "profile.json"
    status, out, err = moec("profile", artifact, *MORE, "--memory-mb", budget, "--json", file)
    assert status == 0, err
    found: dict[str, Any] = json.loads(file.read_text())
    names = found["experts"]["names"]
    assert len(names) == LAYERS
    for run in found["runs"]:
        streamed = run["expert_cache"]
        assert (streamed["budget"], streamed["experts"]) == (budget * 10**6, LAYERS * EXPERTS)
        assert LAYERS * TOP_K <= streamed["slots"] <= LAYERS * EXPERTS
        decode, prefill = streamed["decode"], streamed["prefill"]
        assert (decode["tokens"], prefill["tokens"]) == (2 * 2 * 8, 2 * 256)  # two processes, two points
        for phase in (decode, prefill):
            assert [layer["name"] for layer in phase["layers"]] == names
            for name in ("hits", "misses", "bytes_read", "ahead", "ahead_used"):
                assert sum(layer[name] for layer in phase["layers"]) == phase[name]
            for counts in (phase, *phase["layers"]):
                asked = counts["hits"] + counts["misses"]
                assert counts["hit_rate"] == counts["hits"] / asked
                # a read ahead may be under way where a phase ends: of each of two processes at two points
                read = counts["misses"] + counts["ahead"]
                assert counts["bytes_read"] / found["expert_bytes"] == pytest.approx(read, abs=4 * 3)
                assert 0 <= counts["ahead_used"] <= min(counts["ahead"] + 4 * 3, counts["hits"])
                assert counts["bytes_per_token"] == counts["bytes_read"] / phase["tokens"]
                assert counts["waiting_s"] <= counts["stalled_s"] + 1e-9
                if counts["overlapped"] is not None:
                    assert counts["overlapped"] == pytest.approx(1 - counts["exposed_s"] / counts["active_s"])
                    assert 0 <= counts["overlapped"] <= 1
        for layer in decode["layers"]:  # a token alone asks for its experts
            assert layer["hits"] + layer["misses"] == decode["tokens"] * TOP_K
    assert f"of {LAYERS * EXPERTS} in memory" in out
    assert "Decoding by layer, all prompts" in out
    for word in (*names, "read ahead", "read a token", "stalled a token, ms", "reading overlapped"):
        assert word in out
    assert any("activations hold the cache of routed experts" in note for note in found["notes"])


def test_without_a_budget_nothing_is_said_of_it(line: Path, moec: Moec) -> None:
    status, out, err = moec("profile", line / "artifact", *MORE, "--prompts", "dummy", "--json", "-")
    assert status == 0, err
    assert all("expert_cache" not in run for run in json.loads(out)["runs"])


def answer(scale: int) -> dict[str, Any]:
    """What a runner says: two layers, three tokens decoded; the clock's time is not the layers' sum."""
    layers = [
        [scale * n for n in (5, 1, 100, 9, 8, 7, 6, 3, 2, 1)],
        [scale * n for n in (2, 4, 400, 9, 8, 7, 6, 0, 1, 1)],
    ]
    use = {"tokens": 3, "all": [scale * n for n in (7, 5, 500, 18, 16, 14, 10, 3, 3, 2)], "layers": layers}
    empty = {"tokens": 0, "all": [0] * 10, "layers": [[0] * 10, [0] * 10]}
    return {"expert_cache": {"budget": 9, "experts": 4, "slots": 3, "slot_bytes": 100, "prefill": empty, "decode": use}}


def test_processes_and_streams_add_up() -> None:
    facts = cache_facts([answer(1), answer(10)], ["layers.0", "layers.1"])
    assert facts is not None
    decode = facts["decode"]
    assert (decode["tokens"], decode["hits"], decode["bytes_per_token"]) == (6, 77, 5500 / 6)
    assert decode["hit_rate"] == 7 / 12
    assert (decode["ahead"], decode["layers"][1]["ahead_used"]) == (33, 11)
    assert decode["overlapped"] == pytest.approx(0.7)
    assert [layer["overlapped"] for layer in decode["layers"]] == [0.5, 1.0]
    assert (facts["prefill"]["hit_rate"], facts["prefill"]["overlapped"]) == (None, None)
    both = together([facts, facts], "decode")
    assert (both["tokens"], both["misses"]) == (12, 110)
    assert both["layers"][1]["bytes_per_token"] == decode["layers"][1]["bytes_per_token"]
    assert cache_facts([{}], ["layers.0"]) is None


def test_layers_that_count_as_one_have_a_number() -> None:
    use = {"tokens": 1, "all": [0] * 10, "layers": [[0] * 10]}
    assert use_facts([use], ["layers.0", "layers.1"])["layers"][0]["name"] == "0"
