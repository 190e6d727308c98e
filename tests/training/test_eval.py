"""Evaluation: scores are the model's, batches change nothing, and the harness is driven without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the eval extra: pip install 'moec[eval]'")

from moec.cli.main import run as command
from moec.compiler.texts import prompts
from moec.compiler.tokenizer import TextTokenizer
from moec.training.checkpoints import write_checkpoint
from moec.training.data.document import Document
from moec.training.data.tasks import write_tasks
from moec.training.evaluate import EvaluationError, evaluate, list_tasks
from moec.training.evaluate_models import EagerModel, HarnessModel, checkpoint_model, log_probabilities
from moec.training.rounding import Rounding
from moec.training.tokenizer import Coder, train_tokenizer
from tests.training.small import config_of, model_of, random_weights, spec_of

VOCAB = 500
TOKENIZER = train_tokenizer(prompts().values(), VOCAB)
CODER = Coder.from_text(TOKENIZER)
WORDS = TextTokenizer(CODER.tokenizer.to_str().encode(), "tokenizer.json")
CONFIG = config_of(vocab_size=VOCAB, eos_ids=[1, 4])
MODEL = EagerModel(model_of(CONFIG, random_weights(CONFIG)))
RANDOM = np.random.default_rng(2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one text domain and one of sums."""
    folder = tmp_path_factory.mktemp("corpus")
    # answers of two digits: none is the beginning of another, which would be as likely
    sums = [Document(prompt=f"{i} + {i + 1}?", response=str(2 * i + 1), family="sum") for i in range(10, 40)]
    texts = [Document(text[:300]) for text in prompts().values()]
    write_tasks(folder, CODER, {"prose": lambda: iter(texts), "sums": lambda: iter(sums)})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed INT4 checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "tokenizer.json").write_text(TOKENIZER)
    rounding = Rounding(spec_of().quantization)
    write_checkpoint(
        folder / "qat", CONFIG, random_weights(CONFIG), tokenizer=folder / "tokenizer.json", rounding=rounding
    )
    return folder / "qat"


def random_rows(*lengths: int) -> list[list[int]]:
    """The same rows for the same lengths, whichever tests ran before."""
    random = np.random.default_rng(sum(lengths))
    return [random.integers(5, VOCAB, n).tolist() for n in lengths]


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits = RANDOM.normal(0, 30, (9, 50)).astype(np.float32)
    ids = RANDOM.integers(0, 50, 9).tolist()
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1)[torch.arange(9), ids].sum()
    found, greedy = log_probabilities(logits, ids)
    assert found == pytest.approx(float(wanted), rel=1e-12)
    assert not greedy
    assert log_probabilities(logits, logits.argmax(1).tolist())[1]


def test_an_empty_answer_is_certain() -> None:
    assert log_probabilities(np.zeros((0, 50), np.float32), []) == (0.0, True)


def test_an_answer_keeps_its_ids_behind_a_line_end() -> None:
    # `?` and a line end are one id in many tokenizers, which left nothing of the answer
    harness = HarnessModel(MODEL, WORDS)
    for question in ('the text "a b"?\n', "2 + 2?\n\n", "name it: ", "Is it so?", "  \n", ""):
        for answer in ("5", "57", " five", "yes\nno", "\n"):
            given, ids = harness._encode_pair(question, answer)
            assert ids, (question, answer)
            text = CODER.tokenizer.decode(given + ids, skip_special_tokens=True)
            assert text == question + answer
            moved = len(question) - len(question.rstrip(" "))
            assert CODER.tokenizer.decode(ids) == question[len(question) - moved :] + answer


def test_rows_of_a_batch_score_as_they_do_alone() -> None:
    rows = random_rows(1, 80, 7, 33, 7, 64, 2)
    together = list(MODEL.scores(rows))
    for row, logits in zip(rows, together, strict=True):
        (alone,) = MODEL.scores([row])
        assert logits.shape == (len(row), VOCAB)
        # float32 sums over 64 features in another order, logits of order one
        np.testing.assert_allclose(logits, alone, atol=2e-5)


def test_greedy_is_the_argmax_step_by_step() -> None:
    given = random_rows(3, 20, 78, 11)
    stop = frozenset({int(next(MODEL.scores([given[3]]))[-1].argmax())})
    found = list(MODEL.greedy(given, 6, stop))
    assert found[3] == []
    for prompt, new in zip(given, found, strict=True):
        row = list(prompt)
        for token in new:
            assert token == int(next(MODEL.scores([row]))[-1].argmax())
            row.append(token)
        assert len(new) == 6 or len(row) == CONFIG.context or int(next(MODEL.scores([row]))[-1].argmax()) in stop


class _Adder:
    """Knows that the answer to `a + b?` is their sum, in the chat form, and finds all else equally likely."""

    context, bos_id, eos_ids = 200, 0, (1, 4)

    def scores(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        for row in rows:
            logits = np.zeros((len(row), VOCAB), np.float32)
            answer = self._answer(row)
            for place in range(len(row)):
                done = list(row[: place + 1])
                for cut in range(len(answer)):
                    if self._prompt_length(row) + cut == len(done) and done[len(done) - cut :] == answer[:cut]:
                        logits[place, answer[cut]] = 20
            yield logits

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: frozenset[int]) -> Iterator[list[int]]:
        for prompt in prompts:
            answer = self._answer(prompt)
            yield answer[: next((i for i, t in enumerate(answer) if t in stop), len(answer))][:new_tokens]

    def _prompt_length(self, row: Sequence[int]) -> int:
        ends = [i for i, token in enumerate(row) if token == 3]  # the header of the answer ends
        return ends[1] + 2 if len(ends) > 1 else len(row) + 1

    def _answer(self, row: Sequence[int]) -> list[int]:
        text = CODER.tokenizer.decode(list(row), skip_special_tokens=False)
        if "?" not in text or "user" not in text:
            return []
        left, right = text.split("\n\n")[1].split("?")[0].split(" + ")
        return [*CODER.tokenizer.encode(str(int(left) + int(right)), add_special_tokens=False).ids, 4]


