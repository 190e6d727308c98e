"""Commands in children that are forked from the test's process, which has imported everything: a moment at which one is
stopped is a moment of its own work. Where autograd has threads in the test's process, whose children cannot train then,
they are processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from moec.cli import main as cli

_RUN = "import sys; from moec.cli import main; sys.exit(main.run(sys.argv[1:]))"
_started: list[subprocess.Popen[bytes]] = []  # kept: one that nobody has any more is waited for by others


def children_train() -> bool:
    """Whether a forked child can compute gradients, which a thread of autograd in this process forbids: tests of
    another file may have started one."""
    if "torch" not in sys.modules:
        return True
    child = os.fork()
    if child:
        return ended(child) == 0
    try:
        import torch

        torch.ones(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
        os._exit(0)
    finally:
        os._exit(1)


def forked(words: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Process id of a child that runs the command without a word."""
    if not children_train():
        quiet = subprocess.DEVNULL
        command = [sys.executable, "-W", "ignore", "-c", _RUN, *words]
        _started.append(subprocess.Popen(command, stdout=quiet, stderr=quiet, preexec_fn=prepare))
        return _started[-1].pid
    child = os.fork()
    if child:
        return child
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        prepare()
        os._exit(cli.run(words))
    finally:
        os._exit(99)


def ended(child: int, seconds: float = 120) -> int:
    """Its exit status; negative for the signal that ended it. One that hangs is a failure."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"it did not end in {seconds} s")
