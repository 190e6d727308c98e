"""A small model that drafts in the C interface: the text is that of the model alone, whoever drafts, and whatever
happens to the draft meanwhile."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.assistant.answer import Limits
from moec.assistant.assistant import Assistant
from moec.assistant.sampling import Sampling
from moec.compiler.artifact import Artifact
from tests.assistant.conversations import template
from tests.runtime import app
from tests.runtime.carried_model import carried_program
from tests.runtime.test_app_tools import opened_with
from tests.tiny import TinyModels, tiny_text

PROMPT = "Once upon a time there was a king"


@pytest.fixture(scope="module")
def folder(tiny: TinyModels) -> Path:
    return tiny(tiny_text(context=256)) / "artifact"


@pytest.fixture(scope="module")
def small_folder(tiny: TinyModels) -> Path:
    return tiny(tiny_text(layers=1, context=128)) / "artifact"


@pytest.fixture(scope="module")
def small(small_folder: Path) -> Iterator[int]:
    artifact = app.open_artifact(small_folder)
    yield artifact
    app.call("close", artifact)


def answer(opened: int, session: int, **values: Any) -> tuple[str, app.Stats, list[float]]:
    given = app.options(opened, max_new_tokens=100, top_scores=3, **values)
    generation = app.begin(session, app.tokenize(opened, PROMPT), given)
    text = "".join(app.pieces(generation))
    found = text, app.stats(generation), [score.log_probability for score in app.scores(generation)]
    app.call("close", generation)
    return found


@pytest.mark.parametrize("values", [{}, {"temperature": 0.8, "seed": 3}, {"on_full": 1, "keep_first": 4}], ids=str)
def test_the_text_is_the_models(opened: int, session: int, small: int, values: dict[str, Any]) -> None:
    """Of another model, of the model itself, whose drafts are right where it is greedy, of a session or an artifact."""
    wanted, _, scores = answer(opened, session, speculate=0, **values)
    drafts, itself = app.call("session", small), app.call("session", opened)
    for draft in (drafts, small, itself, opened):
        text, stats, found = answer(opened, session, draft=draft, **values)
        assert (text, found) == (wanted, scores)
        assert stats.drafted_tokens > 0
        if draft in (itself, opened) and not values.get("temperature"):
            assert stats.drafted_tokens - stats.accepted_tokens < 16  # but for what the last draft has beyond the end
    assert 0 < len(app.many("tokens", drafts)) <= 128
    for id_ in (drafts, itself):
        app.call("close", id_)


def test_it_is_pythons(folder: Path, small_folder: Path, opened: int, session: int, small: int) -> None:
    python = Assistant.of(Artifact.open(folder))
    with moec.load(folder) as large, moec.load(small_folder) as drafting:
        limits = Limits(Sampling(temperature=0.9, seed=7), 80, draft=drafting)
        wanted = "".join(python.answer(large, python.text_prompt(PROMPT), limits))
    given = app.options(opened, max_new_tokens=80, temperature=0.9, seed=7, draft=small)
    generation = app.begin(session, app.tokenize(opened, PROMPT), given)
    assert "".join(app.pieces(generation)) == wanted
    app.call("close", generation)


def test_models_that_draft_for_each_other(opened: int) -> None:
    """Neither waits for the other for ever."""
    sessions = [app.call("session", opened) for _ in range(2)]
    wanted = [answer(opened, sessions[0], seed=seed, temperature=1.0)[0] for seed in range(2)]
    found: dict[int, str] = {}

    def run(index: int) -> None:
        # the other session's generation may be told that its session was changed: it is the draft of this one
        try:
            for _ in range(5):
                given = {"seed": index, "temperature": 1.0, "draft": sessions[1 - index]}
                found[index] = answer(opened, sessions[index], **given)[0]
        except app.AppError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert all(found[index] == wanted[index] or "was changed" in found[index] for index in range(2))
    for id_ in sessions:
        app.call("close", id_)


def test_a_draft_that_is_closed_or_changed_meanwhile(opened: int, session: int, small: int) -> None:
    wanted = answer(opened, session, speculate=0)[0]
    drafts = app.call("session", small)
    given = app.options(opened, max_new_tokens=100, draft=drafts)
    generation = app.begin(session, app.tokenize(opened, PROMPT), given)
    said: list[str] = []

    def each(piece: str) -> bool:
        said.append(piece)
        if len(said) == 8:
            app.call("rewind", drafts, 1)
        if len(said) == 12:
            app.call("close", drafts)
        return True

    app.pieces(generation, each)
    assert "".join(said) == wanted
    app.call("close", generation)


def test_what_cannot_draft_is_told(folder: Path, opened: int, session: int, small: int, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "carried")
    (tmp_path / "carried" / "model.pte").write_bytes(carried_program(4096, 256, known=4096))
    other = opened_with(folder, template("hermes"), tmp_path / "other", "hermes")
    carried = app.open_artifact(tmp_path / "carried")
    generation = app.begin(session, [5], None)
    faults: list[tuple[dict[str, Any], str]] = [
        ({"draft": 1 << 40}, "no open artifact or session that drafts"),
        ({"draft": -1}, "no open artifact or session that drafts"),
        ({"draft": generation}, "no open artifact or session that drafts"),
        ({"draft": session}, "draft: the session itself"),
        ({"draft": small, "speculate": 0}, "draft: drafts need speculate"),
        ({"draft": carried}, "draft: its states do not go back"),
        ({"draft": other}, "draft: its tokens are others"),
    ]
    for values, words_of in faults:
        with pytest.raises(app.AppError, match=words_of):
            app.begin(session, [5], app.options(opened, **values))
    for id_ in (generation, carried, other):
        app.call("close", id_)
