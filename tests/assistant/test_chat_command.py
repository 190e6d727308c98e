"""`moec chat` and `moec run --chat` as a user types them; Ctrl-C on a terminal stops an answer and nothing else."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.assistant.conversations import FOLDER
from tests.assistant.speaking import VOCABULARY, Speaking, tokenizer
from tests.conftest import Moec, refused


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that a chat reads, whose model says what `answers` lists."""
    from moec.assistant import load
    from moec.compiler import artifact as module
    from moec.compiler.artifact import Artifact
    from tests.assistant.small_artifact import manifest

    folder = tmp_path / "speaking"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer().to_str())
    (folder / "chat_template.jinja").write_text((FOLDER / "chatml.jinja").read_text())
    opened = Artifact(folder, manifest())
    monkeypatch.setattr(module.Artifact, "open", staticmethod(lambda _: opened))
    monkeypatch.setattr(load, "load_session", lambda *_: Speaking(["Hello.", "Again.", "Third."], context=400))
    return folder


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation(artifact: Path, moec: Moec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    typed(monkeypatch, "Hi", "", "two \\", "lines", "/history", f"/save {file}", "/stats", "/undo", "/retry", "/clear")
    status, out, err = moec("chat", artifact, "--system", "Brief.")
    assert (status, err.count("\n")) == (0, 2), err
    assert "4 messages" not in err
    assert f"{file}: 5 messages" in err
    assert "tokens kept from before" in err.replace(" of them kept", " tokens kept")
    said = "Hello.\nAgain.\nsystem: Brief.\nuser: Hi\nassistant: Hello.\nuser: two \nlines\nassistant: Again.\nThird.\n"
    assert out == said
    saved = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]
    typed(monkeypatch, "/history", "/quit", "never asked")
    assert moec("chat", artifact, "--load", file)[1].startswith("system: Brief.\nuser: Hi\n")