def test_the_harness_gives_a_model_that_knows_full_marks(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = _with_model(_Adder(), ["sums_choice", "sums_exact"], tasks, monkeypatch)
    assert results["sums_choice"]["acc"] == 1.0
    assert results["sums_exact"]["exact_match"] == 1.0


class _Even(_Adder):
    """Finds every token equally likely."""

    def _answer(self, row: Sequence[int]) -> list[int]:
        return []


def test_the_harness_gives_an_even_model_the_perplexity_of_its_vocabulary(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = _with_model(_Even(), ["heldout_prose", "sums_exact"], tasks, monkeypatch)
    texts = [json.loads(line)["text"] for line in (tasks / "tasks" / "heldout_prose.jsonl").read_text().splitlines()]
    tokens = sum(len(CODER.tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    bits = tokens * np.log2(VOCAB) / sum(len(text.encode()) for text in texts)
    assert results["heldout_prose"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert results["sums_exact"]["exact_match"] == 0.0


def _with_model(model: _Adder, names: list[str], tasks: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    from contextlib import contextmanager

    from moec.training import evaluate as module

    @contextmanager
    def opened(*_: object) -> Iterator[tuple[object, object, str]]:
        yield model, WORDS, "float"

    monkeypatch.setattr(module, "_opened", opened)
    return evaluate("nothing", names, include=[tasks])["results"]


def test_long_rows_are_cut_at_their_beginning_and_windows_do_not_overlap() -> None:
    harness = HarnessModel(MODEL, WORDS)
    (context, answer) = random_rows(100, 4)
    ((found, _),) = harness._loglikelihood_tokens([(("", ""), context, answer)])
    (logits,) = MODEL.scores([(context + answer)[:-1][-80:]])
    assert found == pytest.approx(log_probabilities(logits[-4:], answer)[0], rel=1e-6)


def test_a_packed_checkpoint_is_computed_with_its_codes(checkpoint: Path) -> None:
    """Float and simulated differ by the rounding of activations and cache only: the weights are the same codes."""
    rows = random_rows(*[40] * 8)  # one alone has a cosine of 0.979 to 0.9997
    plain, simulated = (np.concatenate(list(checkpoint_model(checkpoint, s).scores(rows))) for s in (False, True))
    cosine = (plain * simulated).sum() / np.linalg.norm(plain) / np.linalg.norm(simulated)
    assert 0.98 < cosine < 1 - 1e-9  # INT8 rounding of random, ill-conditioned weights: two bits of eight are lost


def test_the_command(checkpoint: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(checkpoint), "--include", str(tasks), "--limit", "3", "-q"]
    assert command([*arguments, "--tasks", "sums_choice,shipped_text", "--json"]) == 0
    printed = capsys.readouterr()
    assert "Tokenizing" not in printed.err  # the harness's own bar
    result = json.loads(printed.out)
    assert result["form"] == "float"
    assert result["questions"] == {"sums_choice": 3, "shipped_text": 3}
    assert 1 < result["results"]["shipped_text"]["bits_per_byte"] < 20
    assert command([*arguments, "--tasks", "sums_exact_plain", "--simulate"]) == 0
    assert "exact_match" in capsys.readouterr().out
    assert command(["eval", str(checkpoint), "--include", str(tasks)]) == 0
    assert capsys.readouterr().out.split() == list_tasks([tasks])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        pytest.param(
            ["{c}", "--tasks", "nothing"], "no task 'nothing'", marks=pytest.mark.slow
        ),  # reads the harness's tasks
        (["{c}", "--tasks", "shipped_text", "--include", "{c}"], "holds no tasks"),
        (["{t}/missing", "--tasks", "shipped_text"], "no such folder"),
        (["{t}", "--tasks", "shipped_text"], "tokenizer"),
    ],
)
def test_faults_are_one_line(
    arguments: list[str], fault: str, checkpoint: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(c=checkpoint, t=tasks) for a in arguments]
    assert command(["eval", *filled, "-q"]) == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1


def test_two_folders_with_one_task_are_refused(checkpoint: Path, tasks: Path) -> None:
    with pytest.raises(EvaluationError, match="two folders have"):
        evaluate(checkpoint, ["shipped_text"], include=[tasks, tasks])


@pytest.mark.slow  # the same text twice, by kernels and by their simulation
def test_an_artifact_scores_as_its_simulation(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    """Kernels and simulation round alike; free runs drift by last bits (docs/verification.md)."""
    from moec.checkpoints import spec_from_config
    from moec.compiler import build
    from moec.compiler.spec.loader import parse_spec

    artifact = build.compile(parse_spec(spec_from_config(checkpoint)), checkpoint=checkpoint, out=tmp_path / "a")
    names = ["heldout_prose", "sums_exact"]
    simulated = evaluate(checkpoint, names, include=[tasks], simulate=True)
    compiled = evaluate(artifact.folder, names, include=[tasks])
    assert compiled["form"] == "artifact"
    bits = [r["results"]["heldout_prose"]["bits_per_byte"] for r in (simulated, compiled)]
    # random weights amplify: a thousandth of the about 9 bits
    assert bits[0] == pytest.approx(bits[1], rel=1e-3)
