"""The command line: exit statuses, one-line errors on stderr, data on stdout, JSON for machines."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from moec.cli import main as cli
from moec.compiler.errors import UserError
from tests.conftest import Moec

SPECS = Path(__file__).parents[2] / "specs" / "models"
TINY = str(SPECS / "mobilemoe-tiny.yaml")


def commands(group: Any = None, path: tuple[str, ...] = ()) -> list[list[str]]:
    """Every command and group of commands of the program."""
    group = group or typer.main.get_command(cli.app)
    below = [commands(command, (*path, name)) for name, command in getattr(group, "commands", {}).items()]
    return [list(path), *(found for deeper in below for found in deeper)]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_of_every_command(moec: Moec, command: list[str]) -> None:
    status, out, err = moec(*command, "--help")
    assert (status, err) == (0, "")
    assert "Usage: moec" in out
    if "COMMAND" not in out.splitlines()[1]:  # a group shows its commands instead
        assert re.search(r"Examples?:\s+moec", out)


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_breaks_lines_where_the_terminal_does(path: list[str]) -> None:
    """Docstrings are wrapped at 120 columns; a terminal of 80 would show a long and a short line in turn."""
    command: Any = typer.main.get_command(cli.app)
    for name in path:
        command = command.commands[name]
    assert not [paragraph for paragraph in (command.help or "").split("\n\n") if "\n" in paragraph]


def test_version(moec: Moec) -> None:
    import moec as package

    assert moec("--version") == (0, f"moec {package.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cmpile"], "Did you mean 'compile'"),
        (["compile"], "Missing argument 'SPEC'"),
        (["compile", TINY, "--targt", "x"], "No such option"),
        (["run", "a", "--max-new-tokens", "x"], "--max-new-tokens"),
        (["run", "a", "--max-new-tokens", "-1"], "--max-new-tokens"),
        (["checkpoint", "synthesize", TINY], "Missing option '--out'"),
        (["run", "a"], "give either --prompt TEXT or --ids"),
        (["run", "a", "--prompt", "x", "--temperature", "-1"], "temperature -1.0"),
        (["run", "a", "--prompt", "x", "--top-p", "0"], "top-p 0.0"),
        (["run", "a", "--ids", "1,x"], "--ids '1,x' is not a list of token ids"),
        (["run", "nowhere", "--prompt", "x"], "nowhere: no such artifact folder"),
        (["inspect", "nowhere"], "nowhere: no such file or folder"),
        (["verify", "nowhere"], "nowhere: no such artifact folder"),
        (["compile", "nowhere.yaml"], "nowhere.yaml: no such spec"),
        (["explain", "nowhere.yaml"], "nowhere.yaml: no such spec"),
        (["checkpoint", "inspect", "nowhere"], "nowhere: no such checkpoint folder"),
        (["checkpoint", "spec", "nowhere"], "nowhere"),
        (["schema", "--out", "/dev/null/x"], "/dev/null/x: cannot be written"),
    ],
    ids=lambda value: " ".join(Path(v).name for v in value) if isinstance(value, list) else "",
)
def test_a_users_fault_is_one_line(moec: Moec, arguments: list[str], message: str) -> None:
    status, out, err = moec(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err


def test_faults_of_a_spec_have_a_line_each(moec: Moec, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(Path(TINY).read_text().replace("top_k: 4", "top_k: 40").replace("weights: int4", "weights: int3"))
    for command in ("compile", "explain", "inspect"):
        status, out, err = moec(command, file)
        assert (status, out) == (2, "")
        lines = err.splitlines()
        assert len(lines) == 2
        assert all(line.startswith(f"{file}:") for line in lines)


def test_inspect_a_spec(moec: Moec) -> None:
    status, out, _ = moec("inspect", SPECS / "mobilemoe-s.yaml")
    assert status == 0
    assert "1,263,373,056" in out
    status, out, _ = moec("inspect", SPECS / "mobilemoe-s.yaml", "--json")
    assert status == 0
    assert json.loads(out)["parameters"] == {"total": 1263373056, "active": 272468736}


def test_schema_to_stdout_and_file(moec: Moec, tmp_path: Path) -> None:
    status, out, _ = moec("schema")
    assert status == 0
    assert json.loads(out)["title"] == "moec spec"
    assert moec("schema", "--out", tmp_path / "deep" / "schema.json")[0] == 0
    assert (tmp_path / "deep" / "schema.json").read_text() == out


def test_checkpoint_commands(moec: Moec, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    assert moec("checkpoint", "synthesize", TINY, "--out", folder, "--seed", 3, "--qat")[:2] == (0, f"{folder}\n")
    status, out, err = moec("checkpoint", "inspect", folder, "--spec", TINY)
    assert status == 0, err
    assert "mobilemoe-int4-g32" in out
    status, out, _ = moec("inspect", folder, "--json")  # the general command knows checkpoints as well
    assert json.loads(out)["problems"] == []
    status, out, err = moec("checkpoint", "inspect", folder, "--spec", SPECS / "mobilemoe-s.yaml")
    assert status == 1
    assert "model.layers is 4, the spec says 20" in err
    assert moec("checkpoint", "spec", folder, "--out", tmp_path / "own.yaml")[0] == 0
    assert moec("checkpoint", "inspect", folder, "--spec", tmp_path / "own.yaml")[0] == 0


def wrapped(cause: BaseException) -> RuntimeError:
    """As torch.export reports whatever was raised while it traced."""
    error = RuntimeError("while executing a node")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (UserError("wrong", place="here", remedy="mend it"), 2, "here: wrong; mend it\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), 2, "/full/file: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RuntimeError("our own"), 70, "this is a bug of moec"),
        (wrapped(KeyboardInterrupt()), 130, "interrupted\n"),
        (wrapped(cli._Terminated(143)), 143, "interrupted\n"),
    ],
)
def test_exit_status(
    moec: Moec, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("moec.compiler.spec.load_spec", fail)
    got, out, err = moec("compile", TINY)
    assert (got, out) == (status, "")
    assert message in err
    assert ("Traceback" in err) == (status == 70)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_while_an_object_dies(sent: signal.Signals, status: int) -> None:
    """Python drops what is raised then; the command ends all the same."""
    dying = """
