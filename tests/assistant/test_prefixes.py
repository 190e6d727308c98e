"""Beginnings of prompts that are computed once: from a folder, and between requests; tokens counted, bits compared."""

from __future__ import annotations

import datetime
import logging
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.assistant.beginnings import Beginnings
from moec.assistant.generate import Generation
from moec.assistant.prefixes import MOST_FILES, PrefixCache, shared_length
from moec.assistant.server.conversations import Conversations
from moec.assistant.template import ChatTemplate
from moec.compiler.artifact import Artifact
from moec.compiler.errors import ArtifactError, LostFileError, NoRoomError, RunError, UserError
from moec.compiler.target import Session
from moec.targets.xnnpack.session import CpuSession
from tests.assistant.speaking import Speaking, assistant
from tests.conftest import Moec, refused
from tests.tiny import TinyModels, tiny_text

SYSTEM = list(range(100, 180))


@pytest.fixture(scope="module")
def artifact(tiny: TinyModels) -> Artifact:
    return Artifact.open(tiny(tiny_text(context=512)) / "artifact")


@pytest.fixture
def session(artifact: Artifact) -> Iterator[Session]:
    with moec.load(artifact) as opened:  # type: ignore[attr-defined]
        yield opened


def answer(
    session: Session, ids: list[int], prefixes: PrefixCache | None = None, shared: int = 0
) -> tuple[list[int], int]:
    """New tokens, and how many of the prompt's were there."""
    generation = Generation(session, ids, 8, prefixes=prefixes, shared=shared)
    return list(generation), generation.stats.reused_tokens


def test_how_much_is_shared() -> None:
    assert shared_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_length([], [1]) == 0
    assert shared_length([1, 2], [1, 2, 3]) == 2


def test_a_prefix_is_computed_once_per_installation(artifact: Artifact, session: Session, tmp_path: Path) -> None:
    prompts = [[*SYSTEM, *range(200 + 9 * i, 220 + 9 * i)] for i in range(3)]
    alone = []
    for prompt in prompts:
        session.reset()
        alone.append(answer(session, prompt)[0])
    for index, prompt in enumerate(prompts):  # each as a process of its own would
        session.reset()
        prefixes = PrefixCache(tmp_path / "kept", artifact.manifest.contents)
        assert answer(session, prompt, prefixes, len(SYSTEM)) == (alone[index], len(SYSTEM) if index else 0)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    session.reset()
    prefixes.restore(session, prompts[0], 0)
    restored = session.prefill(prompts[0][len(SYSTEM) :])
    session.reset()
    np.testing.assert_array_equal(restored, session.prefill(prompts[0]))
    longer = [*SYSTEM, *range(300, 330)]
    session.reset()
    answer(session, [*longer, 5], prefixes, len(longer))
    session.reset()
    assert answer(session, [*longer, 6], prefixes)[1] == len(longer)  # the longest that is known
    assert answer(session, [*SYSTEM, 6], prefixes)[1] == len(SYSTEM)  # what is in memory is not read again
    other = PrefixCache(tmp_path / "kept", "0" * 64)  # another artifact
    session.reset()
    assert answer(session, [*SYSTEM, 6], other)[1] == 0


