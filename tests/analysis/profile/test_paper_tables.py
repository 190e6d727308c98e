"""bench/paper_tables.py: tables from two small artifacts, restarts, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[3] / "bench" / "paper_tables.py"


@pytest.fixture
def paper_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_tables_under_test", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "QUICK", (64, 256))  # the small artifact's context is 512
    return module


def test_tables_and_restart(
    paper_tables: ModuleType, line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    artifact = line / "artifact"
    given = ["--quick", "--out", str(tmp_path), "--artifact", f"s={artifact}", "--artifact", f"pro={artifact}"]
    assert paper_tables.main(given) == 0
    out = capsys.readouterr().out
    assert "published: phones, other hardware" in out
    assert "S over Pro" in out
    assert "138.1" in out  # S at 256 tokens on the phone
    found = json.loads((tmp_path / "paper-tables.json").read_text())
    assert set(found["profiles"]) == {"s", "pro"}
    assert [p["context"] for p in found["profiles"]["s"]["runs"][0]["points"]] == [64, 256]
    assert (tmp_path / "paper-tables.txt").read_text().strip() in out

    def measured_again(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(paper_tables, "_measure", measured_again)
    assert paper_tables.main(given) == 0
    assert json.loads((tmp_path / "paper-tables.json").read_text())["profiles"] == found["profiles"]
    with pytest.raises(AssertionError, match="measured again"):
        paper_tables.main([*given, "--fresh"])
    with pytest.raises(AssertionError, match="measured again"):
        paper_tables.main([*given, "--repeats", "3"])


def test_what_does_not_fit_is_said(paper_tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paper_tables, "_available_bytes", lambda: 2_000_000_000)
    options = paper_tables.Options(tmp_path, (64,), 1, None, False, {})
    reason = paper_tables._too_large("l", options)
    assert "GB of free memory with room to spare, 2.0 are there" in reason
    assert paper_tables._too_large("s", options) == ""


def test_refuses(paper_tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        paper_tables.main(["--models", "s,xl"])
    assert caught.value.code == 2
    assert "'xl' is none of s, pro, m, l" in capsys.readouterr().err
    assert paper_tables.main(["--models", "s", "--artifact", "s=/nonexistent", "--out", str(tmp_path)]) == 2
    assert "/nonexistent: no such artifact folder" in capsys.readouterr().err


def test_nothing_to_measure_is_said(
    paper_tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper_tables, "_available_bytes", lambda: 2_000_000_000)
    assert paper_tables.main(["--models", "l", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "error: no model was measured" in err
    assert not (tmp_path / "paper-tables.json").exists()
    with pytest.raises(SystemExit):
        paper_tables.main(["--repeats", "0", "--out", str(tmp_path)])
