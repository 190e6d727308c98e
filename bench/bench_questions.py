"""Twenty questions asked of the float model and of an artifact of it, answered greedily, side by side.

    python bench/bench_questions.py ARTIFACT [ARTIFACT ..] [--new-tokens 40] [--json FILE]

The model is that of `make bench-quality` (SmolLM2-135M-Instruct off its grid), run by transformers in float32; the chat
template and the ids of a question are the artifact's, and both sides read the same. For every question the table says
whether the answers are the same text, how many tokens they share before they part, the share of words in common (F1 of
the two bags), whether each has the fact that `questions.yaml` names, and how many nats a token the float model's answer
costs the artifact more than the float model: 0.1 says that the artifact gives that answer's tokens e^-0.1 of their
probability, on average. The fact is a coarse measure, and the only one that does not count a rewording as an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml
from real_model import NotReached, transformers_folder

from moec.assistant.assistant import Assistant
from moec.assistant.load import load
from moec.cli.output import table
from moec.compiler.artifact import Artifact
from moec.compiler.errors import UserError

QUESTIONS = Path(__file__).with_name("questions.yaml")


@dataclass(frozen=True)
class Answer:
    """ids without what ends them; nats: what the float model's answer costs a token."""

    ids: list[int]
    text: str
    has_fact: bool
    nats: float


@dataclass(frozen=True)
class Asked:
    """One question, both answers, and what they have in common. together: tokens before they part."""

    question: str
    of_float: Answer
    of_artifact: Answer
    together: int
    words: float

    @property
    def same(self) -> bool:
        return self.of_float.text == self.of_artifact.text

    @property
    def excess(self) -> float:
        """Nats a token that the float model's answer costs the artifact more than the float model."""
        return self.of_artifact.nats - self.of_float.nats


class FloatSide:
    """transformers' model in float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], new_tokens: int, ends: frozenset[int]) -> list[int]:
        found: list[int] = []
        step, past = torch.tensor([list(prompt)]), None
        while len(found) < new_tokens:
            out = self._model(input_ids=step, past_key_values=past, use_cache=True)
            token, past = int(out.logits[0, -1].argmax()), out.past_key_values
            if token in ends:
                break
            found.append(token)
            step = torch.tensor([[token]])
        return found

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[T, V]"""
        return np.asarray(self._model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0])


class ArtifactSide:
    def __init__(self, artifact: Artifact) -> None:
        self._session = load(artifact)

    def greedy(self, prompt: Sequence[int], new_tokens: int, ends: frozenset[int]) -> list[int]:
        self._session.reset()
        found: list[int] = []
        row = self._session.prefill(list(prompt))
        while len(found) < new_tokens:
            token = int(np.asarray(row).reshape(-1).argmax())
            if token in ends:
                break
            found.append(token)
            row = self._session.decode(token)
        return found

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[T, V]"""
        self._session.reset()
        return np.asarray(self._session.prefill(list(ids), logits="all"))


def nats(logits_TV: np.ndarray, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Mean negative log-likelihood of the tokens of `answer` after `prompt`; 0 for no tokens."""
    if not answer:
        return 0.0
    rows = logits_TV[len(prompt) - 1 : -1].astype(np.float64)
    top = rows.max(-1, keepdims=True)
    log_sums = np.log(np.exp(rows - top).sum(-1)) + top[:, 0]
    return float((log_sums - rows[np.arange(len(answer)), list(answer)]).mean())


def in_common(one: str, other: str) -> float:
    """F1 of the words of two texts, 1 for two empty ones."""
    a, b = (Counter("".join(c if c.isalnum() else " " for c in text.lower()).split()) for text in (one, other))
    shared, total = (a & b).total(), a.total() + b.total()
    return 2 * shared / total if total else 1.0


def has_fact(text: str, facts: Sequence[str]) -> bool:
    """Whether one of `facts` stands in `text` as words of its own: no 7 in 720, no 0 in 18.01."""
    return any(re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text, re.IGNORECASE) for fact in facts)


def ask(floats: FloatSide, artifact: Artifact, new_tokens: int) -> list[Asked]:
    side, speaker = ArtifactSide(artifact), Assistant.of(artifact)
    ends = frozenset(speaker.eos_ids)
    found = []
    for entry in yaml.safe_load(QUESTIONS.read_text("utf-8")):
        prompt = speaker.chat_prompt([{"role": "user", "content": entry["ask"]}]).ids
        ids = [s.greedy(prompt, new_tokens, ends) for s in (floats, side)]
        costs = [nats(s.logits([*prompt, *ids[0]]), prompt, ids[0]) for s in (floats, side)]
        texts = [speaker.tokenizer.decode(answer) for answer in ids]
        has = [has_fact(text, entry["fact"]) for text in texts]
        sides = [Answer(*values) for values in zip(ids, texts, has, costs, strict=True)]
        together = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        found.append(Asked(entry["ask"], sides[0], sides[1], together, in_common(*texts)))
    return found


def summary(asked: Sequence[Asked]) -> dict[str, Any]:
    """The figures of one artifact."""
    return {
        "questions": len(asked),
        "same_text": sum(a.same for a in asked),
        "fact_float": sum(a.of_float.has_fact for a in asked),
        "fact_artifact": sum(a.of_artifact.has_fact for a in asked),
        "fact_both": sum(a.of_float.has_fact and a.of_artifact.has_fact for a in asked),
        "words_in_common": round(fmean(a.words for a in asked), 3),
        "excess_nats_per_token": round(fmean(a.excess for a in asked), 4),
    }


def shown(asked: Sequence[Asked], name: str) -> None:
    rows = []
    for a in asked:
        facts = ", ".join("yes" if side.has_fact else "no" for side in (a.of_float, a.of_artifact))
        together = f"{a.together} of {len(a.of_float.ids)}"
        rows.append((a.question, "yes" if a.same else "", together, f"{a.words:.2f}", facts, f"{a.excess:.3f}"))
    heads = ["question", "same", "together", "words", "fact: float, artifact", "nats"]
    table(f"\n{name}", heads, rows, right=(2, 3, 5))
    for a in asked:
        print(f"\n{a.question}\n  float     {' '.join(a.of_float.text.split())}")
        if not a.same:
            print(f"  artifact  {' '.join(a.of_artifact.text.split())}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_questions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    try:
        floats = FloatSide(transformers_folder(jitter=True))
        results = {str(place): ask(floats, Artifact.open(place), options.new_tokens) for place in options.artifacts}
    except (UserError, NotReached) as error:
        print(error, file=sys.stderr)
        return 2
    for name, asked in results.items():
        shown(asked, name)
    figures = {name: summary(asked) for name, asked in results.items()}
    for name, found in figures.items():
        print(f"\n{name}: {json.dumps(found)}")
    if options.json is not None:
        document = {n: {**figures[n], "answers": [asdict(a) for a in asked]} for n, asked in results.items()}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