def test_a_damaged_prefix_is_said_and_computed_again(
    artifact: Artifact, session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = PrefixCache(tmp_path, artifact.manifest.contents)
    wanted = answer(session, [*SYSTEM, 5], prefixes, len(SYSTEM))[0]
    (file,) = tmp_path.iterdir()
    raw = file.read_bytes()
    other = tmp_path / "other"
    session.reset()
    session.prefill([7] * len(SYSTEM))
    session.save(other)
    foreign = other.read_bytes()
    other.unlink()
    for bad in (raw[: len(raw) // 2], raw[:200] + bytes([raw[200] ^ 1]) + raw[201:], b"", foreign):
        file.write_bytes(bad)
        session.reset()
        with caplog.at_level(logging.WARNING):
            assert answer(session, [*SYSTEM, 5], prefixes) == (wanted, 0)
        assert "removed and computed again" in caplog.text
        assert not file.exists()
        caplog.clear()


@pytest.mark.parametrize("times", [1, 2])
def test_a_prefix_that_has_no_room_stays(
    artifact: Artifact,
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    times: int,
) -> None:
    """Beside the session's own caches; where there is none in their place either, the tokens are computed."""
    prefixes = PrefixCache(tmp_path, artifact.manifest.contents)
    wanted = answer(session, [*SYSTEM, 5], prefixes, len(SYSTEM))[0]
    (file,) = tmp_path.iterdir()
    session.rewind(3)
    restore, refusals = CpuSession.restore, []

    def refusing(self: CpuSession, path: Path) -> None:
        if len(refusals) == times:
            return restore(self, path)
        refusals.append(self.position)
        raise NoRoomError("no room", place=str(path))

    monkeypatch.setattr(CpuSession, "restore", refusing)
    with caplog.at_level(logging.WARNING):
        assert answer(session, [*SYSTEM, 5], prefixes) == (wanted, len(SYSTEM) if times == 1 else 0)
    assert refusals == [3, 0][:times]
    assert file.exists()
    assert ("a prefix is not used" in caplog.text) == (times == 2)


def test_a_file_that_cannot_be_read_is_no_damaged_prefix(artifact: Artifact, session: Session, tmp_path: Path) -> None:
    prefixes = PrefixCache(tmp_path, artifact.manifest.contents)
    wanted = answer(session, [*SYSTEM, 5], prefixes, len(SYSTEM))[0]
    (file,) = tmp_path.iterdir()
    session.reset()
    session.prefill([1])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with file.open("rb") as opened:
        least = opened.fileno()
    files = prefixes._files()
    prefixes._files = lambda: files  # type: ignore[method-assign]
    resource.setrlimit(resource.RLIMIT_NOFILE, (least, before[1]))
    try:
        assert prefixes.restore(session, [*SYSTEM, 5], 1) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert file.exists()
    assert answer(session, [*SYSTEM, 5], prefixes) == (wanted, len(SYSTEM))


def test_old_prefixes_go(artifact: Artifact, session: Session, tmp_path: Path) -> None:
    prefixes = PrefixCache(tmp_path, artifact.manifest.contents)
    for i in range(MOST_FILES + 5):
        name = f"{artifact.manifest.contents[:16]}-{100 + i}-{'0' * 32}.session"
        (tmp_path / name).write_bytes(b"")
    session.prefill(SYSTEM)
    (tmp_path / "mine").write_text("stays")
    prefixes.keep(session)
    assert len(list(tmp_path.iterdir())) == MOST_FILES + 1
    session.rewind(4)
    prefixes.keep(session)  # too few to be worth a file
    assert len(list(tmp_path.iterdir())) == MOST_FILES + 1


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        PrefixCache(tmp_path / "file", "0" * 64)


def test_the_system_prompt_is_what_is_kept(tmp_path: Path) -> None:
    speaks = assistant(tmp_path)
    speaks.prefixes = PrefixCache(tmp_path / "kept", "0" * 64)
    system = {"role": "system", "content": "Be brief."}
    prompts = [speaks.chat_prompt([system, {"role": "user", "content": c}]) for c in ("Hi", "Who?", "1", "a")]
    assert len({tuple(p.ids[: p.shared]) for p in prompts}) == 1
    kept = speaks.tokenizer.decode(prompts[0].ids[: prompts[0].shared], skip_special_tokens=False)
    assert kept == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"


def test_a_turn_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it shares with others is found once for a system prompt, its tools and variables, and for a day."""
    speaks, rendered = assistant(tmp_path, "hermes"), []
    speaks.prefixes = PrefixCache(tmp_path / "kept", "0" * 64)
    render = ChatTemplate.render

    def counting(self: ChatTemplate, messages: Any, **given: Any) -> str:
        rendered.append(len(messages))
        return render(self, messages, **given)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    turns: list[Any] = [{"role": "user", "content": "Hi"}]
    kinds = [
        {"messages": turns},
        {"messages": [{"role": "system", "content": "Be brief."}, *turns]},
        {"messages": turns, "tools": [tool]},
        {"messages": turns, "variables": {"enable_thinking": False}},
    ]
    for kind in kinds:
        before, shared = len(rendered), speaks.chat_prompt(**kind).shared
        assert (len(rendered) - before, shared > 4) == (3, True)
        for _ in range(3):
            longer = [*kind["messages"], {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "No."}]
            before = len(rendered)
            assert speaks.chat_prompt(**{**kind, "messages": longer}).shared == shared
            assert len(rendered) - before == 1
    for number in range(20):  # no more than some are remembered
        speaks.chat_prompt([{"role": "system", "content": f"{number}"}, *turns])
    assert len(speaks._beginnings._known) <= 16
    before = len(rendered)
    speaks.chat_prompt(**kinds[0])
    assert len(rendered) - before == 3


def test_what_is_shared_follows_the_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the time of day, which two turns have not in common, is not shared."""
    today = datetime.date.today()

    class Date(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return today + datetime.timedelta(days=len(asked))

    asked: list[str] = []
    monkeypatch.setattr("moec.assistant.beginnings.datetime.date", Date)
    found, beginnings = [], Beginnings()
    for day in ("Mon", "Tue"):
        for _ in range(2):
            found.append(beginnings.of(["x"], lambda question, day=day: [ord(c) for c in f"{day}:{question}"]))
        asked.append(day)
    assert ["".join(map(chr, ids)) for ids in found] == ["Mon:", "Mon:", "Tue:", "Tue:"]


def test_a_template_that_refuses_shares_nothing() -> None:
    beginnings, calls = Beginnings(), []

    def refusing(fault: type[UserError]) -> Callable[[str], list[int]]:
        def asked(_: str) -> list[int]:
            calls.append(fault)
            raise fault("no")

        return asked

    for _ in range(2):
        assert beginnings.of("refused", refusing(RunError)) == []
        assert beginnings.of("failed", refusing(ArtifactError)) == []  # which it may not do again
    assert (calls.count(RunError), calls.count(ArtifactError)) == (1, 2)


def test_conversations_by_turns_compute_what_is_new(artifact: Artifact, session: Session) -> None:
    """Two clients with one system prompt, by turns: each goes on where it was; with one session each begins anew."""
    turns = [[*SYSTEM, *range(200 + i, 300 + i)] for i in (0, 100)]
    prompts = [[*turns[i % 2], *range(400, 400 + 10 * (i // 2))] for i in range(6)]
    counts, said = {}, {}
    for most in (1, 2, 4):
        with moec.load(artifact) as fresh:  # type: ignore[attr-defined]
            kept = Conversations(fresh, most)
            found = [answer(kept.take(prompt), prompt) for prompt in prompts]
            assert len(kept) == min(most, 2)
            kept.close()
        counts[most], said[most] = [reused for _, reused in found], [ids for ids, _ in found]
    assert said[1] == said[2] == said[4]
    assert counts[1] == [0, 80, 80, 80, 80, 80]
    assert counts[2] == counts[4]
    assert counts[2][:2] == [0, 80]
    assert all(reused >= 179 for reused in counts[2][2:])


def test_the_oldest_conversation_goes(artifact: Artifact) -> None:
    with moec.load(artifact) as fresh:  # type: ignore[attr-defined]
        kept = Conversations(fresh, 2)
        prompts = [[1000 + i] * 100 for i in range(3)]
        for prompt in prompts:
            assert answer(kept.take(prompt), prompt)[1] == 0
        assert answer(kept.take(prompts[2]), prompts[2])[1] == 99
        assert answer(kept.take(prompts[1]), prompts[1])[1] == 99
        assert answer(kept.take(prompts[0]), prompts[0])[1] == 0
        kept.close()


def test_without_room_for_one_more_the_oldest_goes(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a memory budget that holds two sessions."""
    fork, opened = CpuSession.fork, [1]

    def limited(self: CpuSession) -> CpuSession:
        if opened[0] == 2:
            raise RunError("no room for the caches of another session")
        opened[0] += 1
        return fork(self)

    def closed(self: CpuSession) -> None:
        opened[0] -= self._handle is not None
        close(self)

    close = CpuSession.close
    monkeypatch.setattr(CpuSession, "fork", limited)
    monkeypatch.setattr(CpuSession, "close", closed)
    with moec.load(artifact) as fresh:  # type: ignore[attr-defined]
        kept = Conversations(fresh, 4)
        prompts = [[1000 + i] * 100 for i in range(3)]
        for prompt in prompts:
            assert answer(kept.take(prompt), prompt)[1] == 0
        assert len(kept) == 2
        assert answer(kept.take(prompts[2]), prompts[2])[1] == 99
        assert answer(kept.take(prompts[1]), prompts[1])[1] == 99
        assert answer(kept.take(prompts[0]), prompts[0])[1] == 0
        assert caplog.text.count("2 conversations are kept: no room") == 1
        kept.close()


def test_a_session_that_lost_its_tokens_costs_no_other(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is used itself; the next conversations have sessions of their own as before."""
    fork, losing = CpuSession.fork, [True]

    def lost(self: CpuSession) -> CpuSession:
        if losing.pop() if losing else False:
            self.reset()
            raise LostFileError("its file was changed")
        return fork(self)

    monkeypatch.setattr(CpuSession, "fork", lost)
    with moec.load(artifact) as fresh:  # type: ignore[attr-defined]
        kept = Conversations(fresh, 3)
        prompts = [[1000 + i] * 100 for i in range(3)]
        for prompt in prompts:
            session = kept.take(prompt)
            session.rewind(0)
            session.prefill(prompt)
        assert "a conversation is computed again" in caplog.text
        assert "kept" not in caplog.text
        assert [s.tokens[0] for s in kept._sessions] == [1001, 1002]
        kept.close()


def test_a_session_that_does_not_fork_is_the_only_one(caplog: pytest.LogCaptureFixture) -> None:
    kept = Conversations(Speaking(["a", "b"]), 4)
    kept.take([20] * 100).prefill([20] * 100)
    with caplog.at_level(logging.WARNING):
        assert kept.take([21] * 100).position == 100
    assert "one conversation is kept" in caplog.text
    assert len(kept) == 1


def test_the_commands(artifact: Artifact, moec: Moec, tmp_path: Path) -> None:
    run = ["run", artifact.folder, "--prompt", "Once upon a time there was a king and he had a castle", "--json"]
    plain = moec(*run, "--max-new-tokens", 5)
    for _ in range(2):
        status, out, _ = moec(*run, "--max-new-tokens", 5, "--prefix-cache", tmp_path / "kept")
        assert (status, out[: out.index('"prompt_tokens')]) == (0, plain[1][: plain[1].index('"prompt_tokens')])
    assert len(list((tmp_path / "kept").iterdir())) == 1
    refused(moec("run", artifact.folder, "--ids", "1,2", "--prefix-cache", tmp_path), "--prefix-cache")
    refused(moec("chat", artifact.folder, "--prefix-cache", artifact.folder / "model.pte"), "chat template")
