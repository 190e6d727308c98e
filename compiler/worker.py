"""Work on files from outside in a process of its own: if that panics, aborts or hangs, this one gets an error.

A worker is a module run as `python -m` that calls `serve`; it answers messages on stdin with replies on stdout, each
JSON with its length before it. A call costs the pipe, some tens of microseconds.
"""

from __future__ import annotations

import contextlib
import json
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
from typing import Any, BinaryIO

from moec.compiler.errors import ArtifactError

_MAX_REPLY = 1 << 30


class Fault(Exception):
    """What a worker answered instead of a value, in one line."""


class Worker:
    """The process of `module`. what: it in messages, such as "the tokenizer"; place and remedy are the file's."""

    def __init__(self, module: str, what: str, place: str, remedy: str) -> None:
        self._what, self._place, self._remedy = what, place, remedy
        # -P: the folder that the user stands in may be a model's, and its files are not modules to import
        command = [sys.executable, "-P", "-m", module]
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def alive(self) -> bool:
        return self._end.alive

    def ask(self, message: dict[str, Any], data: bytes = b"", *, seconds: float) -> Any:
        """The value that the worker answers within `seconds`. Fault: it answered one.

        ArtifactError: it was closed, stopped, or took longer, and is then ended.
        """
        with self._lock:
            if not self._end.alive:
                raise ArtifactError(f"{self._what} is closed", place=self._place)
            try:
                send(self._process.stdin, message, data)
                reply = json.loads(_receive_within(self._process, time.monotonic() + seconds))
            except TimeoutError:
                self._end()
                what = f"{self._what} does not end: {seconds:.0f} seconds have passed"
                raise ArtifactError(what, place=self._place, remedy=self._remedy) from None
            except (EOFError, OSError):
                self._end()
                what = f"{self._what} stopped (status {self._process.poll()})"
                raise ArtifactError(what, place=self._place, remedy=self._remedy) from None
            except BaseException:  # Ctrl-C between message and reply: the next reply would be this one's
                self._end()
                raise
        if "fault" in reply:
            raise Fault(reply["fault"])
        return reply["value"]

    def close(self) -> None:
        """End the process. Calls after this raise ArtifactError."""
        self._end()


def send(stream: Any, message: dict[str, Any], data: bytes = b"") -> None:
    """A message as JSON with its length before it, then `data`."""
    text = json.dumps(message).encode()
    left = memoryview(struct.pack("<Q", len(text)) + text + data)
    while left:  # an unbuffered pipe may take less
        left = left[stream.write(left) :]


def serve(answer: Callable[[dict[str, Any], BinaryIO], Any], *, memory: int) -> None:
    """The worker's side: answer every message until the other side has gone. memory: bytes of address space.

    `answer` gets a message and the stream behind it, which holds the message's data; what it raises is a fault.
    """
    if sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what native code prints must not be taken for a reply
    requests = sys.stdin.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; without it this one ends
    try:
        while header := requests.read(8):
            message = json.loads(requests.read(struct.unpack("<Q", header)[0]))
            try:
                value = answer(message, requests)
            except BaseException as error:  # native libraries panic, which is no Exception
                lines = str(error).splitlines() or [type(error).__name__]
                send(replies, {"fault": "".join(c if c.isprintable() else "?" for c in lines[0])[:300]})
            else:
                send(replies, {"value": value})
    except BrokenPipeError:
        sys.exit(0)


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

        (length,) = struct.unpack("<Q", take(8))
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
