"""Evaluation tasks of a corpus, for lm-evaluation-harness: YAML and JSON lines made of held-out documents only.

    tasks/heldout_<domain>.yaml         perplexity of held-out text: per word, per byte, bits per byte
    tasks/<domain>_choice.yaml          which of four answers belongs to a prompt; the wrong ones answer other prompts
                                        of the same family (chance: 0.25)
    tasks/<domain>_exact.yaml           the greedy answer, compared letter by letter
    tasks/<domain>_{choice,exact}_plain.yaml    the same questions as running text, `PROMPT` and a line end, which is
                                        the form in which a base model has met questions

Paths inside are relative to `tasks/`: run the harness from there, or use `moec eval`, which does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moec.training.data.document import Document
from moec.training.data.shards import TASKS
from moec.training.tokenizer import Coder

FOLDER = TASKS
_TEXTS, _TEXT_LENGTH = 40, 1500  # documents of a perplexity task, characters of each
_QUESTIONS = 240
_CHOICES, _CHOICE_LENGTH = 4, 200
_EXACT_LENGTH = 48  # characters: an answer that can be right by more than luck, and takes few tokens


def write_tasks(folder: Path, coder: Coder, heldout: Mapping[str, Callable[[], Iterator[Document]]]) -> None:
    """Write the tasks of a corpus into `folder/tasks`. The same documents give the same files."""
    out = folder / FOLDER
    out.mkdir()
    for domain, documents in heldout.items():
        listed = list(documents())
        random.Random(0).shuffle(listed)
        if listed and listed[0].is_example:
            listed = [document for document in listed if not document.turns]  # a question is one prompt
            end = coder.end_of_response()
            for suffix, form, until in (("", coder.prompt_text, end), ("_plain", "{}\n".format, "\n")):
                _write(out, f"{domain}_choice{suffix}", _choices(listed, form), _CHOICE_KEYS)
                keys = {**_EXACT_KEYS, "generation_kwargs": {**_EXACT_KEYS["generation_kwargs"], "until": [until]}}
                _write(out, f"{domain}_exact{suffix}", _exact(listed, form), keys)
        else:
            write_text_task(out, f"heldout_{domain}", [document.text for document in listed[:_TEXTS]])


def write_text_task(out: Path, name: str, texts: Sequence[str]) -> None:
    """A perplexity task of the beginnings of `texts`."""
    _write(out, name, [{"text": text[:_TEXT_LENGTH]} for text in texts], _TEXT_KEYS)


_TEXT_KEYS: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}
_CHOICE_KEYS: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "target_delimiter": "",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
_EXACT_KEYS: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "response",
    "target_delimiter": "",
    "generation_kwargs": {"do_sample": False, "max_gen_toks": 48},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def _write(out: Path, name: str, rows: list[dict[str, Any]], keys: Mapping[str, Any]) -> None:
    if not rows:
        return
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / f"{name}.jsonl").write_text(lines, "utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        **keys,
        "metadata": {"version": 1.0},
    }
    (out / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False, allow_unicode=True), "utf-8")


def _choices(documents: list[Document], form: Callable[[str], str]) -> list[dict[str, Any]]:
    chance = random.Random(1)
    rows = []
    for _, members in _families([d for d in documents if len(d.response) <= _CHOICE_LENGTH]).items():
        answers = sorted({document.response for document in members})
        for document in members:
            others = [answer for answer in answers if answer != document.response]
            if len(others) < _CHOICES - 1:
                break
            choices = [document.response, *chance.sample(others, _CHOICES - 1)]
            chance.shuffle(choices)
            gold = choices.index(document.response)
            prompt = form(document.prompt)
            rows.append({"family": document.family, "prompt": prompt, "choices": choices, "gold": gold})
    return _in_turn(rows)[:_QUESTIONS]


def _exact(documents: list[Document], form: Callable[[str], str]) -> list[dict[str, Any]]:
    rows = [
        {"family": d.family, "prompt": form(d.prompt), "response": d.response}
        for d in documents
        if len(d.response) <= _EXACT_LENGTH
    ]
    return _in_turn(rows)[:_QUESTIONS]


def _families(documents: list[Document]) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = {}
    for document in documents:
        found.setdefault(document.family, []).append(document)
    return dict(sorted(found.items()))


def _in_turn(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of every family, then the next of each: any first part is balanced."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    longest = max((len(members) for members in families.values()), default=0)
    return [members[i] for i in range(longest) for _, members in sorted(families.items()) if i < len(members)]
