"""What `make bench-assistant` measures, on a tiny model: each part runs, and sums are those of their parts."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import TinyModels, tiny_text

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.mark.slow
def test_a_saved_prefix_is_restored_by_new_processes(
    tiny: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = importlib.import_module("bench_assistant")
    artifact, file = tiny(tiny_text(context=512)) / "artifact", tmp_path / "found.json"
    given = ["--tokens", "300", "--rounds", "2", "--threads", "1", "--json", str(file)]
    assert bench.main(["prefix", str(artifact), *given]) == 0
    found = json.loads(file.read_text())
    assert [saved["tokens"] for saved in found["saved"].values()] == [300, 300]
    assert {(row["side"], row["warm"]) for row in found["restored"]} == {
        (side, warm) for side in ("python", "c") for warm in (True, False)
    }
    for row in found["restored"]:
        assert row["restore and first token"] >= max(row["restore"]["least"], row["first token"]["least"]) > 0
        assert row["restore"]["seconds"] < found["saved"][row["side"]]["compute"]["seconds"]
    assert "of it beyond a decode step" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_of_a_server_is_that_of_all_its_processes(tiny: TinyModels) -> None:
    served = importlib.import_module("served_memory")
    artifact = tiny(tiny_text(context=512)) / "artifact"
    found = served.measure(artifact, threads=1, tokens=200)
    assert len(found["processes"]) > 1, "children tokenize and render"
    assert found["most"]["pss"] <= found["most"]["rss"] <= sum(one["peak"] for one in found["processes"])
    assert found["most"]["rss"] > max(one["rss"] for one in found["processes"])
    assert found["artifact"] == (artifact / "model.pte").stat().st_size
    assert 0 < found["mapped"] <= found["artifact"] + 4095
    assert (len(found["usage"]), found["refused"]) == (4, "")
    assert found["held_tokens"] == sum(one["total_tokens"] for one in found["usage"]) > 250
    served.tell(found)


def test_masks_of_a_small_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")
    masks = importlib.import_module("schema_masks")
    monkeypatch.setattr(masks, "KEPT", tmp_path)
    found = masks.measure(1500, rounds=2)
    assert found["vocabulary"] == 1500
    assert found["of"] == 10
    assert 0 < found["answers"] <= 10
    assert found["tokens"] > 50
    assert 0 < found["mask"]["median"] <= found["mask"]["p99"] <= found["mask"]["most"]
    masks.tell(found)