import signal, sys, time
import moec.compiler.spec
from moec.cli import main as cli

class Dying:
    def __del__(self):
        signal.raise_signal(int(sys.argv[1]))
        time.sleep(0)

def load(*_, **__):
    Dying()
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
moec.compiler.spec.load_spec = load
cli.main(["compile", "any.yaml"])
"""
    command = [sys.executable, "-c", dying, str(int(sent))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (status, "interrupted\n" if status == 130 else "")


def test_an_object_that_fails_while_an_interrupt_is_handled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its fault is said, and no signal is sent again: the one that is being handled is on its way."""

    class Failing:
        def __del__(self) -> None:
            raise ValueError("harmless")

    sent: list[object] = []
    monkeypatch.setattr(cli.threading, "Timer", lambda *arguments: sent.append(arguments))
    monkeypatch.setattr(sys, "unraisablehook", cli._send_again)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        Failing()
    assert sent == []
    assert "ValueError: harmless" in capsys.readouterr().err


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    """`moec schema | head -c 1` ends without a traceback."""
    command = f"{sys.executable} -m moec schema | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert done.stderr == ""


def heed_interrupts() -> None:
    """A shell starts its background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_while_the_program_is_still_imported_is_no_traceback() -> None:
    """Ctrl-C in the first tenth of a second: here it comes when typer is looked for."""
    interrupted = (
        "import runpy, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "runpy.run_module('moec', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_signals_leave_nothing_half_written(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    """A checkpoint being synthesized over a good one: interrupted, the good one stands and no temporary is left."""
    out = tmp_path / "checkpoint"
    assert cli.run(["checkpoint", "synthesize", str(SPECS / "mobilemoe-tiny.yaml"), "--out", str(out), "--quiet"]) == 0
    stood = {p.name: p.read_bytes() for p in out.iterdir()}
    command = ["checkpoint", "synthesize", str(SPECS / "mobilemoe-s.yaml"), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "moec", *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == stood
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
