"""Answers of the C interface, and prefixes that are kept. New processes import it, so it imports little itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.runtime import app


def answer(
    artifact: int, prompt: Sequence[int], session: int | None = None, **values: Any
) -> tuple[str, int, list[float]]:
    """A text, how many tokens of the prompt were there, and log-probabilities of all that was likely."""
    own = app.call("session", artifact) if session is None else session
    values = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5, "top_scores": 20, **values}
    generation = app.begin(own, prompt, app.options(artifact, **values))
    text = "".join(app.pieces(generation))
    found = text, app.stats(generation).reused_tokens, [s.log_probability for s in app.scores(generation)]
    for id_ in (generation, *([own] if session is None else [])):
        app.call("close", id_)
    return found


def keep(artifact: int, ids: Sequence[int], name: bytes | None = None) -> int:
    """Compute and keep ids; how many of them were there."""
    session = app.call("session", artifact)
    generation = app.begin(session, ids, app.options(artifact, max_new_tokens=0))
    assert app.pieces(generation) == []
    reused = app.stats(generation).reused_tokens
    assert app.many("tokens", session) == list(ids)
    app.call("keep_prefix", session, name)
    for id_ in (generation, session):
        app.call("close", id_)
    return reused
