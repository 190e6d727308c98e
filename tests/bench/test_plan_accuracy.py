"""What `make plan-accuracy` says of measurements: its limits, its exit status, and measurements taken up again."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moec.analysis.plan.devices import load_device
from tests.tiny import TinyModels, tiny_text

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    found: Any = importlib.import_module("plan_accuracy")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["plan_accuracy.py", *map(str, arguments)])
        return int(found.main())

    return run


def test_measurements_are_taken_up_again_and_judged(
    bench: Any, tiny: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_accuracy: Any = importlib.import_module("plan_accuracy")
    case = plan_accuracy.of_artifact(tiny(tiny_text()) / "artifact")
    device, guess = load_device("reference-x86"), {"prompt": 512, "peak": 1e6, "decode": 1.0, "prefill": 1.0}
    planned = plan_accuracy.compare(case, device, 2, guess)
    right = {"prompt": 512, "peak": planned["peak memory"][0], **{k: planned[k][0] for k in ("decode", "prefill")}}

    def again(seen: dict[str, float]) -> int:
        record = {"device": device.model_dump(mode="json"), "threads": 2}
        file = tmp_path / "seen.json"
        file.write_text(json.dumps({**record, "models": [{"name": case.name, "seen": seen}]}))
        return bench("--artifact", case.folder, "--again", file)

    assert again(right) == 0
    assert again({**right, "prefill": 1.0}) == 0, "a prompt has no limit"
    assert again({**right, "peak": right["peak"] * 1.09, "decode": right["decode"] * 0.81}) == 0
    capsys.readouterr()
    assert again({**right, "peak": right["peak"] / 1.11}) == 1
    assert capsys.readouterr().err == f"missed: {case.name}: peak memory +11.0%\n"
    assert again({**right, "decode": right["decode"] * 0.79}) == 1
    assert "decode +26.6%" in capsys.readouterr().err


def test_an_unknown_family_is_refused(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--families", "lfm2-moe,lfm3-moe") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unknown family 'lfm3-moe'" in error
