"""`precision: auto`: what it stands for, that a run records it, and goes on in no other."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moec.compiler.errors import UserError
from moec.compiler.spec.training import TrainingStage
from moec.training import precision
from moec.training.precision import has_bfloat16, note, resolved
from moec.training.run import train
from moec.training.stage import autocast
from tests.training.small import STAGE, corpus_of, spec_of

CPU = torch.device("cpu")
CPUINFO = Path("/proc/cpuinfo")
SHORT = STAGE | {"name": "pretrain", "tokens": 256 * 2, "eval_every": None}


def stage_of(**changes: Any) -> TrainingStage:
    return TrainingStage.model_validate(SHORT | changes)


@pytest.fixture(params=[True, False], ids=["bfloat16", "emulated"])
def has(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor of a test has products in bfloat16."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: request.param)
    return bool(request.param)


def test_auto_is_the_default_and_follows_the_hardware(has: bool) -> None:
    stage = stage_of()
    assert stage.precision == "auto"
    assert resolved(stage, CPU).precision == ("bf16" if has else "fp32")
    with autocast(stage, CPU):
        assert torch.is_autocast_enabled("cpu") == has


@pytest.mark.parametrize("given", ["bf16", "fp32"])
def test_what_is_given_stays(given: str, has: bool) -> None:
    stage = stage_of(precision=given)
    assert resolved(stage, CPU) is stage
    with autocast(stage, CPU):
        assert torch.is_autocast_enabled("cpu") == (given == "bf16")


def test_a_slow_choice_is_said(has: bool) -> None:
    said = [note(stage_of(precision=p), CPU) or "" for p in ("auto", "bf16", "fp32")]
    assert ["in float32" in said[0], "emulates" in said[1], bool(said[2])] == (
        [False] * 3 if has else [True, True, False]
    )


@pytest.mark.parametrize(("major", "wanted"), [(7, False), (8, True), (9, True)])
def test_a_gpu_has_bfloat16_from_ampere_on(major: int, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """7: a V100 or a T4, where torch would emulate it."""
    properties = SimpleNamespace(major=major)
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_properties", properties)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_bfloat16(torch.device("cuda")) == wanted


# elsewhere there is no second source to compare with: the flags have other names, or no file
@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="reads Linux's flags of x86")
def test_this_processor_is_asked() -> None:
    flags = CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split()
    assert has_bfloat16(CPU) == bool({"avx512_bf16", "amx_tile"} & set(flags))


def test_a_run_records_it_and_goes_on_in_no_other(has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of(tmp_path / "corpus")
    spec = spec_of(SHORT, STAGE | {"name": "midtrain", "tokens": 256, "eval_every": None})
    train(spec, data=corpus, out=tmp_path / "run", stage="pretrain", threads=1)
    wanted = "bf16" if has else "fp32"
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["spec"]["training"]["stages"]
    assert [stage["precision"] for stage in stages] == [wanted] * 2
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: not has)
    with pytest.raises(UserError, match=f"begun with `precision: {wanted}`"):
        train(spec, data=corpus, out=tmp_path / "run", stage="midtrain", threads=1)
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: has)
    train(spec, data=corpus, out=tmp_path / "run", stage="midtrain", threads=1)
