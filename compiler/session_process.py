"""A session in a process of its own, whose memory is then the artifact's alone: a budget of memory counts a process.

The process is `python -m moec.compiler.session_process`. It takes messages on stdin and answers on stdout, both as
`multiprocessing.connection` writes them; rows of logits follow as plain bytes. It is ours and runs the same code that a
session in this process would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import IO, Any

import numpy as np

from moec.compiler import errors
from moec.compiler.artifact import Artifact
from moec.compiler.errors import RunError, UserError
from moec.compiler.session import SessionBase
from moec.compiler.target import MoeTrace, Session, target_of


class ProcessSession(SessionBase):
    """A session of `artifact`, with its options, in a process of its own; `Target.load_exact`, or `load_unrounded`.

    Faults are those that the session in the process meets, and RunError if the process ends. `exists`: False where the
    target cannot run the artifact without rounding; the session is closed then.
    """

    def __init__(self, artifact: Artifact, *, unrounded: bool = False) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._place = str(artifact.folder)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (_end closes it)
        # -P: the current folder may be a downloaded model, whose files must not be importable
        command = [sys.executable, "-P", "-m", "moec.compiler.session_process"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, bufsize=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._from = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._process.stdin.close()
        self._process.stdout.close()
        self._end = weakref.finalize(self, _end, self._process, self._to, self._from, self._said)
        try:
            about = self._ask("open", str(artifact.folder), artifact.overrides, unrounded)
        except BaseException:
            self.close()
            raise
        self.exists = about is not None
        if about is None:
            self.close()
            return
        sizes = {name: about[name] for name in ("vocab_size", "context", "max_tokens")}
        super().__init__(str(artifact.folder), **sizes)
        self.rewinds, self.exact_calls = about["rewinds"], about["exact_calls"]

    @property
    def closed(self) -> bool:
        return self._process is None

    def close(self) -> None:
        """End the process. Calls after this raise RunError; closing twice is fine."""
        self._process = None
        self._end()

    def about_process(self) -> Mapping[str, Any]:
        """`peak_rss_mb`: the process's largest resident memory so far, 10^6 bytes; `experts`: what the session's
        `expert_stats()` gives, as a mapping, or None."""
        return dict(self._ask("about"))

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        traces: list[MoeTrace] = self._ask("forward", tokens, start, every, self._tracing, rows=rows)
        return traces

    def _ask(self, name: str, *arguments: Any, rows: np.ndarray | None = None) -> Any:
        """What the process answers. `rows`: where the logits that follow the answer of "forward" go; None: nowhere."""
        process = self._process
        if process is None:
            raise RunError("the session is closed", place=self._place, remedy="load the artifact again")
        try:
            self._to.send((name, *arguments))
            fault, answer = self._from.recv()
            if fault is None and name == "forward":
                logits = np.frombuffer(self._from.recv_bytes(), np.float32)
                if rows is not None:
                    rows.reshape(-1)[:] = logits
        except (EOFError, OSError):
            status = process.wait()
            last = self._last_line()
            self.close()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise RunError(
                f"the process that ran it ended ({how}){': ' if last else ''}{last}",
                place=self._place,
                remedy="give it more memory, or report it with this line",
            ) from None
        except BaseException:  # Ctrl-C before the answer: the next call would read this one's
            self.close()
            raise
        if fault is not None:
            raise _raised(*fault)
        return answer

    def _last_line(self) -> str:
        """Of what the process wrote on stderr, at most 300 characters; "" if nothing."""
        self._said.seek(max(self._said.seek(0, os.SEEK_END) - 4096, 0))
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _raised(kind: str, message: str, place: str | None, remedy: str | None) -> Exception:
    """The exception that the process had."""
    if kind == MemoryError.__name__:
        return MemoryError(message)
    found = getattr(errors, kind, UserError)
    assert issubclass(found, UserError)
    return found(message, place=place, remedy=remedy)


def _end(process: subprocess.Popen[bytes], *open_files: Connection | IO[bytes]) -> None:
    process.kill()
    for file in open_files:
        with contextlib.suppress(OSError):
            file.close()
    process.wait()


# --- in the process -------------------------------------------------------------------------------------------------


class _Served:
    """Answers the messages of a ProcessSession."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self.logits = np.empty((0, 0), np.float32)

    def open(self, folder: str, overrides: Mapping[str, Any], unrounded: bool) -> dict[str, Any] | None:
        artifact = Artifact.open(folder).with_options(overrides)
        target = target_of(artifact)
        session = target.load_unrounded(artifact) if unrounded else target.load_exact(artifact)
        self._session = session
        if session is None:
            return None
        return {
            "vocab_size": session.vocab_size,
            "context": session.context,
            "max_tokens": getattr(session, "max_tokens", session.context),
            "rewinds": bool(getattr(session, "rewinds", False)),
            "exact_calls": bool(getattr(session, "exact_calls", False)),
        }

    def forward(self, tokens: np.ndarray, start: int, every: bool, tracing: bool) -> list[MoeTrace]:
        session = self._session
        assert session is not None
        if start != session.position:
            session.reset() if start == 0 else session.rewind(start)
        session.trace(tracing)
        self.logits = session.prefill(tokens, "all" if every else "last")
        return session.take_traces() if tracing else []

    def about(self) -> dict[str, Any]:
        stats = getattr(self._session, "expert_stats", lambda: None)()
        return {
            "peak_rss_mb": _peak_bytes() / 1e6,
            "experts": None if stats is None else dataclasses.asdict(stats),
        }


def _peak_bytes() -> int:
    """The largest resident memory of this process. getrusage begins with that of the process that started it."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answer until the caller goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller; when that ends, so does this process
    replies = Connection(os.dup(sys.stdout.fileno()), readable=False)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what native code prints must not be taken for a reply
    requests = Connection(os.dup(sys.stdin.fileno()), writable=False)
    served = _Served()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            name, *arguments = requests.recv()
            try:
                answer = getattr(served, name)(*arguments)
            except UserError as error:
                replies.send(((type(error).__name__, error.message, error.place, error.remedy), None))
            except MemoryError as error:
                replies.send(((MemoryError.__name__, str(error), None, None), None))
            else:
                replies.send((None, answer))
                if name == "forward":
                    replies.send_bytes(np.ascontiguousarray(served.logits).data.cast("B"))


if __name__ == "__main__":
    main()
