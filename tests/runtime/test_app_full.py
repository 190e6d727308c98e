"""A context that is full: dropping the oldest tokens against the rule spelled out on one of Python's sessions, and
conversations without their oldest questions against `assistant/conversation.py`."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.assistant.assistant import Prompt
from moec.assistant.conversation import _without_oldest, fitting
from moec.assistant.sampling import Sampler, Sampling
from moec.compiler.target import Session
from moec.targets.xnnpack.session import CpuSession
from tests.assistant.conversations import template
from tests.runtime import app
from tests.runtime.carried_model import carried_program
from tests.runtime.test_app_tools import opened_with, tool
from tests.tiny import TinyModels, tiny_text

CONTEXT, TALK = 64, 1024
PROMPT = "Once upon a time there was a king, and there was a king, and there was"


@pytest.fixture(scope="module")
def folder(tiny: TinyModels) -> Path:
    return tiny(tiny_text(context=CONTEXT)) / "artifact"


@pytest.fixture(scope="module")
def python(folder: Path) -> Iterator[Any]:
    with moec.load(folder) as session:
        yield session


def by_the_rule(
    session: Session, prompt: Sequence[int], count: int, sampling: Sampling, keep_first: int, stop: set[int]
) -> tuple[list[int], list[int], int]:
    """Tokens of an answer, those that the session holds at its end with the last token, and how many were dropped."""
    drop, dropped = -(-(session.context - keep_first) // 2), 0
    tokens, sampler, said = list(prompt), Sampler(sampling, None, prompt), []

    def computed() -> np.ndarray:
        session.reset()
        for begin in range(0, len(tokens), session.max_tokens):
            logits = session.prefill(tokens[begin : begin + session.max_tokens], "last")
        return np.asarray(logits).reshape(-1)

    while len(tokens) > session.context:
        del tokens[keep_first : keep_first + drop]
        dropped += drop
    logits = computed()
    while len(said) < count:
        token = sampler(logits)
        if token in stop:
            break
        said.append(token)
        if len(said) == count:
            break
        if len(tokens) == session.context:
            del tokens[keep_first : keep_first + drop]
            dropped += drop
            computed()
        tokens.append(token)
        logits = np.asarray(session.decode(token)).reshape(-1)
    return said, tokens, dropped


def dropping(opened: int, **values: Any) -> app.Options:
    return app.options(opened, on_full=1, **values)


@pytest.mark.parametrize(
    ("keep_first", "length", "values"),
    [
        (0, 18, {}),
        (7, 18, {"temperature": 1.0, "seed": 1}),
        (CONTEXT - 1, 18, {"temperature": 1.0, "seed": 2}),  # one token is dropped each time
        (10, CONTEXT, {"temperature": 1.0, "seed": 3, "repeat_penalty": 1.2, "frequency_penalty": 0.2}),
        (11, CONTEXT + 1, {"temperature": 1.0, "seed": 4}),
        (3, 500, {"repeat_penalty": 1.5}),
    ],
)
def test_the_oldest_are_dropped(
    opened: int, session: int, python: Any, keep_first: int, length: int, values: dict[str, Any]
) -> None:
    drawn = random.Random(length)
    prompt = [drawn.randrange(300, 4000) for _ in range(length)]
    stop = set(app.many("stop_tokens", opened))
    said, held, dropped = by_the_rule(python, prompt, 200, Sampling(**values), keep_first, stop)
    assert dropped > 0
    for speculate in (1, 0):
        given = dropping(opened, keep_first=keep_first, max_new_tokens=200, speculate=speculate, top_scores=0, **values)
        generation = app.begin(session, prompt, given)
        text = "".join(app.pieces(generation))
        stats = app.stats(generation)
        assert [score.token for score in app.scores(generation)] == said
        assert text == app.detokenize(opened, said)
        assert (stats.new_tokens, stats.dropped_tokens, stats.prompt_tokens) == (len(said), dropped, length)
        assert app.many("tokens", session) == held
        app.call("close", generation)


def test_drafts_are_checked_behind_a_drop(opened: int, session: int, python: Any) -> None:
    """Of a text that repeats itself; the draft of a text whose beginning is gone is not one of its positions."""
    prompt, accepted = app.tokenize(opened, PROMPT), 0
    for values in ({}, {"repeat_penalty": 1.02}, {"temperature": 0.1, "seed": 3}):
        said, _, dropped = by_the_rule(python, prompt, 400, Sampling(**values), 5, set())
        given = dropping(opened, keep_first=5, max_new_tokens=400, top_scores=0, **values)
        generation = app.begin(session, prompt, given)
        app.pieces(generation)
        assert [score.token for score in app.scores(generation)] == said
        assert app.stats(generation).dropped_tokens == dropped > 300
        accepted += app.stats(generation).accepted_tokens
        app.call("close", generation)
    assert accepted > 50


def test_states_that_do_not_go_back_are_computed_anew(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.pte").write_bytes(carried_program(4096, CONTEXT, known=4096))
    artifact = app.open_artifact(tmp_path / "copy")
    info = app.Info(size=ctypes.sizeof(app.Info))
    app.call("describe", artifact, ctypes.byref(info))
    assert info.rewinds == 0
    session = app.call("session", artifact)
    with CpuSession(tmp_path / "copy" / "model.pte", threads=1) as python:
        for length, seed in ((9, 1), (150, 2)):
            prompt = [300 + i % 77 for i in range(length)]
            said, held, dropped = by_the_rule(python, prompt, 150, Sampling(temperature=1.0, seed=seed), 4, {2})
            given = dropping(artifact, keep_first=4, max_new_tokens=150, temperature=1.0, seed=seed, top_scores=0)
            generation = app.begin(session, prompt, given)
            app.pieces(generation)
            assert [score.token for score in app.scores(generation)] == said
            assert app.stats(generation).dropped_tokens == dropped > 50
            assert app.many("tokens", session) == held
            app.call("close", generation)
    for id_ in (session, artifact):
        app.call("close", id_)


@pytest.mark.parametrize("speculate", [1, 0])
def test_the_text_is_pythons(opened: int, session: int, python: Any, speculate: int) -> None:
    drawn = random.Random(3)
    for keep_first, length in ((0, 12), (9, CONTEXT), (9, 300), (CONTEXT - 2, 20)):
        prompt, policy = [drawn.randrange(300, 4000) for _ in range(length)], {"keep_first": keep_first}
        for values in ({}, {"temperature": 1.0, "seed": length, "repeat_penalty": 1.1}):
            python.reset()
            answer = python.generate(prompt, max_new_tokens=150, context_full="drop_oldest", **policy, **values)
            wanted = "".join(answer)
            given = dropping(opened, max_new_tokens=150, speculate=speculate, **policy, **values)
            generation = app.begin(session, prompt, given)
            assert "".join(app.pieces(generation)) == wanted
            assert app.stats(generation).dropped_tokens == answer.stats.dropped_tokens > 0
            app.call("close", generation)


def test_stops_and_constraints_go_on(opened: int, session: int) -> None:
    prompt = app.tokenize(opened, PROMPT)
    values = {"keep_first": 2, "temperature": 1.0, "seed": 5}
    generation = app.begin(session, prompt, dropping(opened, max_new_tokens=150, **values))
    whole = "".join(app.pieces(generation))
    app.call("close", generation)
    at = next(
        i for i in range(200, len(whole)) if "\ufffd" not in whole[i : i + 3] and whole.find(whole[i : i + 3]) == i
    )
    generation = app.begin(session, prompt, dropping(opened, stops=[whole[at : at + 3]], **values))
    assert "".join(app.pieces(generation)) == whole[:at]
    assert app.STOPPED[app.stats(generation).stopped] == "stop string"
    assert app.stats(generation).dropped_tokens > 0
    app.call("close", generation)

    taken: list[int] = []

    def allow(_: Any, mask: int, words: int) -> int:  # 500, 501, ... one after the other
        bits = (ctypes.c_uint32 * words).from_address(mask)
        token = 500 + len(taken)
        bits[token // 32] |= 1 << token % 32
        return 0

    def take(_: Any, token: int) -> int:
        taken.append(token)
        return int(len(taken) == 300)

    made = app.Constraint(ctypes.sizeof(app.Constraint), 0, None, app.ALLOWED(allow), app.TAKE(take), app.REASON())
    given = dropping(opened, **values)
    given.constraint = ctypes.cast(ctypes.pointer(made), ctypes.c_void_p)
    generation = app.begin(session, prompt, given)
    app.pieces(generation)
    assert taken == list(range(500, 800))
    assert app.STOPPED[app.stats(generation).stopped] == "complete"
    held = app.many("tokens", session)
    assert held[:2] == prompt[:2]
    assert held[2:] == list(range(held[2], 799))
    app.call("close", generation)


def test_it_is_cancelled_without_an_end_of_its_own(opened: int, session: int) -> None:
    said: list[str] = []
    generation = app.begin(session, app.tokenize(opened, PROMPT), dropping(opened, temperature=1.0, biases=[(2, -1e6)]))
    app.pieces(generation, lambda piece: said.append(piece) or len(said) < 150)  # type: ignore[func-returns-value]
    assert app.STOPPED[app.stats(generation).stopped] in ("cancelled", "stop token")
    app.call("close", generation)


def test_what_cannot_be_dropped_is_told(opened: int, session: int) -> None:
    for values, words in (
        ({"on_full": 2}, "on_full: MOEC_APP_STOP or"),
        ({"on_full": -1}, "on_full"),
        ({"keep_first": -1}, "keep_first: 0 or above"),
        ({"on_full": 1, "keep_first": CONTEXT}, f"keep_first: {CONTEXT} tokens leave nothing"),
        ({"on_full": 1, "keep_first": 1 << 62}, "leave nothing to drop"),
    ):
        with pytest.raises(app.AppError, match=words):
            app.begin(session, [5], app.options(opened, **values))
    with pytest.raises(app.AppError, match="100 tokens do not fit"):
        app.begin(session, [5] * 100, app.options(opened))


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> int:
    copy = tmp_path_factory.mktemp("full") / "artifact"
    return opened_with(tiny(tiny_text(context=TALK)) / "artifact", template("hermes"), copy, "hermes")


def exchange(drawn: random.Random, number: int) -> list[dict[str, Any]]:
    """A question, perhaps with calls and what they gave, and its answer."""
    found: list[dict[str, Any]] = [{"role": "user", "content": f"question {number} " + "x" * drawn.randrange(40)}]
    for _ in range(drawn.randrange(3)):
        calls = [{"function": {"name": "f", "arguments": {"a": number}}}] * drawn.randint(1, 2)
        found.append({"role": "assistant", "content": "", "tool_calls": calls})
        found += [{"role": "tool", "content": f"result {number}"}] * len(calls)
    return [*found, {"role": "assistant", "content": "answer " + "y" * drawn.randrange(60)}]


def turns_of(messages: Sequence[dict[str, Any]]) -> list[app.Turn]:
    called = [[c["function"] for c in message.get("tool_calls", ())] for message in messages]
    return [
        app.turn(m["role"], m["content"], [(f["name"], json.dumps(f["arguments"])) for f in calls])
        for m, calls in zip(messages, called, strict=True)
    ]


def rendered(artifact: int, tools: str | None, messages: Sequence[dict[str, Any]]) -> Prompt:
    return Prompt(app.chat_with_tools(artifact, tools, turns_of(messages)))


@pytest.mark.parametrize("with_tools", [True, False])
def test_the_oldest_questions_are_left_out(talking: int, with_tools: bool) -> None:
    """Those that Python's rule leaves out, one after the other, until the rest fits."""
    drawn, counts = random.Random(7), set()
    for _ in range(40):
        messages = [{"role": "system", "content": "Be brief."}] if drawn.random() < 0.5 else []
        for number in range(drawn.randrange(24)):
            turns = exchange(drawn, number)
            messages += turns if with_tools else [turns[0], turns[-1]]
        last = exchange(drawn, 99)
        messages += last[:-1] if with_tools else last[:1]
        room, left = drawn.choice((-1, 0, 1, 100, 300)), messages
        tools = tool() if with_tools else None
        wanted = {-1: 64, 0: 1}.get(room, room)
        while len(app.chat_with_tools(talking, tools, turns_of(left))) + wanted > TALK:
            shorter = _without_oldest(left)
            if shorter is None:
                break
            left = shorter
        ids, dropped = app.fitting_chat(talking, tools, turns_of(messages), room)
        if room == -1:  # Python's
            _, chosen = fitting(partial(rendered, talking, tools), messages, TALK, drop_oldest=True)
            assert chosen == left
        assert ids == app.chat_with_tools(talking, tools, turns_of(left))
        assert dropped == len(messages) - len(left)
        counts.add(dropped)
    assert len(counts) > 5


