"""The backend torchtitan against the torch backend: the same numbers, files, states and refusals.

Without clipping the two do the same operations on the same numbers in the same order: bit for bit. The gradient's norm
is summed in another order, so that with clipping gradients differ by one rounding of float32.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moec.checkpoints import open_store
from moec.compiler.errors import CheckpointError, MissingExtra, RunError, UserError
from moec.training.data.shards import Corpus, DataError
from moec.training.parallel import World
from moec.training.run import train
from moec.training.stages import RunResult
from moec.training.state import StateStore
from tests.training.parallel_worker import BrokenOff, perform
from tests.training.small import DENSE, MOE, PRETRAIN, QAT, SFT, corpus_of, spec_of
from tests.training.test_parallel import assert_same_run, job, launched
from tests.training.test_run import SCRIPT, records, same_weights, spec_file, wait_for_lines

pytest.importorskip("torchtitan", reason="needs the titan extra: pip install 'moec[titan]'")

UNCLIPPED: dict[str, Any] = {"optimizer": {"clip_norm": 1e9}}
# 8 rows in micro-batches of 3, 3 and 2; bfloat16 in SFT, INT8 activations and cache in QAT
ALL = (
    PRETRAIN | UNCLIPPED | {"precision": "fp32", "micro_batch_tokens": 32 * 3, "tokens": 256 * 9},
    SFT | UNCLIPPED,
    QAT | UNCLIPPED | {"tokens": 256 * 5},
)
STAGES = ("pretrain", "sft", "qat")


@pytest.fixture(autouse=True)
def awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtitan sleeps two seconds at the end of a stage, for processes that are not here."""
    from moec.training.titan.device import load

    load(torch.device("cpu"))
    quick = SimpleNamespace(perf_counter=time.perf_counter, monotonic=time.monotonic, sleep=lambda _: None)
    monkeypatch.setattr("torchtitan.trainer.time", quick)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> RunResult:
    """All three stages by the torch backend."""
    return train(spec_of(*ALL), data=corpus, out=tmp_path_factory.mktemp("runs") / "own", threads=1, device="cpu")


def titan(spec: Any, corpus: Corpus, out: Path, **options: Any) -> RunResult:
    return train(spec, data=corpus, out=out, threads=1, device="cpu", backend="torchtitan", **options)


def assert_same_records(a: Path | RunResult, b: Path | RunResult) -> None:
    """Everything but the speed, to the last bit; the gradient's norm is a sum of some thousand squares in float32."""
    first, second = records(a), records(b)
    assert len(first) == len(second)
    for x, y in zip(first, second, strict=True):
        assert y.pop("grad_norm", 0.0) == pytest.approx(x.pop("grad_norm", 0.0), rel=1e-6)
        assert y == x


def test_all_stages_are_the_torch_backends(own: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    """Balancing, z-loss, schedule, dropped pairs, micro-batches, autocast and rounding: any of them would show."""
    import gc

    environment, gathers = dict(os.environ), gc.isenabled()
    result = titan(spec_of(*ALL), corpus, tmp_path / "run")
    assert_same_records(own, result)
    assert same_weights(result.out, own.out)
    assert [(s.name, s.steps, s.tokens, s.heldout) for s in result.stages] == [
        (s.name, s.steps, s.tokens, s.heldout) for s in own.stages
    ]
    assert any(line.get("dropped_fraction", 0) > 0 for line in records(result))
    biases = [open_store(result.checkpoint("qat"), spec_of().model)[n] for n in _biases()]
    assert all(bias.load().any() for bias in biases)
    files = {str(file.relative_to(result.out)) for file in result.out.rglob("*") if file.is_file()}
    expected = {str(file.relative_to(own.out)) for file in own.out.rglob("*") if file.is_file()}
    assert {f for f in files if "tfevents" not in f} == {f for f in expected if "tfevents" not in f}
    run, other = (json.loads((r.out / "run.json").read_text()) for r in (result, own))
    assert (run.pop("backend"), other.pop("backend")) == ("torchtitan", "torch")
    assert run.pop("versions").keys() - other.pop("versions").keys() == {"torchtitan"}
    assert run == other
    assert dict(os.environ) == environment  # nothing of a trainer stays in the process
    assert gc.isenabled() == gathers
    assert not torch.distributed.is_initialized()


def _biases() -> list[str]:
    return [f"model.layers.{n}.feed_forward.expert_bias" for n in range(2)]


def test_clipping_to_a_rounding(corpus: Corpus, tmp_path: Path) -> None:
    """Norms are above 1, the clip_norm of these stages, in most steps. Losses are float32 sums near 6, whose last bit
    is 5e-7. AdamW divides a gradient by its own size, so that a weight moves by up to 3e-3 times that one rounding for
    each step: measured 2e-7 after six.
    """
    (tmp_path / "corpus").symlink_to(corpus.folder)
    perform(job(tmp_path, "own", "pretrain"))
    perform(job(tmp_path, "titan", "pretrain", options={"backend": "torchtitan"}))
    assert max(line.get("grad_norm", 0) for line in records(tmp_path / "own")) > 1
    assert_near(tmp_path / "own", tmp_path / "titan")


def assert_near(one: Path, two: Path) -> None:
    for x, y in zip(records(one), records(two), strict=True):
        assert (x["stage"], x["step"]) == (y["stage"], y["step"])
        if "loss" in x:
            assert y["loss"] == pytest.approx(x["loss"], abs=2e-6)
            assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=2e-6)
            assert y["lr"] == x["lr"]
            assert y["load_max_over_mean"] == x["load_max_over_mean"]
        else:
            assert y["heldout"] == pytest.approx(x["heldout"], abs=2e-6)
            assert y["expert_load"] == x["expert_load"]
    first, second = (torch.load(out.with_suffix(".pt")) for out in (one, two))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float((second[n] - v).abs().mean()) for n, v in first.items()) < 2e-8


