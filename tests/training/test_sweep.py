"""Sweeps as a whole: what one leaves, stops at any moment, damaged folders, runs that diverge, `moec fit` behind it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moec.analysis.plan.fit import fit, read_runs
from moec.analysis.plan.scaling_law import PUBLISHED
from moec.compiler.errors import UserError
from moec.compiler.spec import Spec
from moec.sources.decoder.config import DecoderConfig
from moec.training.data.shards import Corpus
from moec.training.stage import Trainer, require_finite
from moec.training.sweep import speed
from moec.training.sweep.grid import Grid, points
from moec.training.sweep.page import COLUMNS, plot, runs_csv
from moec.training.sweep.page import report as report_of
from moec.training.sweep.store import Result
from moec.training.sweep.sweep import Asked, Planned, Swept, mean_loss, plan
from tests.conftest import Moec, refused
from tests.forked import ended, forked
from tests.training.small import MOE, PRETRAIN, QAT, STAGE, corpus_of, spec_of

MODEL: dict[str, Any] = MOE | {  # E = 4, g = 4, shared
    "moe": {"experts": 14, "top_k": 2, "expert_width": 32, "shared_width": 64, "scale": 1.5}
}
POINTS = ("d64-t1024-dense", "d64-t1024-e4-g4", "d64-t1024-e4-g4-shared")
VARY = ("--vary", "experts,shared", "--experts", "1,4", "--tolerance", "0.05", "--budget", "1024")


TIMED = speed.tokens_per_second


@pytest.fixture(scope="module", autouse=True)
def _known_speed() -> Iterator[None]:
    """What is timed in one test is given in the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "tokens_per_second", lambda *_: 1e5)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def spec() -> Spec:
    return spec_of(STAGE | {"name": "pretrain", "tokens": 256 * 12, "precision": "fp32"}, model=MODEL)


