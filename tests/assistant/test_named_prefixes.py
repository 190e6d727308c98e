"""Beginnings of prompts under names: they stay, are replaced when the beginning changes, and are listed and removed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.assistant.answer import Limits
from moec.assistant.assistant import Assistant
from moec.assistant.conversation import Conversation
from moec.assistant.generate import Generation
from moec.assistant.load import load_session
from moec.assistant.prefixes import MOST_FILES, PrefixCache, kept_in
from moec.assistant.template import ChatTemplate
from moec.compiler.artifact import Artifact
from moec.compiler.errors import RunError, UserError
from tests.assistant.conversations import template
from tests.assistant.speaking import Speaking, assistant
from tests.conftest import Moec, refused
from tests.tiny import TinyModels, tiny_text

SYSTEM = list(range(100, 180))
OTHER = list(range(300, 390))


@pytest.fixture(scope="module")
def artifact(tiny: TinyModels) -> Artifact:
    return Artifact.open(tiny(tiny_text(context=512)) / "artifact")


@pytest.fixture
def session(artifact: Artifact) -> Iterator[Any]:
    with load_session(artifact) as opened:
        yield opened


def told(folder: Path) -> list[tuple[str | None, int]]:
    return [(one.name, one.tokens) for one in kept_in(folder)]


def reused(session: Any, prefixes: PrefixCache, ids: list[int], shared: int = 0, name: str | None = None) -> int:
    """How many tokens of a prompt were known to a session that held nothing."""
    session.reset()
    generation = Generation(session, ids, 1, prefixes=prefixes, shared=shared, prefix_name=name)
    list(generation)
    return generation.stats.reused_tokens


def test_a_name_stays_and_is_replaced(artifact: Artifact, session: Any, tmp_path: Path) -> None:
    def prefixes() -> PrefixCache:  # each as a process of its own has it
        return PrefixCache(tmp_path, artifact.manifest.contents)

    assert reused(session, prefixes(), [*SYSTEM, 5], 80, "assistant") == 0
    assert told(tmp_path) == [("assistant", 80)]
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert reused(session, prefixes(), [*SYSTEM, 6], 80, "assistant") == 80
    assert file.stat().st_mtime_ns >= written
    assert reused(session, prefixes(), [*SYSTEM, 7]) == 80  # found by its tokens, whoever asks
    for number in range(MOST_FILES + 3):  # those without a name go, the named one stays, however long it is unused
        session.reset()
        session.prefill([400 + number % 7, 500 + number, *range(600, 620)])
        prefixes().save(session)
    names = told(tmp_path)
    assert len(names) == MOST_FILES + 1
    assert ("assistant", 80) in names
    assert reused(session, prefixes(), [*OTHER, 5], 90, "assistant") == 0  # another beginning
    assert [found for found in told(tmp_path) if found[0]] == [("assistant", 90)]
    assert reused(session, prefixes(), [*SYSTEM, 5]) == 0
    other = PrefixCache(tmp_path, "0" * 64)  # another artifact's name is another
    session.reset()
    session.prefill(SYSTEM)
    other.save(session, "assistant")
    assert sorted(found for found in told(tmp_path) if found[0]) == [("assistant", 80), ("assistant", 90)]


def test_a_name_is_given_to_what_is_known(artifact: Artifact, session: Any, tmp_path: Path) -> None:
    """On disk without a name, in memory, in memory with more behind it, and where states do not go back."""
    prefixes = PrefixCache(tmp_path, artifact.manifest.contents)
    assert reused(session, prefixes, [*SYSTEM, 5], 80) == 0
    assert told(tmp_path) == [(None, 80)]
    assert reused(session, prefixes, [*SYSTEM, 5], 80, "a") == 80
    assert told(tmp_path) == [("a", 80)]  # not twice
    for name, rewinds in (("b", True), ("c", False)):
        prefixes = PrefixCache(tmp_path / name, artifact.manifest.contents)
        session.reset()
        wanted = np.array(session.prefill([*SYSTEM, 5, 6, 7]))
        session.rewinds = rewinds
        generation = Generation(session, [*SYSTEM, 5, 6, 7], 1, prefixes=prefixes, shared=80, prefix_name=name)
        (token,) = list(generation)
        assert token == int(wanted.argmax())
        assert generation.stats.reused_tokens == (80 if rewinds else 0)
        assert session.tokens == [*SYSTEM, 5, 6, 7]
        (kept,) = kept_in(tmp_path / name)
        assert (kept.name, kept.tokens) == (name, 80)
        session.rewinds = True
        session.reset()
        session.restore(kept.file)
        assert session.tokens == SYSTEM
        np.testing.assert_array_equal(session.prefill([5, 6, 7]), wanted)
    assert reused(session, prefixes, [8, 9, 5], 2, "short") == 0  # with a name, few tokens are kept as well
    assert ("short", 2) in told(tmp_path / "c")


def test_a_damaged_one_is_computed_again(
    artifact: Artifact, session: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = PrefixCache(tmp_path, artifact.manifest.contents)
    reused(session, prefixes, [*SYSTEM, 5], 80, "a")
    (file,) = tmp_path.iterdir()
    raw = file.read_bytes()
    for bad in (raw[:-9], b"", raw[:300] + bytes([raw[300] ^ 1]) + raw[301:]):
        session.reset()
        file.unlink()
        file.write_bytes(bad)
        with caplog.at_level(logging.WARNING):
            assert reused(session, prefixes, [*SYSTEM, 5], 80, "a") == 0
        assert "removed and computed again" in caplog.text
        caplog.clear()
        session.reset()
        assert reused(session, prefixes, [*SYSTEM, 5], 80, "a") == 80
    for foreign in (f"{file.name}.part", f"x{file.name}", file.name.replace(".a.", ".a$."), "a"):
        (tmp_path / foreign).write_text("kept")
    assert told(tmp_path) == [("a", 80)]
    assert len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_went_away_is_said(
    artifact: Artifact, session: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = PrefixCache(tmp_path / "kept", artifact.manifest.contents)
    (tmp_path / "kept").rmdir()
    with caplog.at_level(logging.WARNING):
        assert reused(session, prefixes, [*SYSTEM, 5], 80, "a") == 0
    assert "prefixes are not used: No such file" in caplog.text
    assert "the prefix is not kept" in caplog.text
    session.reset()
    session.prefill(SYSTEM)
    with pytest.raises(RunError):
        prefixes.save(session, "a")


@pytest.mark.parametrize("name", ["", "a/b", "..\\x", "a b", "é", "x" * 65, "a\n", "\0"])
def test_names_that_are_none(artifact: Artifact, session: Any, tmp_path: Path, name: str) -> None:
    prefixes = PrefixCache(tmp_path, artifact.manifest.contents)
    session.prefill(SYSTEM)
    with pytest.raises(UserError, match=r"prefix: no name of a prefix: .*use 1 to 64 of A-Z"):
        prefixes.save(session, name)
    assert list(tmp_path.iterdir()) == []


def test_from_python(artifact: Artifact, tmp_path: Path) -> None:
    with moec.load(artifact, prefix_cache=tmp_path / "kept") as opened:  # type: ignore[attr-defined]
        opened.prefill(SYSTEM)
        opened.keep_prefix("ids")
        text = opened.generate("Once upon a time there was a king", max_new_tokens=4, prefix="text")
        wanted = "".join(text)
        with pytest.raises(UserError, match="no name of a prefix"):
            opened.generate("x", prefix="a/b")
        opened.reset()
        with pytest.raises(RunError, match="the session holds no tokens"):
            opened.keep_prefix("ids")
    assert {name for name, _ in told(tmp_path / "kept")} == {"ids", "text"}
    with moec.load(artifact, prefix_cache=tmp_path / "kept") as opened:  # type: ignore[attr-defined]
        answer = opened.generate([*SYSTEM, 9], max_new_tokens=2)
        "".join(answer)
        assert answer.stats.reused_tokens == len(SYSTEM)
        again = opened.generate("Once upon a time there was a king", max_new_tokens=4)
        assert "".join(again) == wanted
        assert again.stats.reused_tokens == again.stats.prompt_tokens - 1
    with moec.load(artifact) as opened:  # type: ignore[attr-defined]
        opened.prefill(SYSTEM)
        for fails in (lambda: opened.keep_prefix("a"), lambda: opened.generate("x", prefix="a")):
            with pytest.raises(RunError, match=r"prefix: no folder was named.*prefix_cache=DIR"):
                fails()


def test_a_talk_keeps_its_system_prompt(artifact: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(template("chatml").text)
    speaks = Assistant.of(artifact, chat_template=file)
    for system, known in (("Answer in one sentence.", False), ("Answer in one sentence.", True), ("Be brief.", False)):
        speaks.prefixes = PrefixCache(tmp_path / "kept", artifact.manifest.contents)
        with load_session(artifact) as session:
            talk = Conversation(speaks, session, system=system, prefix="talk")
            answer = talk.ask("Who?", Limits(max_new_tokens=2))
            "".join(answer)
            talk.keep(answer)
            shared = speaks.chat_prompt(talk.messages[:2]).shared
            assert told(tmp_path / "kept") == [("talk", shared)]
            assert answer.stats.reused_tokens == (shared if known else 0)
            "".join(talk.ask("And who?", Limits(max_new_tokens=2)))
            assert told(tmp_path / "kept") == [("talk", shared)]
    with load_session(artifact) as session:  # as a server does at its start
        assert speaks.keep_beginning(session, "talk", system="Be brief.") == (shared, shared)
        assert session.position == shared
        count, found = speaks.keep_beginning(session, "talk", system="Be long.")
        assert (found < count, told(tmp_path / "kept")) == (True, [("talk", count)])


def test_beginnings_that_differ_are_refused(tmp_path: Path) -> None:
    speaks = assistant(tmp_path, chat=ChatTemplate("{{ messages[-1].content }}:", {}, "x"))
    speaks.prefixes = PrefixCache(tmp_path / "kept", "0" * 64)
    with pytest.raises(RunError, match="do not begin alike"):
        speaks.keep_beginning(Speaking(), "a")


def test_what_is_not_kept_is_said(
    artifact: Artifact, session: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt that was cut does not take the name from the prefix that has it."""
    prefixes = PrefixCache(tmp_path, artifact.manifest.contents)
    reused(session, prefixes, [*SYSTEM, 5], 80, "assistant")
    assert "nothing is kept" not in caplog.text
    long = [7 + i % 50 for i in range(600)]
    session.reset()
    policy = {"drop_oldest": True, "keep_first": 4}
    list(Generation(session, long, 1, prefixes=prefixes, shared=599, prefix_name="assistant", **policy))  # type: ignore[arg-type]
    assert "nothing is kept as prefix assistant: the prompt does not fit the context" in caplog.text
    list(Generation(session, [5], 1, prefixes=prefixes, shared=0, prefix_name="assistant"))
    assert "nothing is kept as prefix assistant: prompts have no beginning in common" in caplog.text
    assert told(tmp_path) == [("assistant", 80)]


