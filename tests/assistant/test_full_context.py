"""A context that is full: tokens that go, those that stay, and the bits of what follows."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.assistant.answer import Limits
from moec.assistant.assistant import Assistant, Prompt
from moec.assistant.conversation import Conversation, _without_oldest, fitting
from moec.assistant.generate import Generation
from moec.assistant.load import load_session
from moec.assistant.sampling import Sampler, Sampling
from moec.assistant.speculate import Drafter, ModelDrafter, PromptLookup
from moec.compiler.artifact import Artifact
from moec.compiler.errors import RunError
from moec.compiler.target import Session
from moec.targets.xnnpack.session import CpuSession
from tests.assistant.conversations import template
from tests.assistant.speaking import Speaking, assistant, tokenizer
from tests.conftest import Moec, refused
from tests.runtime.carried_model import carried_program
from tests.tiny import TinyModels, tiny_text

CONTEXT = 64
REPEATING = [5, 6, 7, 8] * 4


@pytest.fixture(scope="module")
def folder(tiny: TinyModels) -> Path:
    return tiny(tiny_text(context=CONTEXT)) / "artifact"


@pytest.fixture
def session(folder: Path) -> Iterator[Any]:
    with moec.load(folder) as opened:  # type: ignore[attr-defined]
        yield opened


def by_the_rule(
    session: Session, prompt: Sequence[int], count: int, sampling: Sampling, keep_first: int
) -> tuple[list[int], list[np.ndarray], list[int], int]:
    """Tokens of an answer, the logits of each, what the session then holds, and how many tokens were dropped.

    After each drop the session is one that never held anything else.
    """
    half, dropped = -(-(session.context - keep_first) // 2), 0
    tokens, sampler = list(prompt), Sampler(sampling, None, prompt)
    said: list[int] = []
    rows: list[np.ndarray] = []
    while len(tokens) > session.context:
        del tokens[keep_first : keep_first + half]
        dropped += half
    session.reset()
    logits = session.prefill(tokens)[0]
    while True:
        said.append(sampler(logits))
        rows.append(np.array(logits))
        if len(said) == count:
            return said, rows, tokens, dropped
        if len(tokens) == session.context:
            del tokens[keep_first : keep_first + half]
            dropped += half
            session.reset()
            session.prefill(tokens)
        tokens.append(said[-1])
        logits = session.decode(said[-1])


class Seeing(Sampler):
    """Notes the logits that it is given."""

    seen: list[np.ndarray] = []  # noqa: RUF012

    def __call__(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> int:
        self.seen.append(np.array(logits))
        return super().__call__(logits, allowed)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    monkeypatch.setattr(Seeing, "seen", [])
    monkeypatch.setattr("moec.assistant.generate.Sampler", Seeing)
    return Seeing.seen


CASES = [
    (0, 18, {}),
    (7, 18, {"temperature": 1.0, "seed": 1}),
    (CONTEXT - 1, 18, {"temperature": 1.0, "seed": 2}),  # one token is dropped each time
    (10, CONTEXT, {"temperature": 1.0, "seed": 3, "repeat_penalty": 1.2, "frequency_penalty": 0.2}),
    (11, CONTEXT + 1, {"temperature": 1.0, "seed": 4}),
    (3, 500, {"repeat_penalty": 1.5}),
]


@pytest.mark.parametrize("rewinds", [True, False])
@pytest.mark.parametrize(("keep_first", "length", "values"), CASES)
def test_what_follows_has_the_bits_of_a_fresh_session(
    folder: Path, session: Any, seen: list[np.ndarray], keep_first: int, length: int, values: Any, rewinds: bool
) -> None:
    drawn = random.Random(length)
    prompt = [drawn.randrange(300, 4000) for _ in range(length)]
    with moec.load(folder) as fresh:  # type: ignore[attr-defined]
        said, rows, held, dropped = by_the_rule(fresh, prompt, 150, Sampling(**values), keep_first)
    session.rewinds = rewinds  # as of a model whose states do not go back
    generation = Generation(session, prompt, 150, Sampling(**values), drop_oldest=True, keep_first=keep_first)
    assert list(generation) == said
    np.testing.assert_array_equal(seen, rows)
    assert session.tokens == held
    stats = generation.stats
    assert (stats.dropped_tokens, stats.prompt_tokens, stats.new_tokens) == (dropped, length, 150)
    assert (stats.stopped, stats.cut_tokens > 0) == ("length", length > CONTEXT)
    assert dropped > 0


def test_of_a_model_with_a_recurrence(tmp_path: Path) -> None:
    """Its state does not go back: each drop begins anew."""
    file = tmp_path / "model.pte"
    file.write_bytes(carried_program(50, CONTEXT, known=50))
    prompt = [3 + i % 41 for i in range(150)]
    with CpuSession(file, threads=1) as fresh, CpuSession(file, threads=1) as session:
        assert not session.rewinds
        for sampling in (Sampling(), Sampling(temperature=1.0, seed=2)):
            said, _, held, dropped = by_the_rule(fresh, prompt, 200, sampling, 4)
            session.reset()
            generation = Generation(session, prompt, 200, sampling, drop_oldest=True, keep_first=4)
            assert list(generation) == said
            assert (session.tokens, generation.stats.dropped_tokens) == (held, dropped)


@pytest.mark.parametrize("which", ["lookup", "model"])
def test_drafts_change_nothing(folder: Path, session: Any, which: str) -> None:
    accepted = 0
    for values in ({}, {"temperature": 0.2, "seed": 3}):
        with moec.load(folder) as fresh, moec.load(folder) as small:  # type: ignore[attr-defined]
            said, _, held, dropped = by_the_rule(fresh, REPEATING, 300, Sampling(**values), 5)
            drafter: Drafter = PromptLookup() if which == "lookup" else ModelDrafter(small, session)
            generation = Generation(
                session, REPEATING, 300, Sampling(**values), drop_oldest=True, keep_first=5, drafter=drafter
            )
            assert list(generation) == said
            assert session.tokens == held
            assert generation.stats.dropped_tokens == dropped > 2 * CONTEXT
            accepted += generation.stats.accepted_tokens
    assert accepted > 10


def test_an_answer_is_cancelled_while_tokens_are_computed_anew(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = Generation(session, [5, 6, 7], 200, Sampling(), drop_oldest=True, drafter=None)
    prefill = session.prefill

    def cancelling(ids: Sequence[int], logits: str = "last") -> np.ndarray:
        if session.position == 0 and len(generation.scores) > 3:
            generation.cancelled.set()
        return prefill(ids, logits)

    monkeypatch.setattr(session, "prefill", cancelling)
    monkeypatch.setattr(session, "max_tokens", 8)
    generation.top_scores = 0
    said = list(generation)
    assert generation.stats.stopped == "cancelled"
    assert len(said) == CONTEXT - 3 + 1
    assert session.position == 8  # what was computed until then, and nothing else
    session.prefill([9])


def test_without_the_policy_nothing_is_dropped(session: Any) -> None:
    generation = Generation(session, [5, 6, 7], 200)
    assert len(list(generation)) == CONTEXT - 2
    assert (generation.stats.stopped, generation.stats.dropped_tokens) == ("context", 0)
    with pytest.raises(RunError, match="65 tokens do not fit"):
        "".join(session.generate(list(range(65))))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"context_full": "drop_oldest", "keep_first": CONTEXT}, "keep_first: 64 tokens leave nothing to drop"),
        ({"context_full": "drop_oldest", "keep_first": 10**30}, "leave nothing to drop: the context holds 64"),
        ({"context_full": "drop_oldest", "keep_first": -1}, "keep_first: -1 tokens"),
        ({"keep_first": 3}, "keep_first: nothing is dropped"),
        ({"context_full": "forget"}, "context_full 'forget'"),
    ],
)
def test_policies_that_are_refused(session: Any, given: dict[str, Any], what: str) -> None:
    with pytest.raises(RunError, match=what):
        session.generate([1, 2], **given)


def test_an_answer_without_a_number_of_tokens_has_an_end(session: Any) -> None:
    answer = session.generate([5, 6, 7], context_full="drop_oldest", logit_bias={2: -1e6, 1: -1e6, 0: -1e6})
    "".join(answer)
    assert (answer.stats.new_tokens, answer.stats.stopped) == (CONTEXT, "length")


def test_a_call_goes_on_where_the_context_is_full(tiny: TinyModels, tmp_path: Path) -> None:
    """Twice as long as the context; the format and the form of calls know nothing of it."""
    pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")
    artifact = Artifact.open(tiny(tiny_text(context=512)) / "artifact")
    file = tmp_path / "hermes.jinja"
    file.write_text(template("hermes").text)
    drawn = random.Random(1)
    words = " ".join("".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200))
    schema = {
        "type": "object",
        "properties": {"text": {"const": words}},
        "required": ["text"],
        "additionalProperties": False,
    }
    ask = [{"role": "user", "content": "Hi"}]
    speaks = Assistant.of(artifact, chat_template=file)

    def asked(parameters: dict[str, Any]) -> Prompt:
        tool = {"type": "function", "function": {"name": "write", "parameters": parameters}}
        return speaks.chat_prompt(ask, tools=[tool], shared=True)

    with load_session(artifact) as session:
        limits = Limits(Sampling(), 3000, context_full="drop_oldest")
        prompt, forced = asked({"type": "object"}), asked(schema)  # the schema itself is too long for the prompt
        answer = speaks.answer(session, prompt, limits, speaks.must_call(forced, several=False))
        assert "".join(answer).strip() == ""
        assert [(c.name, json.loads(c.arguments)) for c in answer.calls] == [("write", {"text": words})]
        assert answer.stats.dropped_tokens > 512
        assert session.tokens[: prompt.shared] == prompt.ids[: prompt.shared]  # the system prompt and the tools
        assert prompt.shared > 50
        assert (answer.unfinished, answer.stats.stopped) == (False, "complete")


def exchange(number: int, drawn: random.Random) -> list[dict[str, Any]]:
    """A question, and its answer; some with a call and its result."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": number}}}
    called = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r" * drawn.randrange(9)},
    ]
    return [
        {"role": "user", "content": f"Q{number} " + "q" * drawn.randrange(30)},
        *(called if drawn.random() < 0.5 else []),
        {"role": "assistant", "content": "a" * drawn.randrange(30)},
    ]


