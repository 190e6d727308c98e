"""Tasks of the harness on files, a checkpoint as the baseline of an artifact, and tasks that would run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.errors import TrustError
from tests.conftest import Moec, refused

pytest.importorskip("lm_eval", reason="needs the eval extra: pip install 'moec[eval]'")
pytest.importorskip("transformers", reason="the checkpoint is one of transformers: pip install 'moec[transformers]'")


def arc(folder: Path, count: int = 8) -> Path:
    """Questions in the form of ai2_arc."""
    folder.mkdir()
    rows = [
        {
            "id": str(i),
            "question": f"Which letter is number {i}?",
            "choices": {"text": ["alpha", "beta", "gamma", "delta"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(count)
    ]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Qwen3 checkpoint with a tokenizer, and its float artifact."""
    import torch
    import transformers

    from moec.checkpoints.tokenizer import train_tokenizer
    from moec.compiler import build

    folder = tmp_path_factory.mktemp("eval")
    config = transformers.Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=400, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "checkpoint")
    text = train_tokenizer(400, bos_id=None, eos_ids=(2,))
    assert text is not None
    (folder / "checkpoint" / "tokenizer.json").write_text(text)
    spec: dict[str, Any] = {"name": "tiny", "quantization": "none", "targets": {"xnnpack": {"max_tokens": 64}}}
    spec["model"] = {"transformers": str(folder / "checkpoint")}
    return folder / "checkpoint", build.compile(spec, out=folder / "artifact").folder


def test_a_task_of_the_harness_from_files_against_a_baseline(
    model: tuple[Path, Path], tmp_path: Path, moec: Moec
) -> None:
    checkpoint, artifact = model
    data = arc(tmp_path / "arc")
    given = ["--tasks", "arc_easy", "--data", f"arc_easy={data}", "-q"]
    status, out, err = moec("eval", artifact, "--baseline", checkpoint, *given, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["form"], found["baseline"]["form"]) == ("artifact", "float")
    assert found["questions"] == {"arc_easy": 8}
    # a float artifact computes what transformers does: the same choices
    assert found["results"]["arc_easy"]["acc"] == found["baseline"]["results"]["arc_easy"]["acc"]


def test_what_is_missing_is_one_line(model: tuple[Path, Path], tmp_path: Path, moec: Moec) -> None:
    _, artifact = model
    refused(moec("eval", artifact, "--tasks", "arc_easy", "-q"), "arc_easy", "--data")
    refused(moec("eval", artifact, "--tasks", "no_such_task", "-q"), "no task 'no_such_task'")
    refused(
        moec("eval", artifact, "--tasks", "arc_easy", "--data", f"arc_easy={tmp_path / 'x'}", "-q"), "no such folder"
    )
    refused(moec("eval", artifact, "--tasks", "shipped_text", "--data", "arc_easy", "-q"), "NAME=FOLDER")
    refused(moec("eval", artifact, "--tasks", "shipped_text", "--data", "arc_easy=.", "-q"), "not among the tasks")


TASK = """
task: hostile
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{target}"
metric_list: [{{metric: {metric}}}]
{more}
"""
CODE = {
    "function": TASK.format(target="{{text}}", metric="bits_per_byte", more="process_docs: !function planted.run"),
    "python tag": TASK.format(target="x", metric="bits_per_byte", more="x: !!python/object/apply:os.system ['true']"),
    "metric": TASK.format(target="{{text}}", metric="./planted.py", more=""),
    "include": TASK.format(target="{{text}}", metric="bits_per_byte", more="include: ../elsewhere.txt"),
    "class": TASK.format(target="{{text}}", metric="bits_per_byte", more="class: planted.Task"),
}


def hostile(folder: Path, text: str) -> tuple[Path, Path]:
    folder.mkdir()
    mark = folder / "it-ran"
    (folder / "planted.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef run(d): return d\n")
    (folder / "rows.jsonl").write_text('{"text": "abc"}\n{"text": "def"}\n')
    (folder / "hostile.yaml").write_text(text)
    return folder, mark


@pytest.mark.parametrize("kind", CODE)
def test_a_corpus_runs_no_code(kind: str, model: tuple[Path, Path], tmp_path: Path, moec: Moec) -> None:
    folder, mark = hostile(tmp_path / "tasks", CODE[kind])
    refused(moec("eval", model[1], "--include", folder, "--tasks", "hostile", "-q"), "--trust", "hostile.yaml")
    assert not mark.exists()


def test_a_trusted_function_runs(model: tuple[Path, Path], tmp_path: Path, moec: Moec) -> None:
    folder, mark = hostile(tmp_path / "tasks", CODE["function"])
    status, _, err = moec("eval", model[1], "--include", folder, "--tasks", "hostile", "-q", "--trust")
    assert status == 0, err
    assert mark.exists()


def test_a_template_cannot_leave_its_sandbox(model: tuple[Path, Path], tmp_path: Path, moec: Moec) -> None:
    mark = tmp_path / "it-ran"
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    text = TASK.format(target=escape, metric="bits_per_byte", more="")
    folder, _ = hostile(tmp_path / "tasks", text)
    refused(moec("eval", model[1], "--include", folder, "--tasks", "hostile", "-q"), "cannot be used", "unsafe")
    assert not mark.exists()


def test_trust_error_is_the_users(tmp_path: Path) -> None:
    from moec.training.evaluate_tasks import EvaluationError, check_tasks

    folder, _ = hostile(tmp_path / "tasks", CODE["function"])
    with pytest.raises(TrustError, match=r"this task runs code: !function planted\.run"):
        check_tasks(folder)
    (folder / "hostile.yaml").write_text("a: [")
    with pytest.raises(EvaluationError, match="not YAML"):
        check_tasks(folder)
    (folder / "hostile.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(EvaluationError, match="not YAML"):
        check_tasks(folder)