def test_a_session_that_loses_its_tokens_while_they_are_kept(
    artifact: Artifact, session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer would begin with the rest of the prompt alone."""

    def lost(path: Path) -> None:
        session.reset()
        raise RunError("its file was changed")

    monkeypatch.setattr(session, "save", lost)
    with pytest.raises(RunError, match="the session has lost its tokens"):
        reused(session, PrefixCache(tmp_path, artifact.manifest.contents), [*SYSTEM, 5], 80)


def test_the_commands(artifact: Artifact, moec: Moec, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run = ["run", artifact.folder, "--prompt", "Once upon a time there was a king", "--max-new-tokens", 3, "--json"]
    named = [*run, "--prefix-cache", kept, "--prefix", "story"]
    first, second = (json.loads(moec(*named)[1]) for _ in range(2))
    assert (first["reused_tokens"], second["reused_tokens"]) == (0, first["prompt_tokens"] - 1)
    assert first["ids"] == second["ids"]
    status, out, err = moec("prefixes", kept)
    assert (status, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [["story", str(first["prompt_tokens"] - 1)]]
    (found,) = json.loads(moec("prefixes", kept, "--artifact", artifact.folder, "--json")[1])
    assert (found["name"], found["tokens"]) == ("story", first["prompt_tokens"] - 1)
    assert found["bytes"] == Path(found["file"]).stat().st_size > 0
    refused(moec("prefixes", kept, "--remove", "tale"), str(kept), "no prefix is named tale", "known: story")
    refused(moec("prefixes", kept, "--remove", "a/b"), "--remove: no name of a prefix")
    refused(moec("prefixes", kept, "--remove", "story", "--remove", "tale"), "no prefix is named tale")
    refused(moec("prefixes", kept, "--remove", "story", "--json"), "--json is of the list")
    assert [one.name for one in kept_in(kept)] == ["story"]
    refused(moec("prefixes", tmp_path / "absent"), str(tmp_path / "absent"), "cannot be read")
    status, out, err = moec("prefixes", kept, "--remove", "story")
    assert (status, out, err) == (0, "", f"{found['file']}: removed\n")
    assert list(kept.iterdir()) == []
    refused(moec(*run, "--prefix", "story"), "--prefix is the name of a prefix in a folder", "add --prefix-cache")
    refused(moec(*named[:-1], "a/b"), "--prefix: no name of a prefix")
    refused(moec("run", artifact.folder, "--ids", "1,2", "--prefix", "a"), "--prefix is for text")
    refused(moec("serve", artifact.folder, "--system", "x"), "--system and --tools tell what --prefix keeps")


def test_a_server_has_it_before_the_first_request(
    artifact: Artifact, moec: Moec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("starlette", reason="the server: pip install 'moec[serve]'")
    pytest.importorskip("uvicorn", reason="the server: pip install 'moec[serve]'")

    async def no_requests(server: Any, what: str) -> None:
        server.started = True

    monkeypatch.setattr("moec.cli.serve_cmd._run", no_requests)
    chat, tools, kept = tmp_path / "hermes.jinja", tmp_path / "tools.json", tmp_path / "kept"
    chat.write_text(template("hermes").text)
    tools.write_text('[{"type": "function", "function": {"name": "add"}}]')
    command = ["serve", artifact.folder, "--port", 0, "--chat-template", chat, "--prefix-cache", kept, "--prefix", "s"]
    asked = ["--system", "Be brief.", "--tools", tools]
    said = [moec(*command, *asked) for _ in range(2)]
    ((name, count),) = told(kept)
    assert name == "s"
    assert [(status, err) for status, _, err in said] == [
        (0, f"prefix s: {count} tokens, {known} of them known\n") for known in (0, count)
    ]
    speaks = Assistant.of(artifact, chat_template=chat)
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert speaks.chat_prompt(question, tools=json.loads(tools.read_text()), shared=True).shared == count
    tools.write_text("{")
    refused(moec(*command, *asked), str(tools), "not JSON")
    refused(moec(*command[:-4], *asked), "--system and --tools tell what --prefix keeps")