def test_faults_are_said_and_it_goes_on(
    artifact: Path, moec: Moec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_folder = tmp_path / "file"
    no_folder.write_text("kept")
    commands = ["/nope", "/undo", "/retry", "/stats", "/save", "/load", "/load nowhere.json", f"/save {no_folder}/x/y"]
    typed(monkeypatch, *commands, "/help", "Hi")
    status, out, err = moec("chat", artifact)
    assert (status, out) == (0, "Hello.\n")
    for part in (
        "no command /nope",
        "there is no question",
        "nothing was answered",
        "/save needs a file",
        "nowhere.json",
        f"{no_folder}/x/y",
    ):
        assert part in err
    assert "Traceback" not in err
    assert no_folder.read_text() == "kept"
    for command in ("/help", "/system", "/clear", "/undo", "/retry", "/history", "/save", "/load", "/stats", "/quit"):
        assert command in err


def test_a_conversation_with_an_unknown_role_is_refused(
    artifact: Path, moec: Moec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "saved.json"
    file.write_text('{"messages": [{"role": "robot", "content": "x"}]}')
    typed(monkeypatch, f"/load {file}", "Hi")
    status, out, err = moec("chat", artifact)
    assert (status, out) == (0, "Hello.\n")  # the conversation is as it was
    assert "messages[0].role: unknown role robot" in err
    refused(moec("chat", artifact, "--load", file), "unknown role robot")


@pytest.mark.slow
def test_a_template_that_does_not_end_is_one_line(
    artifact: Path, moec: Moec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.assistant.template.SECONDS", 2.0)
    file = tmp_path / "endless.jinja"
    file.write_text("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    refused(moec("run", artifact, "--chat", "--prompt", "x", "--chat-template", file), str(file), "does not end")


def test_what_is_dropped_is_said(artifact: Path, moec: Moec, monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.assistant import load

    row = np.zeros(VOCABULARY, np.float32)
    row[40] = 9
    monkeypatch.setattr(load, "load_session", lambda *_: Speaking(likes=lambda _: row, context=200))
    policy = ("--context-full", "drop-oldest")
    typed(monkeypatch, "Hi", "And?")
    status, out, err = moec("chat", artifact, *policy, "--max-new-tokens", 500, "--system", "S.")
    assert (status, [len(line) for line in out.splitlines()]) == (0, [500, 500])
    assert err.count("the context was full: the oldest ") == 2
    assert "the context is full: the oldest 2 messages were dropped\n" in err
    assert err.count("stopped by length\n") == 2
    typed(monkeypatch, "Hi")
    status, out, err = moec("chat", artifact, *policy)  # as many tokens as the context holds
    assert (len(out), "stopped by length" in err) == (201, True)
    typed(monkeypatch, "Hi")
    status, out, err = moec("chat", artifact, "--drop-oldest")  # turns only: an answer ends where the context does
    assert (len(out) < 200, "stopped by context" in err) == (True, True)
    typed(monkeypatch, "Hi")
    status, out, err = moec("chat", artifact, *policy, "--keep-first", 200)
    assert (status, out, "keep_first: 200 tokens leave nothing to drop" in err) == (0, "", True)


def test_a_full_context_is_said_and_it_goes_on(artifact: Path, moec: Moec, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "x" * 500, "Hi")
    status, out, err = moec("chat", artifact)
    assert (status, out) == (0, "Hello.\n")
    assert "no room for an answer" in err


def test_run_chat(artifact: Path, moec: Moec) -> None:
    status, out, err = moec("run", artifact, "--chat", "--system", "Brief.", "--prompt", "Hi", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["text"], found["thinking"], found["tool_calls"], found["stopped"]) == ("Hello.", "", [], "stop token")
    assert "system\nBrief." in tokenizer().decode(found["prompt_ids"], skip_special_tokens=False)
    assert moec("run", artifact, "--chat", "--prompt", "Hi")[1] == "Hello.\n"


def test_run_with_a_format(artifact: Path, moec: Moec, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    status, out, err = moec("run", artifact, "--chat", "--prompt", "Hi", "--json-schema", schema)
    assert (status, json.loads(out) in ("yes", "no")) == (0, True), err
    status, out, err = moec("run", artifact, "--chat", "--prompt", "Hi", "--regex", "a{50}", "--max-new-tokens", 3)
    assert (status, out) == (2, "aaa\n")
    assert "before its format was whole: stopped by length behind 3 tokens" in err
    schema.write_text('{"type": "integer", "minimum": 2, "maximum": 1}')
    refused(moec("run", artifact, "--prompt", "Hi", "--json-schema", schema), str(schema), "nsatisfiable")
    schema.write_text("{")
    refused(moec("run", artifact, "--prompt", "Hi", "--json-schema", schema), str(schema), "not JSON")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--ids", "1", "--chat"], "--chat is for text"),
        (["--ids", "1", "--regex", "a"], "--regex is for text"),
        (["--prompt", "x", "--system", "y"], "--system is for conversations; add --chat"),
        (["--prompt", "x", "--stop", ""], "a stop string has no characters"),
        (["--prompt", "x", *(f"--stop={i}" for i in range(2000))], "2000 stop strings"),
        (["--prompt", "x", "--regex", "("], "regex:"),
        (["--prompt", "x", "--regex", "a", "--json-schema", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--prompt", "x", "--chat", "--tools", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--prompt", "x", "--logit-bias", "a"], "'a' is not ID=BIAS"),
        (["--prompt", "x", "--chat", "--chat-template", "nowhere.jinja"], "nowhere.jinja: cannot be read"),
    ],
)
def test_what_does_not_go_together_is_one_line(arguments: list[str], what: str, artifact: Path, moec: Moec) -> None:
    refused(moec("run", artifact, *arguments), what)


def test_logprobs_without_json_are_refused(artifact: Path, moec: Moec) -> None:
    refused(moec("run", artifact, "--prompt", "Hi", "--logprobs", 2), "--logprobs are told in JSON; add --json")
    refused(moec("run", artifact, "--ids", "20", "--logprobs", 2), "add --json")


def test_ctrl_c_before_an_answer_begins_keeps_the_conversation(
    artifact: Path, moec: Moec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a question is rendered and encoded, or a command is executed."""
    from moec.assistant.assistant import Assistant

    before = signal.getsignal(signal.SIGINT)
    real, count = Assistant.chat_prompt, iter(range(9))

    def interrupted(*given: object, **named: object) -> object:
        if next(count) == 2:  # the one at the start, the first question, this
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Assistant, "chat_prompt", interrupted)
    typed(monkeypatch, "Hi", "lost", "/history", "next")
    status, out, err = moec("chat", artifact)
    assert (status, out) == (0, "Hello.\nuser: Hi\nassistant: Hello.\nAgain.\n")
    assert "stopped; /quit or Ctrl-D leaves" in err
    assert signal.getsignal(signal.SIGINT) is before


# workers of the test runner ignore SIGINT, and their children would, too
CHAT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
import pytest
from moec.assistant import load
from moec.cli import main
from moec.compiler import artifact
from tests.assistant.small_artifact import manifest
from tests.assistant.speaking import Speaking

opened = artifact.Artifact(Path(sys.argv[1]), manifest())
artifact.Artifact.open = staticmethod(lambda _: opened)
load.load_session = lambda *_: Speaking(["a" * 300, "Second."], context=600, slow=lambda: time.sleep(0.05))
sys.exit(main.run(["chat", sys.argv[1]]))
"""


def test_ctrl_c_stops_the_answer_and_not_the_program(artifact: Path, tmp_path: Path) -> None:
    """On a terminal of its own: a long answer is stopped, the next question is answered, a second Ctrl-C at the prompt
    forgets the line, and Ctrl-D leaves with status 0."""
    root = Path(__file__).parents[2]
    master, slave = pty.openpty()
    environment = {
        **os.environ,
        "XDG_STATE_HOME": str(tmp_path),
        "PYTHONPATH": f"{root / 'src'}:{root}",
        "TERM": "dumb",
    }
    child = subprocess.Popen(
        [sys.executable, "-c", CHAT, str(artifact)],
        stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    seen = ""

    def until(text: str, seconds: float = 60.0, again: bytes = b"") -> None:
        nonlocal seen
        end, next_try = time.monotonic() + seconds, time.monotonic() + 2
        while text not in seen:
            assert time.monotonic() < end, f"waiting for {text!r}, saw {seen!r}"
            if again and time.monotonic() > next_try:
                os.write(master, again)
                next_try += 2
            if select.select([master], [], [], 0.2)[0]:
                try:
                    seen += os.read(master, 4096).decode(errors="replace")
                except OSError:  # the other side has gone
                    assert text in seen, seen
        seen = seen[seen.index(text) + len(text) :]

    try:
        until("> ")
        os.write(master, b"long\n")
        until("aaaaa")
        os.write(master, b"\x03")  # the terminal sends SIGINT to all processes of the foreground, workers included
        until("stopped by cancelled")
        until("> ")
        os.write(master, b"next\n")
        until("Second.")
        until("> ")
        os.write(master, b"half a line")
        until("half a line")
        os.write(master, b"\x03")
        until("leaves", again=b"\x03")  # one that comes between the prompt and its reading waits for the next key
        until("> ")
        os.write(master, b"/history\n")
        until("assistant: aaaaa")
        until("user: next")
        until("> ")
        os.write(master, b"\x04")
        assert child.wait(20) == 0
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        os.close(master)
    history = tmp_path / "moec" / "chat-history"
    if history.exists():  # Python without readline keeps none
        assert "next" in history.read_text()
        assert history.stat().st_mode & 0o077 == 0