@pytest.fixture(scope="module")
def words(corpus: Corpus, spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("spec") / "small.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True)))
    return ["sweep", str(file), "--data", str(corpus.folder), "--threads", "1", *VARY]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three points, two seeds, without a stop."""
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    assert ended(forked([*words, "--seeds", "2", "--out", str(out)])) == 0
    return out


def results(out: Path) -> dict[str, Any]:
    """Every result but for its seconds, which no two runs share."""
    found = {file.stem: json.loads(file.read_text()) for file in (out / "results").glob("*.json")}
    return {name: {key: value for key, value in result.items() if key != "seconds"} for name, result in found.items()}


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_what_a_sweep_leaves(whole: Path, spec: Spec) -> None:
    found = report(whole)
    assert [p["name"] for p in found["points"]] == list(POINTS)
    assert (found["seeds"], found["trained"], found["lost"], found["waiting"]) == ([5, 6], 6, [], [])
    for point in found["points"]:
        assert abs(point["deviation"]) <= 0.05
        for seed, loss in point["losses"].items():
            run = json.loads((whole / "runs" / f"{point['name']}-s{seed}" / "run.json").read_text())
            assert run["seed"] == int(seed)
            assert run["spec"]["training"]["stages"][0]["learning_rate"]["warmup"] == 512 // 3  # a third of the tokens
            result = results(whole)[f"{point['name']}-s{seed}"]
            assert result["tokens"] == 1024
            assert loss == pytest.approx((2 * result["heldout"]["web"] + result["heldout"]["code"]) / 3)
            assert result["heldout"].keys() == {
                "web",
                "code",
                "chat",
            }  # chat is not in the mixture, and not in the loss
    assert set(found["verdicts"]) == {"experts", "shared"}
    effect = next(e for e in found["effects"] if e["factor"] == "shared")
    by_name = {p["name"]: p["losses"] for p in found["points"]}
    for seed in ("5", "6"):
        assert effect["by_seed"][seed] == pytest.approx(by_name[POINTS[2]][seed] - by_name[POINTS[1]][seed])
    lines = (whole / "runs.csv").read_text().splitlines()
    assert lines[0].split(",") == list(COLUMNS)
    assert len(lines) == 7
    picture = (whole / "plot.svg").read_text()
    assert picture.startswith("<svg")
    assert all(word in picture for word in ("dense", "E=4, g=4, shared", "none shared to shared"))


def test_points_share_data_and_weights(whole: Path) -> None:
    """The paired design: under one seed, the loss before the first step differs by the blocks' weights alone, and
    equal tensors begin equal. Other seeds begin elsewhere."""
    from moec.training.checkpoints import initial_weights
    from moec.training.stages import data_seed

    specs = [json.loads((whole / "runs" / f"{p}-s5" / "run.json").read_text()) for p in POINTS]
    assert len({data_seed(s["seed"], "pretrain") for s in specs}) == 1
    assert len({json.dumps([s["spec"]["training"], s["digests"]["corpus"]]) for s in specs}) == 1
    weights = [
        dict(initial_weights(DecoderConfig.model_validate_json(json.dumps(s["spec"]["model"])), 5)) for s in specs
    ]
    shared = "model.layers.0.self_attn.q_proj.weight"
    assert all((w[shared] == weights[0][shared]).all() for w in weights)


def test_the_plan(words: list[str], moec: Moec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as real:
        real.setattr(speed, "tokens_per_second", TIMED)
        status, out, _ = moec(*words, "--dry-run", "--json", "-q")
    assert status == 0
    found = json.loads(out)
    assert [p["name"] for p in found["points"]] == list(POINTS)
    assert found["runs"] == 9
    assert found["predicted_seconds"] == pytest.approx(3 * sum(p["predicted_seconds"] for p in found["points"]))
    status, out, _ = moec(*words, "--dry-run", "--granularity", "3", "-q")
    assert status == 0
    assert "left out: d_model 64: E=4, g=3, shared: a shared expert takes half of the chosen slots" in out
    table = [line for line in out.splitlines() if line.startswith(("dense", "E=4"))]
    assert len({len(line) for line in table}) == 1, table
    # no tokens are named: as many as there is time for, in whole steps
    timed = words[: words.index("--budget")]
    status, out, _ = moec(*timed, "--budget", "60s", "--dry-run", "--json", "-q")
    assert status == 0
    found = json.loads(out)
    assert {p["tokens"] % 256 for p in found["points"]} == {0}
    assert 0.5 * 60 < found["predicted_seconds"] <= 60
    refused(moec(*timed, "--budget", "0.1s", "--dry-run", "-q"), "--budget: 9 runs in 0:00 leave 0 tokens for each")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_at_any_moment(words: list[str], whole: Path, tmp_path: Path) -> None:
    """kill -9 again and again; the end is that of the sweep without a stop, and no finished run is trained again."""
    out, moments, killed = tmp_path / "sweep", random.Random(7), 0
    done: dict[str, int] = {}
    status = -1
    while status != 0:
        child = forked([*words, "--seeds", "2", "--out", str(out), *(["--resume"] if out.exists() else [])])
        if killed < 4:
            time.sleep(0.1 + 0.8 * moments.random())
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
        for file in (out / "results").glob("*.json"):
            assert done.setdefault(file.name, file.stat().st_mtime_ns) == file.stat().st_mtime_ns
    assert killed >= 2
    assert results(out) == results(whole)
    for part in ("effects", "verdicts", "noise"):
        assert report(out)[part] == report(whole)[part]
    assert (out / "runs.csv").read_text() == (whole / "runs.csv").read_text()


def test_continued(words: list[str], whole: Path, moec: Moec, tmp_path: Path) -> None:
    """More seeds are new runs beside the old; what else changes is refused in one line, before anything is trained."""
    out = tmp_path / "sweep"
    shutil.copytree(whole, out)
    refused(moec(*words, "--out", out, "-q"), "holds a sweep; continue it with --resume")
    more = [w if w != "1,4" else "1,4,8" for w in words]
    refused(moec(*more, "--out", out, "--resume", "-q"), "the spec, the corpus or the grid has changed")
    other = [w if w != "1024" else "2048" for w in words]
    refused(moec(*other, "--out", out, "--resume", "-q"), "the grid has changed since the sweep began")
    before = results(out)
    timed = words[: words.index("--budget")]
    status, said, _ = moec(*timed, "--seeds", "3", "--budget", "1h", "--out", out, "--resume", "--json", "-q")
    assert status == 0
    found = json.loads(said)
    assert (found["trained"], found["seeds"]) == (9, [5, 6, 7])
    assert {name: results(out)[name] for name in before} == before
    status, said, _ = moec(*words, "--seeds", "4", "--budget", "1024,1s", "--out", out, "--resume", "-q")
    assert status == 0  # the time is spent already
    assert "3 runs were not begun: the time is spent" in said
    assert "separable" in said


def test_runs_without_a_loss(
    words: list[str], whole: Path, moec: Moec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One point diverges, another meets a fault: both are reported, the third has its losses, the status is 1."""
    step = Trainer.step

    def broken(trainer: Trainer) -> dict[str, Any]:
        if trainer.model.config.moe is None:
            require_finite("the loss", math.nan, trainer.stage, trainer.done + 1)
        if trainer.model.config.moe is not None and trainer.model.config.moe.shared_width == 0 and trainer.done == 2:
            raise ZeroDivisionError("a fault")
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", broken)
    out = tmp_path / "sweep"
    status, said, _ = moec(*words, "--seeds", "2", "--out", out, "-q")
    assert status == 1
    assert f"{POINTS[0]}, seed 5: diverged: the loss is nan at step 1 of pretrain" in said
    assert f"{POINTS[1]}, seed 6: failed: ZeroDivisionError: a fault" in said
    assert "Traceback" in (out / "results" / f"{POINTS[1]}-s5.traceback.txt").read_text()
    assert "shared: nothing to compare" in said
    assert len((out / "runs.csv").read_text().splitlines()) == 3
    monkeypatch.setattr(Trainer, "step", step)
    status, said, _ = moec(*words, "--seeds", "2", "--out", out, "--resume", "-q")
    assert status == 1  # what failed is tried again and ends as ever; what diverged would diverge again
    assert "diverged" in said
    assert "ZeroDivisionError" not in said
    kept = results(whole)
    assert {n: r for n, r in results(out).items() if POINTS[0] not in n} == {
        n: r for n, r in kept.items() if POINTS[0] not in n
    }


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sweep.json", "{", "sweep.json: damaged"),
        ("sweep.json", "[]", "sweep.json: damaged"),
        ("sweep.json", '{"format": 1}', "sweep.json: damaged: name: Field required; choose another --out"),
        ("sweep.json", {"format": 2}, "sweep.json: is of format 2"),
        ("sweep.json", {"rates": {"d64-t0-dense": -1.0}}, "damaged: rates and tokens are above 0"),
        ("sweep.json", {"rates": {"d64-t0-dense": math.inf}}, "damaged"),
        ("sweep.json", {"tokens": [0]}, "damaged: rates and tokens are above 0"),
        ("sweep.json", {"more": 1}, "damaged: more"),
        ("sweep.json", {"digest": "0"}, "has changed since the sweep began"),
        (f"results/{POINTS[1]}-s6.json", "\0", "damaged: "),
        (f"results/{POINTS[1]}-s6.json", {"seed": 5}, "it is of d64-t1024-e4-g4, seed 5; remove it"),
        (f"results/{POINTS[1]}-s6.json", {"loss": None}, "damaged: trained with the loss None"),
        (f"results/{POINTS[1]}-s6.json", {"loss": -1.0}, "damaged: the loss is -1.0"),
        (f"results/{POINTS[1]}-s6.json", {"status": "fine"}, "damaged: status"),
        (f"results/{POINTS[1]}-s6.json", {"seconds": -3.0}, "damaged"),
        (f"results/{POINTS[1]}-s6.json", {"loss": "1"}, "damaged: loss"),
    ],
)
def test_damaged(
    file: str, text: str | dict[str, Any], message: str, words: list[str], whole: Path, moec: Moec, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("runs"))
    if isinstance(text, dict):
        text = json.dumps(json.loads((out / file).read_text()) | text)
    (out / file).write_text(text)
    refused(moec(*words, "--seeds", "2", "--out", out, "--resume", "-q"), message)