def test_a_dense_model(corpus: Corpus, tmp_path: Path) -> None:
    """Untied, windowed, without experts: the group of experts is left out, and so is the z-loss."""
    stage = PRETRAIN | UNCLIPPED | {"dispatch": {"kind": "dropless"}, "tokens": 256 * 3}
    spec = spec_of(stage, model=DENSE | {"vocab_size": 300}, quantization="none")
    one = train(spec, data=corpus, out=tmp_path / "own", threads=1, device="cpu")
    two = titan(spec, corpus, tmp_path / "titan")
    assert_same_records(one, two)
    assert same_weights(one.out, two.out, ("pretrain",))


def test_responses_that_count_alike(corpus: Corpus, tmp_path: Path) -> None:
    """torchtitan divides by how many targets there are, moec by their weights: the same sum but for its rounding."""
    (tmp_path / "corpus").symlink_to(corpus.folder)
    stage = SFT | UNCLIPPED | {"response_weight": "response", "precision": "fp32"}
    dumped = spec_of(stage).model_dump(mode="json", exclude_none=True)
    for name in ("torch", "torchtitan"):
        out = str(tmp_path / name)
        perform({"spec": dumped, "data": str(corpus.folder), "out": out, "options": {"backend": name}})
    assert_near(tmp_path / "torch", tmp_path / "torchtitan")


# --- states ---------------------------------------------------------------------------------------------------------


@contextmanager
def broken_off(stage: str, step: int) -> Iterator[None]:
    """A run that ends behind the state of a step."""
    save = StateStore.save

    def saving(store: StateStore, position: Any, tensors: Any = None) -> None:
        save(store, position, tensors)
        if (position.stage, position.step) == (stage, step):
            raise BrokenOff

    with pytest.MonkeyPatch.context() as patched, suppress(BrokenOff):
        patched.setattr(StateStore, "save", saving)
        yield
        pytest.fail("the run was not broken off")


