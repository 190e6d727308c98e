"""`make gpu-check` without a GPU: its parts on the CPU, and what it says of parts that differ or are missing."""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check
from bench.gpu_check import PARTS, checked, comparisons, part_result, summary
from moec.compiler.spec import Spec
from tests.training.small import MOE, STAGE, spec_of

STEPS = gpu_check.COMPARED


@pytest.fixture(scope="module")
def spec() -> Spec:
    return spec_of(STAGE | {"name": "pretrain", "tokens": 256, "mixture": {"web": 1, "code": 1}}, model=MOE)


@pytest.fixture(scope="module")
def parts(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every part but torchtitan's and the second in bfloat16, which the slow test runs: copies stand for them."""
    out = tmp_path_factory.mktemp("check")
    copied = {"titan": "torch", "torch-bf16": "cpu-bf16", "titan-bf16": "cpu-bf16"}
    found = {part: part_result(spec, part, "cpu", out, STEPS) for part in PARTS if part not in copied}
    return found | {part: copy.deepcopy(found[other]) for part, other in copied.items()}


def options(limit: float = 60.0) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", steps=STEPS, limit=limit)


def record(parts: dict[str, Any]) -> dict[str, Any]:
    return checked(options(), lambda name, _: {"seconds": 0.1, **parts[name]})


def test_on_a_cpu_it_agrees(parts: dict[str, dict[str, Any]]) -> None:
    found = record(parts)
    assert found["verdict"] == "as on the CPU", summary(found)
    assert parts["torch"]["losses"] == parts["cpu"]["losses"]  # the same run again
    assert parts["mesh"]["losses"] == pytest.approx(parts["cpu"]["losses"], abs=1e-5)  # gradients clipped by shards
    assert 0 < found["order_alone"] < 1e-3
    assert parts["cpu-bf16"]["losses"] != parts["cpu"]["losses"]
    assert all(len(parts[name]["losses"]) == STEPS for name in ("cpu", "mesh", "cpu-bf16"))
    said = summary(found)
    assert "NOTHING of this ran on CUDA" in said
    assert found["never_run_on_cuda"]
    assert len({line.index("  torch and cpu") for line in said.splitlines() if "torch and cpu:" in line}) == 1


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("torch", lambda p: p["losses"].__setitem__(0, p["losses"][0] + 2e-4)),
        ("torch", lambda p: p["losses"].__setitem__(7, p["losses"][7] + 6e-3)),
        ("mesh", lambda p: p["losses"].__setitem__(7, math.nan)),
        ("titan", lambda p: p["heldout"].update(web=p["heldout"]["web"] - 0.02)),
        ("torch-bf16", lambda p: p["losses"].__setitem__(3, p["losses"][3] * 1.05)),
        ("products", lambda p: p.update({"grouped, 16 experts of 192 x 128, float32": 1e-3})),
        ("collectives", lambda p: p.update(all_to_all_gradient=1e-7)),
    ],
    ids=["first", "later", "nan", "held-out", "bf16", "products", "collectives"],
)
def test_what_differs_is_said(parts: dict[str, dict[str, Any]], part: str, change: Any) -> None:
    other = copy.deepcopy(parts)
    change(other[part])
    found = record(other)
    assert found["verdict"] == "DIFFERENT"
    assert any(line.startswith("NO") for line in summary(found).splitlines())


def test_one_that_learns_nothing(parts: dict[str, dict[str, Any]]) -> None:
    """All parts alike, and none of them learns: they agree, and the check still says no."""
    other = copy.deepcopy(parts)
    for values in other.values():
        if "losses" in values:
            values["losses"] = [values["losses"][0]] * STEPS
    failed = [c.what for c in comparisons(other) if not c.holds]
    assert len(failed) == 5
    assert all("last losses as a part of its first" in what for what in failed)


def test_a_part_that_did_not_run(parts: dict[str, dict[str, Any]]) -> None:
    found = record(parts | {"titan": {"fault": "NCCL error"}})
    assert found["verdict"] == "incomplete"
    assert "did not run: NCCL error" in summary(found)
    late = checked(options(limit=-1.0), lambda *_: {})
    assert late["verdict"] == "incomplete"
    assert all("the limit of" in part["fault"] for part in late["parts"].values())


def test_without_cuda(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("no CUDA that this torch can use")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_as_it_is_typed(tmp_path: Path, spec: Spec) -> None:
    """Each part in its process, torchtitan's among them."""
    pytest.importorskip("torchtitan", reason="needs the titan extra: pip install 'moec[titan]'")
    import yaml

    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True)))
    words = ["--device", "cpu", "--steps", str(STEPS), "--spec", str(file), "--out", str(tmp_path), "--limit", "1200"]
    assert gpu_check.main(words) == 0
    found = json.loads((tmp_path / gpu_check.RECORD).read_text())
    assert found["verdict"] == "as on the CPU"
    assert set(found["parts"]) == set(PARTS)
    assert (tmp_path / gpu_check.SUMMARY).read_text() == summary(found)