def test_a_long_conversation_is_rendered_a_few_times(talking: int) -> None:
    turns = [app.turn(("user", "assistant")[i % 2], f"turn {i}") for i in range(9_999)]
    began = time.process_time()
    ids, dropped = app.fitting_chat(talking, None, turns, 500)
    assert time.process_time() - began < 20  # a second here; a rendering for each of 5,000 questions takes an hour
    assert ids == app.chat_with_tools(talking, None, turns[dropped:])
    assert len(ids) <= TALK - 500 < len(app.chat_with_tools(talking, None, turns[dropped - 2 :]))


def test_the_last_question_stays(talking: int) -> None:
    turns = [("user", "x" * 300), ("assistant", "y"), ("user", "z" * (TALK - 80))]
    given = [app.turn(*turn) for turn in turns]
    ids, dropped = app.fitting_chat(talking, None, given, 200)  # less is left than was asked for
    assert dropped == 2
    assert ids == app.chat(talking, turns[2:])
    assert TALK - 200 < len(ids) < TALK
    long = [*given[:2], app.turn("user", "z" * (TALK + 100))]
    with pytest.raises(app.AppError, match=r"no room for an answer: .* the context 1024"):
        app.fitting_chat(talking, None, long, 1)
    for room, words in ((-2, "room: -1, or 0 to 1023"), (TALK, "the context holds 1024")):
        with pytest.raises(app.AppError, match=words):
            app.fitting_chat(talking, None, given, room)
    with pytest.raises(app.AppError, match="turns: NULL"):
        app.fitting_chat(talking, None, [], 1)
    with pytest.raises(app.AppError, match=r"turns\[0\]: calls and what tools answer need the tools"):
        app.fitting_chat(talking, None, [app.turn("tool", "x")], 1)
