"""Commands in children that are forked from the test's process, which has imported everything: a moment at which one is
stopped is a moment of its own work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from moec.cli import main as cli


def forked(words: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Process id of a child that runs the command without a word."""
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