def test_stage_by_stage_with_stops(own: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    spec, out = spec_of(*ALL), tmp_path / "run"
    with pytest.raises(UserError, match="stage sft needs weights, and pretrain has not been trained"):
        titan(spec, corpus, tmp_path / "none", stage="sft")
    with broken_off("pretrain", 8):
        titan(spec, corpus, out, stage="pretrain")
    assert json.loads((out / "state/latest.json").read_text())["folder"] == "step-8"
    (out / "state/step-99").mkdir()  # a state that never became the latest
    (out / "state/step-99/.metadata").write_bytes(b"cut")
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"stage": "pretrain", "step": 9')
    with pytest.raises(UserError, match="the run began with --backend torchtitan; continue it with that"):
        train(spec, data=corpus, out=out, resume=True, threads=1, device="cpu")
    titan(spec, corpus, out, stage="pretrain", resume=True)
    for stage in ("sft", "qat"):
        titan(spec, corpus, out, stage=stage)
    assert_same_records(own, out)
    assert same_weights(out, own.out)
    assert [file.name for file in (out / "state").iterdir()] == ["latest.json"]
    with pytest.raises(UserError, match="holds a run of pretrain, sft, qat; continue it with --resume"):
        titan(spec, corpus, out)


def test_a_run_of_the_torch_backend_is_not_continued(own: RunResult, corpus: Corpus) -> None:
    with pytest.raises(UserError, match="the run began with --backend torch; continue it with that"):
        titan(spec_of(*ALL), corpus, own.out, resume=True)


def test_from_another_checkpoint(own: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    spec = spec_of(*ALL)
    alone = titan(spec, corpus, tmp_path / "alone", stage="sft", init=own.checkpoint("pretrain"))
    assert same_weights(alone.out, own.out, ("sft",))
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        titan(spec, corpus, tmp_path / "out", init=tmp_path / "nowhere")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert not (tmp_path / "out" / "state").exists()


@pytest.mark.parametrize("damage", [".metadata", ".distcp"])
def test_a_damaged_state(damage: str, corpus: Corpus, tmp_path: Path) -> None:
    out, spec = tmp_path / "run", spec_of(PRETRAIN)
    with broken_off("pretrain", 4):
        titan(spec, corpus, out)
    next(p for p in sorted(out.rglob("*")) if p.name.endswith(damage)).write_bytes(os.urandom(100))
    with pytest.raises(UserError, match="its files are not those that were written; start again in another --out"):
        titan(spec, corpus, out, resume=True)


@pytest.mark.slow
def test_interrupted_and_killed(own: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    """The command, ended with Ctrl-C and with kill -9, goes on to the numbers of a run without a stop."""
    file, out = spec_file(tmp_path, spec_of(*ALL)), tmp_path / "run"

    def started(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(file), str(corpus.folder), str(out), "--backend", "torchtitan"]
        return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = started()
    wait_for_lines(out, 3, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "state saved; continue with --resume" in stderr
    *said, end = stderr.splitlines()
    assert all(line.startswith("pretrain") for line in said), stderr  # moec's lines, and no one else's
    assert end == "interrupted"
    process = started("--resume")
    wait_for_lines(out, 14, process)
    process.kill()
    process.communicate()
    titan(spec_of(*ALL), corpus, out, resume=True)
    assert_same_records(own, out)
    assert same_weights(out, own.out)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_divergence_is_said(corpus: Corpus, tmp_path: Path) -> None:
    changes = {"learning_rate": {"peak": 9.9}, "optimizer": {"eps": 1e-30, "clip_norm": 1e30}, "tokens": 99999}
    spec = spec_of(PRETRAIN | changes, model=MOE | {"qk_norm": False})
    said = []
    for backend in ("torch", "torchtitan"):
        with pytest.raises(RunError, match=r"is (nan|inf) at step \d+ of pretrain; lower learning_rate.peak") as error:
            train(spec, data=corpus, out=tmp_path / backend, threads=1, device="cpu", backend=backend)
        said.append(str(error.value))
    assert said[0] == said[1]
    step = json.loads((tmp_path / "torchtitan/state/latest.json").read_text())["step"]
    assert step < int(said[1].split("step ")[1].split()[0])


def test_a_gradient_that_is_not_finite(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss that is: it is said before the state of that step is saved."""
    from moec.training.titan.model import StageLoss

    call = StageLoss.__call__

    def bent(loss: StageLoss, pred: Any, labels: Any, valid: Any = None, **more: Any) -> Any:
        value, found = call(loss, pred, labels, valid, **more)
        return value * (1e36 if next(calls) == 3 else 1), found

    calls = iter(range(99))
    monkeypatch.setattr(StageLoss, "__call__", bent)
    spec = spec_of(PRETRAIN | {"precision": "fp32"})
    with pytest.raises(RunError, match=r"the gradient's norm is inf at step 4 of pretrain; lower learning_rate.peak"):
        titan(spec, corpus, tmp_path / "run")
    assert json.loads((tmp_path / "run/state/latest.json").read_text())["step"] == 0


def test_without_the_extra(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.compiler.extras.installed", lambda module: module != "torchtitan")
    with pytest.raises(MissingExtra, match=r"^--backend torchtitan needs torchtitan, .*'moec\[titan\]'$"):
        titan(spec_of(PRETRAIN), corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # everything else does without, and does not even import it
    code = "import moec.training.run, moec.cli.main, sys; sys.exit('torchtitan' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moec.cli.main import run

    file = spec_file(tmp_path, spec_of(PRETRAIN | {"tokens": 256}))
    line = ["train", str(file), "--data", str(corpus.folder), "--out", str(tmp_path / "run"), "--device", "cpu", "-q"]
    assert run([*line, "--backend", "megatron"]) == 2
    assert capsys.readouterr().err == "--backend 'megatron' is not known; use torch or torchtitan\n"
    assert run([*line, "--backend", "torchtitan", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert "small: trained" in out
    assert err == ""


def test_torchtitan_stays_with_its_device() -> None:
    from moec.training.titan import device

    with pytest.raises(UserError, match="torchtitan was imported for cpu and cannot run on cuda; start a new process"):
        device.load(torch.device("cuda"))
    import torchtitan.tools.utils as utils

    assert utils.device_type == "cpu"
    assert utils.device_module.device_count() == torch.cpu.device_count()
    assert utils.device_module.get_device_properties().total_memory > 1 << 28
    with pytest.raises(RuntimeError, match="fast_kernel of torchtitan is a kernel in Triton"):
        device._NoKernels("kernels").fast_kernel(1)
    assert not hasattr(device._NoKernels("kernels"), "__path__")


def test_experts_that_cannot_be_cut() -> None:
    from moec.training.titan.model import _placement

    block = SimpleNamespace(experts=torch.nn.Linear(65, 8))
    with pytest.raises(UserError, match=r"3 processes cannot share 65 rows of an expert evenly; raise training.expert"):
        _placement(SimpleNamespace(blocks=[block]), None, SimpleNamespace(size=lambda: 3))


def test_rows_that_cannot_be_shared(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def three(*_: Any) -> Iterator[World]:
        yield World(size=3)

    monkeypatch.setattr("moec.training.run.joined", three)
    with pytest.raises(DataError, match="3 processes cannot share 8 rows of 32 tokens evenly"):
        titan(spec_of(PRETRAIN), corpus, tmp_path / "run")


# --- many processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_processes(tmp_path: Path) -> None:
    """As many processes of either backend add up in the same order, so that tolerances are those of clipping: experts
    split over all, over half and over none. A state of one process is continued by two, and the other way round.
    """
    corpus_of(tmp_path / "corpus")
    backend = {"backend": "torchtitan"}
    for stage in ("pretrain", "sft"):
        init = {"sft": tmp_path / "one-pretrain/pretrain"}.get(stage)
        perform(job(tmp_path, f"one-{stage}", stage, init=init))
    perform(job(tmp_path, "stopped-by-one", "pretrain", stop_at=5, options=dict(backend)))
    ways: dict[str, dict[str, Any]] = {
        "pretrain": {"stage": "pretrain"},
        "copied": {"stage": "pretrain", "expert_parallel": 1},
        "sft": {"stage": "sft", "init": tmp_path / "one-pretrain/pretrain"},
        "qat": {"stage": "qat", "init": tmp_path / "one-sft/sft"},
    }

    def both(name: str, way: dict[str, Any]) -> list[dict[str, Any]]:
        return [job(tmp_path, f"own-{name}", **way), job(tmp_path, f"titan-{name}", options=dict(backend), **way)]

    stops = [
        job(tmp_path, "stopped-by-two", "pretrain", stop_at=5, options=dict(backend)),
        job(tmp_path, "stopped-by-one", "pretrain", options=backend | {"resume": True}),
    ]
    launched(tmp_path, [*(j for name, way in ways.items() for j in both(name, way)), *stops])
    half = {"stage": "pretrain", "expert_parallel": 2}
    launched(tmp_path, both("half", half), processes=4)
    perform(job(tmp_path, "stopped-by-two", "pretrain", options=backend | {"resume": True}))
    for name in (*ways, "half"):
        assert_near(tmp_path / f"own-{name}", tmp_path / f"titan-{name}")
    perform(job(tmp_path, "titan", "pretrain", options=dict(backend)))

    for name in ("titan-pretrain", "stopped-by-one", "stopped-by-two"):  # another order of sums than one process
        assert_same_run(tmp_path / "titan", tmp_path / name)
