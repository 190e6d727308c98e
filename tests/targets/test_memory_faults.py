"""What goes wrong while experts are read: an error of one line from every entry point, and the next call is as if
nothing had been. Reads are made to fail, come late or short, or meet a file that is cut, by faulty_reads.c in processes
of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.runtime.native import find_compiler, runner_binary
from tests.conftest import Moec, refused
from tests.targets.budgets import spec
from tests.targets.memory_faults import CUT, FAILS, FAILS_ON, LATE
from tests.tiny import TinyModels, tiny_text

HERE = Path(__file__).parent
EIO = "an expert cannot be read: Input/output error"
GONE = "truncated while it is in use"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD, O_DIRECT and /proc of Linux")


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preload") / "faulty_reads.so"
    source = str(HERE / "faulty_reads.c")
    command = [find_compiler(), "-x", "c", "-std=gnu11", "-O1", "-shared", "-fPIC", source, "-o", str(out), "-ldl"]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("many")
    checkpoint = synthesize(spec(), folder / "c", seed=0, qat=True)
    built = build.compile(spec(), checkpoint=checkpoint, out=folder / "a")
    if not direct(built.path("model.pte")):
        pytest.skip("this file system has no direct reads, which are told apart from others here")
    return built


@pytest.fixture
def model(artifact: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copy(artifact.path("model.pte"), tmp_path / "model.pte"))


def direct(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def started(preload: Path, *command: object, reads: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "LD_PRELOAD": str(preload), **({"MOEC_READS": reads} if reads else {})}
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
    try:
        return subprocess.Popen([*map(str, command)], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def ended(preload: Path, *command: object, reads: str = "", given: str = "") -> tuple[int, str, str]:
    process = started(preload, *command, reads=reads)
    out, err = process.communicate(given, timeout=240)
    return process.returncode, out, err


def scenario(preload: Path, name: str, file: Path, *arguments: object) -> dict[str, Any]:
    status, out, err = ended(preload, sys.executable, "-m", "tests.targets.memory_faults", name, file, *arguments)
    assert status == 0, f"status {status}: {err[-2000:]}"
    return dict(json.loads(out))


@pytest.mark.parametrize("decoding", [0, 1])
@pytest.mark.parametrize("kind", [FAILS, FAILS_ON])
def test_a_read_that_fails(preload: Path, model: Path, kind: int, decoding: int) -> None:
    found = scenario(preload, "recovers", model, kind, decoding)
    assert found["same"]
    assert found["faults"] or kind == FAILS  # one read may have been made ahead, and fail without harm
    for fault in found["faults"]:
        assert EIO in fault
        assert str(model) in fault
        assert "\n" not in fault


def test_reads_that_come_short(preload: Path, model: Path) -> None:
    found = scenario(preload, "short", model)
    assert found["same"]
    assert found["reads"] > 1000


@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize("left", ["half", "program", "nothing"])
def test_a_file_that_is_cut_while_it_is_read(preload: Path, model: Path, after: int, left: str) -> None:
    """In the middle of a call. What stays resident is mapped and goes too: that is no SIGBUS."""
    data = model.read_bytes()
    sizes = {"half": len(data) // 2, "program": int.from_bytes(data[16:24], "little"), "nothing": 0}
    found = scenario(preload, "cut", model, after, sizes[left])
    for fault in found["faults"]:
        assert GONE in fault
        assert "\n" not in fault


@pytest.mark.parametrize("kind", [0, FAILS_ON])
def test_two_sessions_in_two_threads(preload: Path, model: Path, kind: int) -> None:
    found = scenario(preload, "threads", model, kind)
    assert found["wrong"] == []
    assert bool(found["faults"]) == bool(kind)
    assert all(EIO in fault for fault in found["faults"])
    assert found["misses"] > 0


def test_cancelled_in_the_middle_of_a_read(preload: Path, model: Path) -> None:
    found = scenario(preload, "cancelled", model)["found"]
    assert [same for _, same in found] == [True, True]
    assert "cancelled" in [stopped for stopped, _ in found]


def test_the_interface_of_applications(preload: Path, tiny: TinyModels, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(tiny_text(layers=2, context=256)) / "artifact", tmp_path / "a")
    if not direct(folder / "model.pte"):
        pytest.skip("this file system has no direct reads, which are told apart from others here")
    found = scenario(preload, "application", folder)
    assert "a memory budget of 1 MB is less than" in found["least"]
    assert EIO in found["failed"]
    assert GONE in found["cut"]
    assert all("\n" not in found[name] for name in ("least", "failed", "cut"))
    assert found["stopped"] == "cancelled"
    assert (found["again"], found["after"]) == (True, True)


def budget_of(preload: Path, *command: object) -> int:
    status, _, err = ended(preload, *command, "--memory-mb", 1)
    assert status == 2
    return int(err.split("less than ")[1].split(" MB")[0]) + 3


def test_the_runner(preload: Path, model: Path) -> None:
    """A program in C++ over the C interface."""
    command = (runner_binary(), model, "--prompt-length", 40, "--decode", 20)
    budget = budget_of(preload, *command)
    fault = ended(preload, *command, "--memory-mb", budget, reads=f"{FAILS_ON} 9 0")
    refused(fault, f"error: {EIO}")
    for size in (0, model.stat().st_size // 2):
        copy = Path(shutil.copy(model, model.with_name("copy.pte")))
        cut = (command[0], copy, *command[2:])
        refused(ended(preload, *cut, "--memory-mb", budget, reads=f"{CUT} 9 {size}"), f"error: {GONE}")
    status, _, err = ended(preload, *command, "--memory-mb", budget)
    assert status == 0, err


# of one model with a tokenizer; a budget of 1 MB is refused before anything is asked of the model
COMMANDS: dict[str, tuple[object, ...]] = {
    "run": ("--ids", "1,2,3,4,5", "--max-new-tokens", 5),
    "chat": ("--chat-template", HERE.parent / "assistant" / "templates" / "chatml.jinja"),
    "serve": ("--port", 0),
    "bench": ("--prefill", 8, "--decode", 4, "--repeats", 1),
    "profile": ("--prompts", "dummy", "--context", "16", "--decode", 4, "--repeat", 1, "--quiet"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_too_small_a_budget_is_refused_with_the_least(tiny: TinyModels, moec: Moec, command: str) -> None:
    folder = tiny(tiny_text(layers=2, context=256)) / "artifact"
    status, out, err = moec(command, folder, *COMMANDS[command], "--memory-mb", "1")
    fault = (status, out, without_progress(err))
    refused(fault, "a memory budget of 1 MB is less than", "experts of one token", "give a larger --memory-mb")


def without_progress(err: str) -> str:
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("bench: "))


@pytest.mark.parametrize("command", ["run", "bench", "profile"])
def test_the_commands(preload: Path, artifact: Artifact, command: str) -> None:
    moec = (sys.executable, "-m", "moec", command, artifact.folder, *COMMANDS[command])
    budget = budget_of(preload, *moec)
    status, out, err = ended(preload, *moec, "--memory-mb", budget, reads=f"{FAILS_ON} 9 0")
    refused((status, out, without_progress(err)), EIO)
    status, _, err = ended(preload, *moec, "--memory-mb", budget)
    assert status == 0, err


def test_a_server_says_what_is_wrong_and_goes_on(preload: Path, tiny: TinyModels) -> None:
    folder = tiny(tiny_text(layers=2, context=256)) / "artifact"
    moec = (sys.executable, "-m", "moec", "serve", folder, *COMMANDS["serve"], *COMMANDS["chat"])
    budget = budget_of(preload, *moec)
    answers = []
    for reads in ("", f"{FAILS} 2 0"):
        process = started(preload, *moec, "--memory-mb", budget, reads=reads)
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "http://" in line)
            address = line[line.index("http://") :].strip()
            answers.append([completion(address) for _ in range(2)])
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    (plain, again), (failed, after) = answers
    assert plain[0] == again[0] == after[0] == 200
    assert plain[1] == after[1]
    assert failed[0] == 500  # no fault of the request
    assert EIO in failed[1]
    assert "\n" not in failed[1]


def test_a_conversation_says_what_is_wrong(preload: Path, tiny: TinyModels) -> None:
    folder = tiny(tiny_text(layers=2, context=256)) / "artifact"
    moec = (sys.executable, "-m", "moec", "chat", folder, *COMMANDS["chat"])
    budget = budget_of(preload, *moec)
    status, _, err = ended(preload, *moec, "--memory-mb", budget, reads=f"{FAILS_ON} 2 0", given="Hello\nAgain\n")
    assert status in (0, 2)
    assert EIO in err
    assert "Traceback" not in err


def completion(address: str) -> tuple[int, str]:
    """Status, and the text or the error's message."""
    asked = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, str(json.load(reply)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        return error.code, str(json.load(error)["error"]["message"])


def test_ctrl_c_in_the_middle_of_a_read(preload: Path, artifact: Artifact) -> None:
    moec = (sys.executable, "-m", "moec", "run", artifact.folder, "--ids", "1,2,3,4,5", "--max-new-tokens", 100)
    budget = budget_of(preload, *moec)
    process = started(preload, *moec, "--memory-mb", budget, reads=f"{LATE} 0 200000")
    assert process.stdout is not None
    assert process.stdout.read(1)  # the first token: the others take ten seconds at least, nearly all of them in reads
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted\n"
