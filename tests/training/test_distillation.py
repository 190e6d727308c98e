"""Stages that learn from a dense teacher: the losses by their definitions, what is trained, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moec.checkpoints import open_store
from moec.compiler.errors import SpecError, UserError
from moec.sources.decoder.config import DecoderConfig
from moec.training.checkpoints import write_checkpoint
from moec.training.data.shards import Corpus
from moec.training.loss import Taught, taught_losses
from moec.training.model import relative_errors
from moec.training.run import train
from tests.training.small import DENSE, MOE, PRETRAIN, QAT, SFT, STAGE, config_of, corpus_of, random_weights, spec_of

TEACHER = {k: v for k, v in MOE.items() if k != "moe"} | {"architecture": "mobilellm", "ffn_width": 96}
STUDY: dict[str, Any] = STAGE | {
    "name": "midtrain", "tokens": 256 * 8, "precision": "fp32", "mixture": {"web": 1}, "eval_every": None,
    "learning_rate": {"peak": 3e-3, "shape": "constant"},
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "dense"
    config = config_of(TEACHER)
    write_checkpoint(folder, config, random_weights(config, seed=4), tokenizer=None)
    return folder


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("lm", "kl", "temperature"), [(0.0, 1.0, 1.0), (0.3, 0.7, 2.0), (1.0, 0.0, 1.0)])
def test_taught_losses_are_those_of_autograd(seed: int, lm: float, kl: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows, width, words = 517 + seed, 9, 31  # more than one piece of rows
    h, head, theirs, their_head = (
        random(rows, width),
        random(words, width),
        random(rows, width + 2),
        random(words, width + 2),
    )
    targets, mask = torch.randint(0, words, (rows,), generator=generator), (random(rows) > 0).float()
    results = []
    for own in (True, False):
        a, b = h.clone().requires_grad_(), head.clone().requires_grad_()
        if own:
            loss, nll, kld = taught_losses(a, b, targets, mask, Taught(theirs, their_head, lm, kl, temperature))
        else:
            x, t = a @ b.T, theirs @ their_head.T
            nll = (F.cross_entropy(x, targets, reduction="none") * mask).sum()
            pair = (x / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
            kld = (F.kl_div(*pair, reduction="none", log_target=True).sum(-1) * mask).sum() * temperature**2
            loss = lm * nll + kl * kld
        loss.backward()
        results.append((loss.detach(), nll.detach(), kld.detach(), a.grad, b.grad))
    for mine, theirs_ in zip(*results, strict=True):  # float32 sums of some hundred terms in another order
        torch.testing.assert_close(mine, theirs_, rtol=2e-5, atol=2e-4)


def test_relative_errors_count_every_token_alike() -> None:
    wanted = torch.randn(2, 9, 5)
    wanted[0, 0] *= 1000  # one token of enormous activations
    assert float(relative_errors(wanted, wanted)) == 0
    assert float(relative_errors(torch.zeros_like(wanted), wanted)) <= 18
    assert float(relative_errors(torch.zeros_like(wanted), wanted)) > 9


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


def weights(folder: Path, config: DecoderConfig) -> dict[str, torch.Tensor]:
    store = open_store(folder, config)
    return {name: lazy.load() for name, lazy in store.weights.items()}


@pytest.mark.parametrize(
    ("distillation", "falls"),
    [
        ({"logits": 1.0}, "kld"),
        ({"blocks": 1.0}, "block_error"),
        ({"logits": 1.0, "blocks": 0.5, "lm_loss": 0.1}, "kld"),
    ],
)
def test_a_student_comes_nearer_to_its_teacher(
    distillation: dict[str, float], falls: str, corpus: Corpus, teacher: Path, tmp_path: Path
) -> None:
    init = tmp_path / "init"
    write_checkpoint(init, config_of(), random_weights(config_of(), seed=1), tokenizer=None)
    spec = spec_of(STUDY | {"distillation": distillation})
    train(spec, data=corpus, out=tmp_path / "run", init=init, teacher=teacher, threads=1)
    lines = metrics(tmp_path / "run")
    assert lines[-1][falls] < 0.95 * lines[0][falls]
    assert ("lm_loss" in lines[0]) == (falls == "kld")
    z = 1e-4 * lines[0]["z_loss"]
    parts = (distillation.get(k, 0) * lines[0].get(n, 0) for k, n in (("logits", "kld"), ("blocks", "block_error")))
    lm = distillation.get("lm_loss", 0) * lines[0].get("lm_loss", 0)
    assert lines[0]["loss"] == pytest.approx(sum(parts) + lm + z, rel=1e-6)
    before, after = weights(init, config_of()), weights(tmp_path / "run" / "midtrain", config_of())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {name for name in before if ".self_attn." in name or "embed" in name}
    if falls == "block_error":  # blocks alone: nothing else moves
        assert changed
        assert all(".feed_forward." in name for name in changed)
    else:
        assert attention <= changed


def test_a_teacher_equal_to_the_student_teaches_nothing(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    stage = STUDY | {"distillation": {"logits": 1.0, "blocks": 1.0}, "tokens": 256}
    train(spec_of(stage, model=TEACHER), data=corpus, out=tmp_path / "run", init=teacher, teacher=teacher, threads=1)
    (line,) = metrics(tmp_path / "run")
    assert line["kld"] == pytest.approx(0, abs=1e-6)  # rounding of log-probabilities of order five
    assert line["block_error"] == 0


def test_a_stopped_run_with_a_teacher_continues(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    spec = spec_of(STUDY | {"distillation": {"logits": 1.0}})
    whole = train(
        spec, data=corpus, out=tmp_path / "whole", teacher=teacher, stage="midtrain", init=_init(tmp_path), threads=1
    )
    wrong = tmp_path / "other"
    write_checkpoint(wrong, config_of(TEACHER), random_weights(config_of(TEACHER), seed=5), tokenizer=None)
    record = json.loads((whole.out / "run.json").read_text())
    assert record["teacher"] == str(teacher)
    with pytest.raises(UserError, match="the run began with the teacher"):
        train(spec, data=corpus, out=whole.out, teacher=wrong, resume=True)


def _init(folder: Path) -> Path:
    write_checkpoint(folder / "init", config_of(), random_weights(config_of(), seed=1), tokenizer=None)
    return folder / "init"


def test_what_cannot_be_learnt_is_refused_before_a_run(corpus: Corpus, teacher: Path, tmp_path: Path) -> None:
    study = STUDY | {"distillation": {"blocks": 1.0}}
    out = tmp_path / "run"
    with pytest.raises(UserError, match="give --teacher CHECKPOINT"):
        train(spec_of(study), data=corpus, out=out)
    with pytest.raises(UserError, match="no stage of the spec learns from it"):
        train(spec_of(PRETRAIN, SFT, QAT), data=corpus, out=out, teacher=teacher)
    with pytest.raises(UserError, match="torchtitan has no distillation"):
        train(spec_of(study), data=corpus, out=out, teacher=teacher, backend="torchtitan")
    other = tmp_path / "other"
    write_checkpoint(other, config_of(DENSE), random_weights(config_of(DENSE)), tokenizer=None)
    with pytest.raises(SpecError, match="the teacher's 111"):
        train(spec_of(study), data=corpus, out=out, teacher=other)
    layers = tmp_path / "layers"
    deeper = config_of(TEACHER, layers=3)
    write_checkpoint(layers, deeper, random_weights(deeper), tokenizer=None)
    with pytest.raises(SpecError, match="the teacher has 3 layers of 64, the model 2 of 64"):
        train(spec_of(study), data=corpus, out=out, teacher=layers)
    words = tmp_path / "words"
    write_checkpoint(words, config_of(TEACHER), random_weights(config_of(TEACHER)), tokenizer=None)
    (words / "tokenizer.json").write_text('{"other": "words"}')
    with pytest.raises(UserError, match="the teacher's tokenizer is not the corpus's"):
        train(spec_of(study), data=corpus, out=out, teacher=words)
    assert not out.exists()
    with pytest.raises(ValueError, match="nothing is learnt from the teacher"):
        spec_of(STUDY | {"distillation": {"lm_loss": 1.0}})
