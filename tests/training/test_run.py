"""Runs: files in their places, resuming to the same numbers after any stop, and refusals before anything is done."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moec.checkpoints import open_store
from moec.compiler.errors import RunError, SpecError, UserError
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec
from moec.compiler.spec.training import Schedule, TrainingStage
from moec.sources.decoder.layout import weight_layout
from moec.training.data.shards import Corpus
from moec.training.metrics import Live, Metrics
from moec.training.optimizer import learning_rate
from moec.training.precision import has_bfloat16
from moec.training.run import train
from moec.training.stage import Trainer
from moec.training.stages import RunResult
from tests.forked import ended, forked
from tests.training.small import MOE, PRETRAIN, QAT, SFT, STAGE, corpus_of, spec_of

ALL = (PRETRAIN, SFT, QAT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> RunResult:
    """All three stages without a stop."""
    return train(spec_of(*ALL), data=corpus, out=tmp_path_factory.mktemp("runs") / "whole", threads=1)


def records(run: RunResult | Path) -> list[dict[str, Any]]:
    """metrics.jsonl but for the speed, which no two runs share."""
    out = run if isinstance(run, Path) else run.out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


def same_weights(a: Path, b: Path, stages: tuple[str, ...] = ("pretrain", "sft", "qat")) -> bool:
    return all((a / s / "model.safetensors").read_bytes() == (b / s / "model.safetensors").read_bytes() for s in stages)


def test_what_a_run_leaves(whole: RunResult, corpus: Corpus) -> None:
    spec = spec_of(*ALL)
    assert [stage.name for stage in whole.stages] == ["pretrain", "sft", "qat"]
    for stage in ("pretrain", "sft", "qat"):
        store = open_store(whole.checkpoint(stage), spec.model)
        assert store.packed == (stage == "qat")
        assert (whole.checkpoint(stage) / "tokenizer.json").read_bytes() == corpus.tokenizer_file.read_bytes()
        if stage != "qat":
            types = {e.dtype for e in store.entries.values()}
            assert types == {"BF16", "F32"}
    run = json.loads((whole.out / "run.json").read_text())
    wanted = spec.model_dump(mode="json")
    for stage in wanted["training"]["stages"]:
        if stage["precision"] == "auto":
            stage["precision"] = "bf16" if has_bfloat16(torch.device("cpu")) else "fp32"
    assert run["spec"] == wanted
    assert run["digests"]["tokenizer"] == corpus.index["tokenizer_sha256"]
    assert set(run["versions"]) == {"python", "moec", "torch", "torchao", "numpy"}
    assert whole.checkpoint() == whole.out / "qat"


def test_metrics(whole: RunResult) -> None:
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [*range(1, 13), *range(1, 6), *range(1, 7)]
    for line in steps:
        assert set(line) == {
            "stage", "step", "tokens", "loss", "lm_loss", "z_loss", "lr", "grad_norm", "dropped_fraction",
            "load_max_over_mean", "tokens_per_s", "distinct_per_16_tokens",
        }  # fmt: skip
        assert line["tokens"] == 256 * line["step"]
        assert line["loss"] == pytest.approx(line["lm_loss"] + 1e-4 * line["z_loss"], rel=1e-12)
        assert len(line["load_max_over_mean"]) == 2
        assert min(line["load_max_over_mean"]) >= 1
        assert (line["dropped_fraction"] == 0) or line["stage"] == "pretrain"
    assert any(line["dropped_fraction"] > 0 for line in steps if line["stage"] == "pretrain")
    evals = [line for line in lines if "heldout" in line]
    places = [(line["stage"], line["step"]) for line in evals]
    assert places == [
        *(("pretrain", n) for n in (0, 5, 10, 12)),
        ("sft", 0),
        ("sft", 5),
        *(("qat", n) for n in (0, 5, 6)),
    ]
    for line in evals:
        assert set(line["heldout"]) == set(line["heldout_accuracy"]) == {"web", "code", "chat"}
        assert all(0 <= share <= 1 for share in line["heldout_accuracy"].values())
        for load in line["expert_load"].values():  # [layer][expert]: every token selects three
            assert {sum(layer) for layer in load} == {sum(load[0])}
            assert sum(load[0]) % 3 == 0
    assert evals[3]["heldout"]["web"] < evals[0]["heldout"]["web"] - 0.3
    assert whole.stages[0].heldout == evals[3]["heldout"]
    assert whole.stages[0].steps == 12
    assert whole.stages[0].tokens == 12 * 256


def test_tensorboard(whole: RunResult) -> None:
    pytest.importorskip("tensorboard", reason="the extra `train` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole.out / "tensorboard"))
    events.Reload()
    written = {e.step: e.value for tag in ("pretrain/loss", "sft/loss", "qat/loss") for e in events.Scalars(tag)}
    losses = [line["loss"] for line in records(whole) if "loss" in line]
    assert sorted(written) == list(range(1, 24))  # one axis over all stages
    assert [written[n] for n in range(1, 24)] == pytest.approx(losses, rel=1e-6)  # events hold float32
    assert {"heldout/web", "load_max_over_mean/layer_1", "pretrain/lr"} <= set(events.Tags()["scalars"])


def test_stage_by_stage_is_the_same_run(whole: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    spec = spec_of(*ALL)
    with pytest.raises(UserError, match="stage sft needs weights, and pretrain has not been trained"):
        train(spec, data=corpus, out=tmp_path / "none", stage="sft", threads=1)
    for stage in ("pretrain", "sft", "qat"):
        result = train(spec, data=corpus, out=tmp_path / "run", stage=stage, threads=1)
    assert records(result) == records(whole)
    assert same_weights(result.out, whole.out)
    # from a checkpoint elsewhere: what was trained before is all that counts
    alone = train(spec, data=corpus, out=tmp_path / "alone", stage="sft", init=whole.checkpoint("pretrain"), threads=1)
    assert same_weights(alone.out, whole.out, ("sft",))


def test_a_seed_decides(whole: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    spec = spec_of(*ALL)
    again = train(spec, data=corpus, out=tmp_path / "same", stage="pretrain", seed=5, threads=1)
    assert same_weights(again.out, whole.out, ("pretrain",))
    other = train(spec, data=corpus, out=tmp_path / "other", stage="pretrain", seed=6, threads=1)
    assert not same_weights(other.out, whole.out, ("pretrain",))


# The command that is killed and resumed, as a user runs it.
SCRIPT = """
import sys
from moec.cli.main import main
main(["train", sys.argv[1], "--data", sys.argv[2], "--out", sys.argv[3], "--threads", "1", *sys.argv[4:]])
"""


def started(spec: Path, corpus: Corpus, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(spec), str(corpus.folder), str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def spec_file(folder: Path, spec: Spec) -> Path:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True)))
    return file


def wait_for_lines(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    file = out / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)


def test_killed_at_any_moment(whole: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    """kill -9, whatever was being written; the end is that of the run without a stop."""
    file, out = spec_file(tmp_path, spec_of(*ALL)), tmp_path / "run"
    process = started(file, corpus, out)
    wait_for_lines(out, 8, process)
    process.kill()
    process.communicate()
    last = started(file, corpus, out, "--resume", "--json")
    stdout, stderr = last.communicate(timeout=120)
    assert last.returncode == 0, stderr
    assert [stage["name"] for stage in json.loads(stdout)["stages"]] == ["pretrain", "sft", "qat"]
    assert records(out) == records(whole)
    assert same_weights(out, whole.out)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.out.iterdir())


@pytest.mark.slow
def test_killed_at_fifty_moments(whole: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    """Every run that was killed again and again ends as the one without a stop."""
    file = spec_file(tmp_path, spec_of(*ALL))
    words = ["train", str(file), "--data", str(corpus.folder), "--threads", "1", "-q", "--out"]
    began = time.monotonic()
    assert ended(forked([*words, str(tmp_path / "once")])) == 0
    most = (time.monotonic() - began) / 4
    moments, killed, runs = random.Random(11), 0, 0
    while killed < 50:
        runs += 1
        out = tmp_path / f"run-{runs}"
        done = False
        while not done:
            child = forked([*words, str(out), *(["--resume"] if (out / "state/latest.json").exists() else [])])
            time.sleep(moments.random() * most)
            os.kill(child, signal.SIGKILL)
            status = ended(child)
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
            done = status == 0 or killed >= 50
        assert ended(forked([*words, str(out), "--resume"])) == 0
        assert records(out) == records(whole)
        assert same_weights(out, whole.out)


@pytest.mark.slow
def test_out_of_disk_at_fifty_moments(whole: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the full disk. What was saved stands, and the run ends as it should."""
    file, out = spec_file(tmp_path, spec_of(*ALL)), tmp_path / "run"
    words = ["train", str(file), "--data", str(corpus.folder), "--threads", "1", "-q", "--out", str(out)]
    largest = max(f.stat().st_size for f in whole.out.rglob("*") if f.is_file())
    moments, refused_runs = random.Random(12), 0
    for _ in range(50):
        most = int(moments.random() * largest)

        def limit(most: int = most) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        status = ended(forked([*words, *(["--resume"] if (out / "state/latest.json").exists() else [])], limit))
        assert status in (0, 2)
        refused_runs += status == 2
        if status == 0:
            shutil.rmtree(out)
    assert refused_runs > 25
    assert ended(forked([*words, *(["--resume"] if (out / "state/latest.json").exists() else [])])) == 0
    assert records(out) == records(whole)
    assert same_weights(out, whole.out)