def test_a_damaged_run_is_its_own(words: list[str], whole: Path, moec: Moec, tmp_path: Path) -> None:
    """A result that is gone is read from its run; a run whose state is damaged fails alone."""
    out = tmp_path / "sweep"
    shutil.copytree(whole, out)
    for name in (f"{POINTS[0]}-s5", f"{POINTS[1]}-s5"):
        (out / "results" / f"{name}.json").unlink()
    (out / "runs" / f"{POINTS[1]}-s5" / "state" / "latest.json").write_text("{")
    status, said, _ = moec(*words, "--seeds", "2", "--out", out, "--resume", "-q")
    assert status == 1
    assert f"{POINTS[1]}, seed 5: failed: " in said
    assert "latest.json: damaged" in said
    assert results(out)[f"{POINTS[0]}-s5"] == results(whole)[f"{POINTS[0]}-s5"]
    assert report(out)["trained"] == 5


def test_wrong_folders(words: list[str], moec: Moec, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(moec(*words, "--out", tmp_path, "-q"), "holds something that is not a sweep")
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
    refused(moec(*words, "-q"), "no folder to write to; give --out FOLDER, or --dry-run")
    refused(moec(*words, "--resume", "--dry-run"), "--resume and --dry-run")
    refused(moec(*words, "--device", "tpu", "--out", tmp_path / "x"), "--device 'tpu' is not known")
    untold = words[: words.index("--budget")]
    refused(moec(*untold, "--out", tmp_path / "x"), "--budget: says neither tokens nor time")
    refused(moec(*words, "--tolerance", "nan", "--out", tmp_path / "x"), "Invalid value for '--tolerance'")
    refused(moec(*words, "--d-model", "48", "--out", tmp_path / "x"), "choose multiples of 32")
    assert not (tmp_path / "x").exists()


def test_nothing_was_trained(spec: Spec, corpus: Corpus) -> None:
    """Every run diverged: a report and a plot without losses, and no verdict."""
    planned = plan(asked(spec, corpus))
    lost = tuple(Result(p.name, 5, "diverged", 1.0, message="the loss is nan") for p in planned.points)
    found = report_of(Swept(planned, lost, ()))
    assert (found["trained"], len(found["lost"]), found["effects"]) == (0, 2, [])
    assert found["verdicts"] == {"experts": "nothing to compare"}
    assert plot(found, "none").startswith("<svg")
    assert runs_csv(Swept(planned, lost, ())).count("\n") == 1


def asked(spec: Spec, corpus: Corpus, **grid: Any) -> Asked:
    chosen = {"experts": (1, 4), "granularity": (4,), "shared": (False,), "d_model": (64,), "tokens": (1024,)} | grid
    return Asked(spec, corpus, Grid(**chosen), 1, None, 0.05, 8, 1, "cpu")


def test_refused_specs(corpus: Corpus, spec: Spec) -> None:
    with pytest.raises(UserError, match="has no `training:` section"):
        plan(asked(spec_of(model=MODEL), corpus))
    taught = PRETRAIN | {"distillation": {"logits": 1.0}}
    with pytest.raises(UserError, match="learns from a teacher, which a sweep does not have"):
        plan(asked(spec_of(taught, model=MODEL), corpus))
    with pytest.raises(UserError, match="a sweep trains in float, and its first stage, qat, rounds"):
        plan(asked(spec_of(QAT, model=MODEL), corpus))
    with pytest.raises(UserError, match="no domain of the mixture has held-out text"):
        plan(asked(spec_of(PRETRAIN | {"mixture": {"poetry": 1}}, model=MODEL), corpus))
    with pytest.raises(UserError, match="vocab_size is 200, the corpus has ids up to 299"):
        plan(asked(spec_of(PRETRAIN, model=MODEL | {"vocab_size": 200}), corpus))
    assert mean_loss(spec.training.stages[0], {"web": 3.0, "chat": 99.0}) == 3.0  # type: ignore[union-attr]


def test_it_feeds_fit(corpus: Corpus, spec: Spec, tmp_path: Path) -> None:
    """runs.csv of a grid of sizes, tokens and E, with losses of a known law, goes into `moec fit` as it is."""
    wanted = asked(spec, corpus, experts=(1, 2, 4, 8), d_model=(64, 128, 192, 256), tokens=(10**6, 10**7, 10**8))
    found, _ = points(spec.model, wanted.grid, tolerance=0.2, multiple=1)  # type: ignore[arg-type]
    law = replace(PUBLISHED, A=0.5, B=0.02)
    runs = tuple(
        Result(p.name, 5, "trained", 1.0, p.tokens, law.loss(p.active / 1e9, p.tokens / 1e9, p.experts), {"web": 1.0})
        for p in found
    )
    lost = Result(found[0].name, 6, "diverged", 1.0, message="the loss is nan")
    planned = Planned(wanted, spec.model, spec.training.stages[0], found, (), (5,), {}, {}, "cpu")  # type: ignore[arg-type, union-attr]
    file = tmp_path / "runs.csv"
    file.write_text(runs_csv(Swept(planned, (*runs, lost), ())))
    table = read_runs(file)
    assert table.shape == (48, 4)
    assert fit(table).explained > 0.99