def test_the_oldest_questions_go_first(tmp_path: Path) -> None:
    """As many as one by one would go, until there is room; each with all that answers it."""
    speaks, drawn, counts = assistant(tmp_path, "hermes"), random.Random(1), set()
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    for _ in range(25):
        system = [{"role": "system", "content": "Be brief."}] if drawn.random() < 0.5 else []
        exchanges = [exchange(number, drawn) for number in range(drawn.randrange(14))]
        messages = [*system, *(m for one in exchanges for m in one), {"role": "user", "content": "Last?"}]
        left, context = messages, 900
        while len(speaks.chat_prompt(left, tools=tools).ids) + 64 > context:
            left = _without_oldest(left)
        prompt = speaks.fitting_prompt(messages, context, tools=tools)
        assert prompt.ids == speaks.chat_prompt(left, tools=tools).ids
        assert prompt.dropped == len(messages) - len(left)
        counts.add(prompt.dropped)
        session = Speaking(["Yes."], context=context)
        answer = speaks.generate(session, messages, tools=tools, context_full="drop_oldest")
        assert ("".join(answer), answer.stats.dropped_messages) == ("Yes.", prompt.dropped)
        assert session.prompts == [prompt.ids]
    assert len(counts) > 5
    assert 0 in counts


def test_the_last_question_and_the_system_prompt_stay(tmp_path: Path) -> None:
    speaks = assistant(tmp_path)
    messages = [
        {"role": "system", "content": "S."},
        *({"role": role, "content": "x" * 50} for role in ("user", "assistant", "user", "assistant")),
        {"role": "user", "content": "y" * 100},
    ]
    least = len(speaks.chat_prompt([messages[0], messages[-1]]).ids)
    prompt = speaks.fitting_prompt(messages, least + 1)  # less is left than is asked for
    assert (len(prompt.ids), prompt.dropped) == (least, 4)
    with pytest.raises(
        RunError, match=rf"no room for an answer: the conversation has {least} tokens, the context {least}"
    ):
        speaks.fitting_prompt(messages, least)
    session = Speaking(["z" * 500], context=least + 1)
    with pytest.raises(RunError, match="messages: no room for an answer"):
        speaks.generate(session, [*messages[:-1], {"role": "user", "content": "y" * 200}], context_full="drop_oldest")
    with pytest.raises(RunError, match=r"messages\[0\]: is no object"):
        speaks.generate(session, [3, {"role": "user", "content": "y" * 200}], context_full="drop_oldest")