def test_interrupted(whole: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    """Ctrl-C ends the step, saves, and says how to go on; SIGTERM does the same."""
    file, out = spec_file(tmp_path, spec_of(*ALL)), tmp_path / "run"
    process = started(file, corpus, out)
    wait_for_lines(out, 3, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "state saved; continue with --resume" in stderr
    assert "Traceback" not in stderr
    step = json.loads((out / "state/latest.json").read_text())["step"]
    assert step >= 1
    result = train(spec_of(*ALL), data=corpus, out=out, resume=True, threads=1)
    assert records(result) == records(whole)
    assert same_weights(out, whole.out)


def test_micro_batches_change_nothing_but_the_order_of_sums(corpus: Corpus, tmp_path: Path) -> None:
    stage = PRETRAIN | {"dispatch": {"kind": "dropless"}, "precision": "fp32", "tokens": 256 * 4}
    one = train(spec_of(stage), data=corpus, out=tmp_path / "one", threads=1)
    four = train(spec_of(stage | {"micro_batch_tokens": 64}), data=corpus, out=tmp_path / "four", threads=1)
    for a, b in zip(records(one), records(four), strict=True):
        if "loss" in a:  # fp32 sums over 256 tokens in four parts; a few steps of AdamW in between
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_continued_with_something_else(whole: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    spec = spec_of(*ALL)
    with pytest.raises(UserError, match="holds a run of pretrain, sft, qat; continue it with --resume"):
        train(spec, data=corpus, out=whole.out)
    with pytest.raises(UserError, match="holds a run of"):
        train(spec, data=corpus, out=whole.out, stage="sft")
    with pytest.raises(UserError, match="the spec has changed since the run began"):
        train(spec_of(PRETRAIN, SFT | {"tokens": 9999}, QAT), data=corpus, out=whole.out, resume=True)
    with pytest.raises(UserError, match="the run began with seed 5"):
        train(spec, data=corpus, out=whole.out, resume=True, seed=8)
    other = corpus_of(tmp_path / "other", vocab=250)
    with pytest.raises(UserError, match="the corpus has changed"):
        train(spec, data=other, out=whole.out, resume=True)
    before = records(whole)
    assert train(spec, data=corpus, out=whole.out, resume=True).stages == whole.stages  # nothing left to do
    assert records(whole) == before


def test_a_stage_begins_where_the_one_before_it_ended(whole: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    """No stage is skipped or trained out of turn, and weights that were asked for are used or refused."""
    spec, out, init = spec_of(*ALL), tmp_path / "run", whole.checkpoint("pretrain")
    train(spec, data=corpus, out=out, stage="sft", init=init, threads=1)
    with pytest.raises(UserError, match="stage pretrain comes before sft, which the run holds; choose another --out"):
        train(spec, data=corpus, out=out, stage="pretrain", threads=1)
    with pytest.raises(UserError, match="and --init is where a run begins; leave --init out, or choose another --out"):
        train(spec, data=corpus, out=out, stage="qat", init=whole.checkpoint("sft"), threads=1)
    same = train(spec, data=corpus, out=out, stage="qat", init=init, threads=1)  # the run's own, said again
    assert same_weights(same.out, whole.out, ("sft", "qat"))
    train(spec, data=corpus, out=tmp_path / "first", stage="pretrain", threads=1)
    with pytest.raises(UserError, match="stage qat needs weights, and sft has not been trained here; train sft first"):
        train(spec, data=corpus, out=tmp_path / "first", stage="qat", threads=1)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"mixture": {"poetry": 1}}, {}, "pretrain wants domain 'poetry', the corpus has web, code, chat; change"),
        ({"context": 90, "batch_tokens": 90}, {}, "rows of 90 tokens, the model's context is 80"),
        ({}, {"stage": "midtrain"}, "the spec has no stage 'midtrain'; it has pretrain"),
        ({}, {"init": "{tmp}/missing"}, "no such checkpoint folder"),
    ],
)
def test_refused(change: dict[str, Any], options: dict[str, Any], message: str, corpus: Corpus, tmp_path: Path) -> None:
    filled = {name: value.format(tmp=tmp_path) for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        train(spec_of(PRETRAIN | change), data=corpus, out=tmp_path / "out", **filled)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_refused_for_the_model(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SpecError, match="has no `training:` section"):
        train(spec_of(), data=corpus, out=out)
    with pytest.raises(SpecError, match="vocab_size is 200, the corpus has ids up to 299"):
        train(spec_of(PRETRAIN, model=MOE | {"vocab_size": 200}), data=corpus, out=out)
    with pytest.raises(SpecError, match="could not hold its codes: embedding is int8"):
        train(spec_of(QAT, quantization={"weights": "int4", "embedding": "int8"}), data=corpus, out=out)
    with pytest.raises(SpecError, match="stage qat rounds, but quantization is none"):
        train(spec_of(QAT, quantization="none"), data=corpus, out=out)
    with pytest.raises(UserError, match="9 bits; choose 2 to 8"):
        train(spec_of(QAT), data=corpus, out=out, bits=9)
    assert not out.exists()


def test_another_tokenizer_is_refused(whole: RunResult, corpus: Corpus, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(whole.checkpoint("sft"), tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("other")
    with pytest.raises(UserError, match="its tokenizer is not the corpus's"):
        train(spec_of(PRETRAIN), data=corpus, out=tmp_path / "out", init=tmp_path / "c")


def test_divergence_is_said(corpus: Corpus, tmp_path: Path) -> None:
    stage = PRETRAIN | {"learning_rate": {"peak": 9.9}, "optimizer": {"eps": 1e-30, "clip_norm": 1e30}, "tokens": 99999}
    spec = spec_of(stage, model=MOE | {"qk_norm": False})
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at step \d+ of pretrain; lower learning_rate.peak"):
        train(spec, data=corpus, out=tmp_path / "out", threads=1)


def test_a_folder_of_something_else_is_left_alone(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds something that is not a run; choose another --out"):
        train(spec_of(PRETRAIN), data=corpus, out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_two_runs_in_one_folder(corpus: Corpus, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing there"):
            train(spec_of(PRETRAIN), data=corpus, out=out)


@pytest.mark.parametrize("damage", ["run.json", "latest.json", ".metadata", ".distcp"])
def test_a_damaged_state(damage: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, step = tmp_path / "run", Trainer.step

    def stopped(trainer: Trainer) -> dict[str, Any]:
        if trainer.done == 6:  # the state is that of step 4
            raise RuntimeError("stopped")
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        train(spec_of(PRETRAIN | {"tokens": 99999}), data=corpus, out=out, threads=1)
    monkeypatch.undo()
    victim = next(p for p in sorted(out.rglob("*")) if p.name.endswith(damage))
    victim.write_bytes(os.urandom(100))
    with pytest.raises(UserError, match="start again in another --out"):
        train(spec_of(PRETRAIN | {"tokens": 99999}), data=corpus, out=out, resume=True, threads=1)


def test_without_tensorboard(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    stage = PRETRAIN | {"tokens": 256}
    train(spec_of(stage), data=corpus, out=tmp_path / "out", threads=1, progress=Progress())
    assert "no TensorBoard events: install moec[train] to have them" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_a_log_shows_where_training_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where lines cannot be overwritten one comes every half minute, however often steps are logged."""
    now = [1000.0]
    monkeypatch.setattr("moec.training.metrics.time.perf_counter", lambda: now[0])
    live = Live(Progress(), "pretrain", 0, 100)
    record = {"loss": 3.0, "tokens_per_s": 1200.0, "load_max_over_mean": [1.2, 1.31], "dropped_fraction": 0.004}
    for step in range(1, 71):
        now[0] += 1
        live.step(step, record)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"pretrain {n}/100, {left} left: loss 3.000, 1,200 tokens/s, expert load max/mean 1.31, dropped 0.4%"
        for n, left in ((30, "1:10"), (60, "0:40"))
    ]


def test_schedules() -> None:
    cosine = Schedule(peak=2.0, warmup=100, final=0.1)
    assert learning_rate(cosine, 50, 1100) == 1.0
    assert learning_rate(cosine, 100, 1100) == 2.0
    assert learning_rate(cosine, 600, 1100) == pytest.approx(1.1)
    assert learning_rate(cosine, 1100, 1100) == pytest.approx(0.2)
    linear = Schedule(peak=2.0, shape="linear", final=0.0)
    assert [learning_rate(linear, n, 4) for n in range(1, 5)] == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert learning_rate(Schedule(peak=2.0, shape="constant", warmup=1), 10**9, 1) == 2.0


def test_steps_see_all_tokens() -> None:
    stage = TrainingStage.model_validate(STAGE | {"name": "sft", "tokens": 1000, "context": 48, "batch_tokens": 100})
    assert (stage.rows, stage.steps) == (2, 11)  # rows of 48, two in 100 tokens: 96 a step
    assert stage.steps * 96 >= 1000 > (stage.steps - 1) * 96


def test_a_dense_model_trains(corpus: Corpus, tmp_path: Path) -> None:
    from tests.training.small import DENSE

    stage = PRETRAIN | {"dispatch": {"kind": "dropless"}, "tokens": 256 * 3}
    spec = spec_of(stage, model=DENSE | {"vocab_size": 300}, quantization="none")
    result = train(spec, data=corpus, out=tmp_path / "out", threads=1)
    line = [line for line in records(result) if "loss" in line][-1]
    assert line["load_max_over_mean"] == []
    assert line["z_loss"] == 0
    store = open_store(result.checkpoint(), spec.model)
    assert all(torch.isfinite(store[name].load()).all() for name in weight_layout(spec.model))


def test_the_command(whole: RunResult, corpus: Corpus, tmp_path: Path, capsys: Any) -> None:
    from moec.cli.main import run

    file = spec_file(tmp_path, spec_of(*ALL))
    arguments = ["train", str(file), "--data", str(corpus.folder), "--out", str(whole.out)]
    assert run([*arguments, "--resume", "-q"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["small:", "trained"]
    assert [row[:3] for row in rows[2:]] == [["pretrain", "12", "3,072"], ["sft", "5", "1,280"], ["qat", "6", "1,536"]]
    assert err == ""
    assert run(arguments) == 2
    assert capsys.readouterr().err == (
        f"{whole.out}: holds a run of pretrain, sft, qat; continue it with --resume, or choose another --out\n"
    )
    assert run([*arguments[:3], str(tmp_path / "nowhere"), *arguments[4:]]) == 2
    assert "no corpus here" in capsys.readouterr().err


def test_a_micro_batch_holds_a_row() -> None:
    with pytest.raises(ValueError, match="must hold at least one sequence of 32 tokens, got 31"):
        spec_of(PRETRAIN | {"micro_batch_tokens": 31})


def test_another_number_of_threads_is_said(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, out = spec_of(PRETRAIN | {"tokens": 256}, SFT | {"tokens": 256}), tmp_path / "run"
    said = "begun with 1 threads in 1 process(es), continued with 2 threads in 1 process(es): sums may differ"
    train(spec, data=corpus, out=out, stage="pretrain", threads=1, progress=Progress())
    assert "begun with" not in capsys.readouterr().err
    train(spec, data=corpus, out=out, resume=True, threads=2, progress=Progress())
    assert said in capsys.readouterr().err
    train(spec, data=corpus, out=out, resume=True, threads=2, progress=Progress())
    assert "begun with" not in capsys.readouterr().err  # nothing is left to do
    torch.set_num_threads(1)


def test_metrics_that_were_cut_are_not_padded(corpus: Corpus, tmp_path: Path) -> None:
    spec, out = spec_of(PRETRAIN | {"tokens": 256}, SFT | {"tokens": 256}), tmp_path / "run"
    train(spec, data=corpus, out=out, stage="pretrain", threads=1)
    (out / "metrics.jsonl").write_text("")
    train(spec, data=corpus, out=out, resume=True, threads=1)
    assert {line["stage"] for line in records(out)} == {"sft"}


def test_a_full_disk_is_one_line(corpus: Corpus, tmp_path: Path) -> None:
    """Said with the file; what was saved before stands, and the run goes on once there is space."""
    spec, out = spec_of(PRETRAIN | {"tokens": 256}, SFT | {"tokens": 256}), tmp_path / "run"
    full = r"cannot be written: No space left on device; is the disk full\? free some space and continue with --resume"
    train(spec, data=corpus, out=out, stage="pretrain", threads=1)
    (out / "state" / "latest.json.new").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"latest.json: {full}"):
        train(spec, data=corpus, out=out, resume=True, threads=1)
    assert not list(out.rglob("*.new"))
    assert [stage.name for stage in train(spec, data=corpus, out=out, resume=True, threads=1).stages] == [
        "pretrain", "sft"
    ]  # fmt: skip
    metrics = Metrics(tmp_path, keep_bytes=0, first_step=1)
    assert metrics._stream is not None
    metrics._stream.close()
    metrics._stream = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(UserError, match=f"metrics.jsonl: {full}"):
        metrics.write({"stage": "sft", "step": 1}, 1)
    metrics.close()


def test_resume_with_nothing_there_says_so(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec_of(PRETRAIN | {"tokens": 256})
    train(spec, data=corpus, out=tmp_path / "run", resume=True, threads=1, progress=Progress())
    assert "nothing to resume: training begins" in capsys.readouterr().err
    train(spec, data=corpus, out=tmp_path / "run", resume=True, threads=1, progress=Progress())
    assert "nothing to resume" not in capsys.readouterr().err
