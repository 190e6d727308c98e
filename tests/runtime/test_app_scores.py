"""Log-probabilities in the C interface against Python's: tokens, values, and which text a token brought."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.assistant.answer import Answer
from moec.assistant.sampling import MAX_TOP, TokenScore
from tests.runtime import app
from tests.tiny import TinyModels, tiny_text

PROMPT = "Once upon a time there was a king, and there was a king, and there was"
# of 4096 exponentials, whose sum two libraries round in another order: at most 4096 halves of 2^-52 relative to it, and
# a few last places of numbers below 64
CLOSE = 4096 * 2.0**-53 + 8 * 2.0**-47


@pytest.fixture(scope="module")
def folder(tiny: TinyModels) -> Path:
    return tiny(tiny_text(context=256)) / "artifact"


@pytest.fixture(scope="module")
def biases(opened: int) -> dict[int, float]:
    """Only tokens of printable ASCII: each is text at once, so that attribution depends on the tokens alone."""
    texts = [app.detokenize(opened, [id_], app.SPECIAL) for id_ in range(4096)]
    return {id_: -float("inf") for id_, text in enumerate(texts) if not (text.isascii() and text.isprintable())}


def told(
    opened: int, session: int, **values: Any
) -> tuple[list[tuple[int, int, float, int]], str, app.Stats]:  # (token, rank, log-probability, bytes)
    generation = app.begin(session, app.tokenize(opened, PROMPT), app.options(opened, **values))
    text = "".join(app.pieces(generation))
    found = [(s.token, s.rank, s.log_probability, s.text_bytes) for s in app.scores(generation)]
    stats = app.stats(generation)
    app.call("close", generation)
    return found, text, stats


def of_python(answer: Answer) -> tuple[list[TokenScore], list[int]]:
    """Scores, and the bytes of the text that were certain with each token."""
    text, ends, scores = "", [], []
    for step in answer.steps():
        text += "".join(piece.text for piece in step.pieces)
        scores += step.scores
        ends += [len(text.encode())] * len(step.scores)
    return scores, ends


def compare(found: Sequence[tuple[int, int, float, int]], scores: Sequence[TokenScore], ends: Sequence[int]) -> None:
    each = len(found) // len(scores)
    assert len(found) == each * len(scores)
    for index, (score, end) in enumerate(zip(scores, ends, strict=True)):
        rows = found[index * each : (index + 1) * each]
        wanted = [(score.token, score.log_probability), *score.top]
        assert [(row[0], row[1]) for row in rows] == [(token, rank) for rank, (token, _) in enumerate(wanted)]
        assert [row[2] for row in rows] == pytest.approx([value for _, value in wanted], rel=0, abs=CLOSE)
        assert [row[3] for row in rows] == [end, *[0] * (each - 1)]


@pytest.mark.parametrize(
    ("top", "values"),
    [
        (0, {}),
        (5, {"temperature": 1.0, "seed": 1}),
        (MAX_TOP, {"temperature": 0.7, "top_k": 20, "repeat_penalty": 1.3, "seed": 2}),
    ],
)
def test_they_are_pythons(
    folder: Path, opened: int, session: int, biases: dict[int, float], top: int, values: dict[str, Any]
) -> None:
    with moec.load(folder) as python:
        answer = python.generate(PROMPT, max_new_tokens=60, logit_bias=biases, top_scores=top, **values)
        scores, ends = of_python(answer)
        given = list(biases.items())
        found, text, _ = told(opened, session, max_new_tokens=60, top_scores=top, biases=given, **values)
        assert text == answer.text
        compare(found, scores, ends)
        # text that may be the beginning of a stop string is certain later, and belongs to a later token
        stop = [text[40:44], text[10:12] + "never said"]
        answer = python.generate(PROMPT, logit_bias=biases, top_scores=top, stop=stop, **values)
        scores, ends = of_python(answer)
        found, text, _ = told(opened, session, stops=stop, top_scores=top, biases=given, **values)
        assert text == answer.text
        compare(found, scores, ends)


def test_a_bias_changes_what_is_taken_and_no_score(folder: Path, opened: int, session: int) -> None:
    found, _, _ = told(opened, session, max_new_tokens=3, top_scores=2, biases=[(77, 1e6)])
    assert [row[0] for row in found[::3]] == [77] * 3
    assert all(rows[0][2] < rows[2][2] <= rows[1][2] < 0 for rows in (found[:3], found[3:6], found[6:]))
    with moec.load(folder) as python:
        compare(found, *of_python(python.generate(PROMPT, max_new_tokens=3, top_scores=2, logit_bias={77: 1e6})))


def test_drafts_change_no_bit(opened: int, session: int) -> None:
    accepted = 0
    for values in ({}, {"temperature": 0.1, "seed": 3}):
        with_drafts, said, stats = told(opened, session, max_new_tokens=150, top_scores=4, **values)
        without, again, none = told(opened, session, max_new_tokens=150, top_scores=4, speculate=0, **values)
        assert (with_drafts, said) == (without, again)
        assert len(with_drafts) == 5 * stats.new_tokens
        assert none.drafted_tokens == 0
        accepted += stats.accepted_tokens
    assert accepted > 20


def test_they_are_told_while_it_runs(opened: int, session: int) -> None:
    prompt = app.tokenize(opened, PROMPT)
    assert app.options(opened).top_scores == -1
    generation = app.begin(session, prompt, app.options(opened, max_new_tokens=12, top_scores=1, temperature=1.0))
    assert app.scores(generation) == []
    bytes_, known = 0, 0
    while app.call("next", generation, None, ctypes.byref(size := app.I64())):
        new = app.scores(generation, known)
        assert len(new) % 2 == 0
        bytes_ += size.value
        known += len(new) // 2
        assert known == app.stats(generation).new_tokens
        if known < 12:  # behind the last one comes what was held back
            assert new[-2].text_bytes == bytes_
    assert len(app.scores(generation)) == 24
    for first, words in ((-1, "token -1 of an answer of 12"), (13, "token 13")):
        with pytest.raises(app.AppError, match=words):
            app.call("scores", generation, first, None, 0)
    with pytest.raises(app.AppError, match="no buffer"):
        app.call("scores", generation, 0, None, 3)
    app.call("close", generation)
    generation = app.begin(session, prompt, None)
    with pytest.raises(app.AppError, match="without top_scores"):
        app.call("scores", generation, 0, None, 0)
    app.call("close", generation)
    for top in (-2, 101):
        with pytest.raises(app.AppError, match="top_scores: -1"):
            app.begin(session, prompt, app.options(opened, top_scores=top))
