"""Code for files from outside, run in a separate process: if that panics, aborts or hangs, the caller gets an error.

A worker is a module run as `python -m` that calls `serve`; it answers messages on stdin with replies on stdout, each
JSON with its length before it. A call costs some tens of microseconds for the pipe. Each message carries the limits of
its answer: processor time, which does not pass while other processes have the cores, and address space (on Linux).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from moec.compiler.errors import ArtifactError

PATIENCE = 12  # wall-clock limit of an answer, as a multiple of its processor time: the machine may be busy
_MAX_REPLY = 1 << 30


class Fault(Exception):
    """An error that a worker reported, in one line."""


class Worker:
    """The process of `module`. what: its name in messages ("the tokenizer"); place, remedy: of its errors.

    ArtifactError if the system starts none.
    """

    def __init__(self, module: str, what: str, place: str, remedy: str) -> None:
        self._what, self._place, self._remedy = what, place, remedy
        # -P: the current folder may be a downloaded model, whose files must not be importable
        command = [sys.executable, "-P", "-m", module]
        self._lock = threading.Lock()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        except OSError as error:  # no memory, processes or files are left
            what = f"{what} cannot be started: {error.strerror}"
            raise ArtifactError(what, place=place, remedy="close other programs") from None
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def alive(self) -> bool:
        """Whether it can answer: it was not closed and has not ended."""
        return self._end.alive and self._process.poll() is None

    def ask(self, message: dict[str, Any], data: bytes = b"", *, seconds: float, memory: int) -> Any:
        """The value that the worker answers. seconds: of processor time; memory: bytes of address space.

        Fault: the worker reported an error. ArtifactError: it was closed, ended or exceeded a limit; it is closed then.
        """
        limits = {"seconds": seconds, "memory": memory}
        with self._lock:
            if not self._end.alive:
                raise ArtifactError(f"{self._what} is closed", place=self._place)
            try:
                send(self._process.stdin, {**limits, "message": message}, data)
                reply = json.loads(_receive_within(self._process, time.monotonic() + PATIENCE * seconds))
            except TimeoutError:
                self._end()
                raise self._ended(f"does not end: {PATIENCE * seconds:.0f} seconds have passed") from None
            except (EOFError, OSError):
                self._end()
                raise self._ended(_why(self._process.poll(), seconds, memory)) from None
            except BaseException:  # Ctrl-C before the reply: the next call would read this call's reply
                self._end()
                raise
        if "fault" in reply:
            raise Fault(reply["fault"])
        return reply["value"]

    def close(self) -> None:
        """End the process. Calls after this raise ArtifactError."""
        self._end()

    def _ended(self, why: str) -> ArtifactError:
        return ArtifactError(f"{self._what} {why}", place=self._place, remedy=self._remedy)


def _why(status: int | None, seconds: float, memory: int) -> str:
    """Why a process stopped. status: its exit status, or minus the number of a signal."""
    if status == -signal.SIGXCPU:
        return f"does not end: {seconds:.0f} seconds of processor time have passed"
    if status == -signal.SIGABRT:  # native code also aborts where memory is refused
        return f"stopped: it aborted, or needs more than {memory / 2**30:.1f} GB of memory"
    return f"stopped (status {status})"


def send(stream: Any, message: dict[str, Any], data: bytes = b"") -> None:
    """The lengths of message and data, the message as JSON, the data."""
    text = json.dumps(message).encode()
    left = memoryview(struct.pack("<QQ", len(text), len(data)) + text + data)
    while left:  # an unbuffered pipe may take less
        left = left[stream.write(left) :]


def serve(answer: Callable[[dict[str, Any], bytes], Any]) -> None:
    """The worker's side: answer every message until the caller closes the pipe.

    `answer` gets a message and its data; what it raises is sent as a fault.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what native code prints must not be taken for a reply
    requests = sys.stdin.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller; when that ends, so does this process
    try:
        while header := requests.read(16):
            length, data_length = struct.unpack("<QQ", header)
            sent = json.loads(requests.read(length))
            data = requests.read(data_length)
            _limit(sent["seconds"], sent["memory"])
            try:
                value = answer(sent["message"], data)
            except BaseException as error:  # panics of native libraries are not Exceptions
                lines = str(error).splitlines() or [type(error).__name__]
                send(replies, {"fault": "".join(c if c.isprintable() else "?" for c in lines[0])[:300]})
            else:
                send(replies, {"value": value})
    except BrokenPipeError:
        sys.exit(0)


def _limit(seconds: float, memory: int) -> None:
    """From now on `seconds` of processor time end this process; on Linux it gets at most `memory` of address space."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {resource.RLIMIT_CPU: math.ceil(used.ru_utime + used.ru_stime + seconds)}
    if sys.platform.startswith("linux"):
        limits[resource.RLIMIT_AS] = memory
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _receive_within(process: subprocess.Popen[bytes], until: float) -> bytes:
    """The next reply. TimeoutError, EOFError."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)

        def take(count: int) -> bytes:
            found = bytearray()
            while len(found) < count:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError
                assert process.stdout is not None
                piece = os.read(process.stdout.fileno(), min(count - len(found), 1 << 20))
                if not piece:
                    raise EOFError
                found += piece
            return bytes(found)

        length, _ = struct.unpack("<QQ", take(16))
        if length > _MAX_REPLY:
            raise EOFError
        return take(length)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()