def test_long_conversations_are_rendered_a_few_times() -> None:
    rendered = []

    def render(messages: list[dict[str, Any]]) -> Prompt:
        rendered.append(len(messages))
        return Prompt([1] * (10 * len(messages)))

    messages = [{"role": ("user", "assistant")[i % 2], "content": ""} for i in range(4001)]
    prompt, kept = fitting(render, messages, 1000, drop_oldest=True)
    assert (len(prompt.ids), kept) == (930, messages[-93:])
    assert len(rendered) < 20


def test_a_talk_goes_on(tmp_path: Path) -> None:
    """Answers of a chat may be longer than the context; the system prompt stays before them."""
    row = np.zeros(tokenizer().get_vocab_size(), np.float32)
    row[40] = 9
    session = Speaking(likes=lambda _: row, context=200)
    conversation = Conversation(assistant(tmp_path), session, system="S.", drop_oldest=True)
    limits = Limits(max_new_tokens=450, context_full="drop_oldest")
    for question in ("One?", "Two?"):
        answer = conversation.ask(question, limits)
        assert len("".join(answer)) == 450
        assert answer.stats.dropped_tokens > 200
        kept = tokenizer().decode(session.tokens, skip_special_tokens=False)
        assert kept.startswith("<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\n")
        conversation.keep(answer)
    assert conversation.dropped == 2  # the first question with an answer that is longer than the context


def test_what_the_commands_say(folder: Path, moec: Moec) -> None:
    command = ["run", folder, "--ids", "5,6,7,8", "--max-new-tokens", 150]
    policy = ["--context-full", "drop-oldest", "--keep-first", 3]
    status, out, err = moec(*command, *policy, "--json")
    found = json.loads(out)
    assert status == 0
    assert (len(found["ids"]), found["stopped"], found["dropped_tokens"] > CONTEXT) == (150, "length", True)
    assert f"the context was full: the oldest {found['dropped_tokens']} tokens were dropped\n" in err
    with_text = moec("run", folder, "--prompt", "Hello, world", "--max-new-tokens", 150, *policy)
    assert with_text[0] == 0
    assert "tokens were dropped" in with_text[2]
    plain = json.loads(moec(*command, "--json")[1])
    assert (plain["ids"], plain["dropped_tokens"]) == (found["ids"][: len(plain["ids"])], 0)
    assert plain["stopped"] == "context"
    refused(moec(*command, "--context-full", "forget"), "--context-full 'forget'", "error or drop-oldest")
    refused(moec(*command, "--keep-first", 3), "--keep-first is for a context that drops tokens")
    refused(
        moec(*command, "--context-full", "drop-oldest", "--keep-first", CONTEXT), "keep_first: 64 tokens leave nothing"
    )


def test_the_question_of_a_command_stays_whole(folder: Path, moec: Moec, tmp_path: Path) -> None:
    """What does not fit beside it is an error, as in a conversation."""
    (tmp_path / "chat.jinja").write_text(template("hermes").text)
    chat = ["run", folder, "--chat", "--chat-template", tmp_path / "chat.jinja", "--context-full", "drop-oldest"]
    refused(moec(*chat, "--prompt", "word " * 80), "no room for an answer", "the context 64")
    refused(moec(*chat, "--prompt", "Hi", "--system", "word " * 80), "no room for an answer", "the context 64")
    status, _, err = moec(*chat, "--prompt", "Hi", "--max-new-tokens", 3)
    assert status == 0, err


@pytest.mark.parametrize("text", ["{}", "0", '""', "null"])
def test_a_file_that_holds_no_tools(folder: Path, moec: Moec, tmp_path: Path, text: str) -> None:
    (tmp_path / "tools.json").write_text(text)
    command = ["run", folder, "--chat", "--prompt", "Hi", "--tools", tmp_path / "tools.json"]
    refused(moec(*command), "tools.json: holds no list of tools")


def test_a_thread_may_cancel_an_answer_without_end(session: Any) -> None:
    answer = session.generate([5, 6, 7], context_full="drop_oldest", max_new_tokens=10**9, logit_bias={2: -1e6})
    timer = threading.Timer(0.3, answer.cancel)
    timer.start()
    "".join(answer)
    timer.join()
    assert answer.stats.stopped == "cancelled"
